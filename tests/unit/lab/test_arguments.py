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
