"""Every target for a short time, from its corpus and from nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
FRAGMENTS = tuple(
    line.encode().decode("unicode_escape").encode("latin-1")
    for line in (CORPUS / "fragments.txt").read_text().split("\n")
    if line
)
"""Pieces of what is written where the targets read."""
INPUTS = st.one_of(
    st.binary(max_size=2000),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=20)), max_size=30).map(
        b"".join
    ),
)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=INPUTS)
def test_what_others_wrote_is_read_or_refused(name: str, data: bytes) -> None:
    TARGETS[name](data)


@pytest.mark.parametrize(
    "text",
    [
        b"a=" + b"[" * 500 + b"]" * 500,
        b"a=" + b"{a=" * 500 + b"1" + b"}" * 500,
        b".".join([b"a"] * 20_000) + b"=1",
        b"[" + b".".join([b"a"] * 20_000) + b"]",
        b"x = 1" + b"0" * 5000,
        b"\xff\xfe",
        b"a" * (2 << 20),
        b'[pool]\nmemory_max = "' + b"9" * 4000 + b'T"',
    ],
)
def test_configurations_that_nobody_writes(text: bytes) -> None:
    TARGETS["config"](text)
    TARGETS["policy"](text)


@pytest.mark.parametrize(
    "text",
    [
        b'{"schema":' + b"[" * 5000,
        b'{"schema":"agentcg-trace/1","duration_s":1' + b"0" * 400 + b"}",
        b'{"t":NaN}',
        b"\x1f\x8b\x08\x00\x00",
    ],
)
def test_recordings_that_nobody_makes(text: bytes) -> None:
    TARGETS["trace"](text)
