"""What the laboratory's commands take for a quantity."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from agentcgroup_lab import arguments


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (arguments.size, "2G", 2 << 30),
        (arguments.seconds, "50ms", 0.05),
        (arguments.seconds, "10m", 600.0),
        (arguments.seconds, "30", 30.0),
        (arguments.positive, "0.25", 0.25),
        (arguments.share, "0", 0.0),
        (arguments.count, "100000", 100_000),
        (arguments.window, "30-90", (30.0, 90.0)),
    ],
)
def test_quantities(parse: Callable[[str], Any], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (arguments.size, "much"),
        (arguments.seconds, "0"),
        (arguments.seconds, "5 parsecs"),
        (arguments.seconds, "-1s"),
        (arguments.positive, "0"),
        (arguments.positive, "inf"),
        (arguments.positive, "nan"),
        (arguments.share, "1.01"),
        (arguments.share, "most"),
        (arguments.count, "0"),
        (arguments.count, "1e3"),
        (arguments.window, "90-30"),
        (arguments.window, "30"),
        (arguments.window, "a-b"),
    ],
)
def test_anything_else_is_refused(parse: Callable[[str], Any], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="allowed"):
        parse(text)


@pytest.mark.parametrize(
    ("argv", "chosen"),
    [
        ([], ("a",)),
        (["--w", "b,c"], ("b", "c")),
        (["--w", "b", "--w", "a"], ("b", "a")),
        (["--w", "a", "--w=a,c"], ("a", "c")),
    ],
)
def test_words_with_commas_or_one_by_one(argv: list[str], chosen: tuple[str, ...]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--w", action=arguments.Words, words=("a", "b", "c"), default=("a",))
    assert parser.parse_args(argv).w == chosen


def test_a_word_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--w", action=arguments.Words, words=("a", "b"), default=("a",))
    with pytest.raises(SystemExit):
        parser.parse_args(["--w", "a,x"])
    assert "--w: 'x' cannot be used; allowed is a or b" in capsys.readouterr().err
