"""Quantities: texts that are read, and texts that are refused with field, value and allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.errors import InvalidField
from agentcgroupd.units import (
    BYTES_MAX,
    BYTES_MIN,
    parse_bytes,
    parse_cores,
    parse_count,
    parse_duration,
    parse_labels,
    parse_priority,
    parse_word,
    show_bytes,
    show_usec,
)

PARSERS: list[Callable[[str, str], object]] = [
    parse_bytes,
    parse_cores,
    parse_duration,
    parse_priority,
    partial(parse_count, least=1, most=10_000),
    partial(parse_word, words=("freeze", "kill")),
]


SIZES = {
    **dict.fromkeys(("512M", "512m", "512MB", "512MiB"), 512 << 20),
    **dict.fromkeys(("2GiB", " 2 G "), 2 << 30),
    **dict.fromkeys(("1048576", "1048576B"), 1 << 20),
    "1.5G": 3 << 29,
    ".5g": 1 << 29,
    "1t": 1 << 40,
    "7E": 7 << 60,
}


@pytest.mark.parametrize(("text", "value"), SIZES.items())
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes("memory", text) == value


NOT_SIZES = {
    **dict.fromkeys(("", "NaN", "inf", "1 2M", "M", "9" * 1_000_000), "not a number"),
    **dict.fromkeys(("-1", "-0"), "negative"),
    **dict.fromkeys(("0", "0G"), "zero"),
    **dict.fromkeys(("1e9", "12Q", "0x10M", "1GG", "1ib"), "unit"),
    **dict.fromkeys(("8E", "9" * 30 + "E"), "too large"),
    "1.5": "part of a byte",
    "1K": "below 1 MiB",
    "1_000M": "number",
}


@pytest.mark.parametrize(("text", "why"), NOT_SIZES.items())
def test_sizes_that_are_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidField, match=why) as caught:
        parse_bytes("memory_max", text)
    assert caught.value.field == "memory_max"
    assert caught.value.value == text[:200]
    assert caught.value.allowed in caught.value.sentence
    assert len(caught.value.sentence) < 500


@pytest.mark.parametrize(
    ("text", "value"), [("1.5", 1500), ("250m", 250), ("2", 2000), ("10m", 10), ("0.01", 10)]
)
def test_cores(text: str, value: int) -> None:
    assert parse_cores("cpu_max", text) == value


@pytest.mark.parametrize("text", ["0", "9m", "0.001", "1G", "-1", "nan", "1e3", "70000", "250M"])
def test_cores_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidField, match="cpu_max"):
        parse_cores("cpu_max", text)


DURATIONS_USEC = {
    "90": 90_000_000,
    "1.5s": 1_500_000,
    "250ms": 250_000,
    "10m": 600_000_000,
    "2h": 7_200_000_000,
    "1d": 86_400_000_000,
    "5000us": 5000,
}


@pytest.mark.parametrize(("text", "value"), DURATIONS_USEC.items())
def test_durations(text: str, value: int) -> None:
    assert parse_duration("timeout", text) == value


@pytest.mark.parametrize("text", ["0", "1us", "31d", "-5s", "5 parsecs", "soon"])
def test_durations_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidField, match="timeout"):
        parse_duration("timeout", text)


def test_priorities() -> None:
    read = {"0": 0, "100": 100, "batch": 20, "Normal": 50, " important ": 80}
    assert {text: parse_priority("p", text) for text in read} == read
    for text in ("101", "-1", "1.5", "high"):
        with pytest.raises(InvalidField):
            parse_priority("priority", text)


def test_a_near_miss_is_recognised() -> None:
    with pytest.raises(InvalidField, match="did you mean 'important'"):
        parse_priority("priority", "imporant")
    with pytest.raises(InvalidField, match="did you mean 'freeze'"):
        parse_word("on_pressure", "freez", ("freeze", "kill"))


@given(st.text(max_size=80), st.sampled_from(PARSERS))
def test_any_text_is_a_value_or_a_named_error(
    text: str, parse: Callable[[str, str], object]
) -> None:
    try:
        parse("field", text)
    except InvalidField as error:
        assert error.field == "field"


@given(st.integers(BYTES_MIN, BYTES_MAX))
def test_plain_numbers_of_bytes_are_exact(value: int) -> None:
    assert parse_bytes("memory", str(value)) == value


@given(st.integers(1, (1 << 43) - 1), st.sampled_from(["M", "MiB", "mb"]))
def test_units_are_powers_of_two(number: int, unit: str) -> None:
    assert parse_bytes("memory", f"{number}{unit}") == number << 20


@given(st.integers(0, 1 << 50))
def test_shown_sizes_are_near(value: int) -> None:
    number, unit = show_bytes(value).split()
    factor = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]
    assert math.isclose(float(number) * factor, value, rel_tol=1e-3, abs_tol=0.5)


def test_shown_times() -> None:
    shown = {
        1500: "1.5 ms",
        35_000: "35 ms",
        1_250_000: "1.25 s",
        125_000_000: "2 min 5 s",
        120_000_000: "2 min",
    }
    assert {usec: show_usec(usec) for usec in shown} == shown


def test_labels_are_sorted_by_their_keys() -> None:
    given = {"user": "Anna \u00d6.", "app.kubernetes.io/name": "a", "team": "w" * 63, "k" * 63: "="}
    assert [*parse_labels("labels", given).items()] == sorted(given.items())
    assert parse_labels("labels", {}) == {}
    assert len(parse_labels("labels", {f"k{n}": "v" for n in range(16)})) == 16


@pytest.mark.parametrize(
    ("labels", "field", "value"),
    [
        ({f"k{n}": "v" for n in range(17)}, "labels", "17 labels"),
        ({"": "v"}, "labels", ""),
        ({"k" * 64: "v"}, "labels", "k" * 64),
        ({"a=b": "v"}, "labels", "a=b"),
        ({"-a": "v"}, "labels", "-a"),
        ({"a-": "v"}, "labels", "a-"),
        ({"t\u00ebam": "v"}, "labels", "t\u00ebam"),
        ({"team": ""}, "labels[team]", ""),
        ({"team": "v" * 64}, "labels[team]", "v" * 64),
        ({"team": "a\nuser=b"}, "labels[team]", "a\nuser=b"),
        ({"team": "\u202ebew"}, "labels[team]", "\u202ebew"),
        ({"team": " web"}, "labels[team]", " web"),
    ],
)
def test_labels_that_cannot_be_are_named(labels: dict[str, str], field: str, value: str) -> None:
    with pytest.raises(InvalidField) as refused:
        parse_labels("labels", labels)
    assert (refused.value.field, refused.value.value) == (field, value)
    assert refused.value.allowed in str(refused.value)
