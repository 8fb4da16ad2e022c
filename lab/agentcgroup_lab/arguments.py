"""Arguments of the laboratory's commands: quantities as the daemon's configuration takes them,
numbers within bounds, and lists of words. Each function is a `type` for argparse and raises its
ArgumentTypeError."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from agentcgroupd.errors import InvalidField
from agentcgroupd.units import parse_bytes, parse_duration


class Words(argparse.Action):
    """A word or several of some: with commas, or by giving the option again; each once.

    words: what is allowed.
    """

    def __init__(self, *args: Any, words: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **{"metavar": "LIST", **kwargs})
        self.words = words

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add to what was given before."""
        for word in values.split(","):
            if word not in self.words:
                allowed = " or ".join(self.words)
                parser.error(f"{option_string}: {word!r} cannot be used; allowed is {allowed}")
        before = getattr(namespace, self.dest)
        given = () if before is self.default else before
        setattr(namespace, self.dest, tuple(dict.fromkeys((*given, *values.split(",")))))


def size(text: str) -> int:
    """Bytes from a size such as 512M."""
    try:
        return parse_bytes("size", text)
    except InvalidField as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seconds(text: str) -> float:
    """Seconds from a time such as 50ms, 30s or 10m."""
    try:
        return parse_duration("time", text) / 1e6
    except InvalidField as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def number(text: str) -> float:
    """A number; NaN, which is within no bounds, for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def positive(text: str) -> float:
    """A number above 0."""
    value = number(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number above 0")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a share from 0 to 1")
    return value


def count(text: str) -> int:
    """A whole number from 1 to 100,000."""
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number from 1 to 100000")
    return int(text)


def window(text: str) -> tuple[float, float]:
    """The seconds between two recorded times, as 30-90."""
    start, _, end = text.partition("-")
    start_s, end_s = number(start), number(end)
    if not 0.0 <= start_s < end_s:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: START-END in seconds, as 30-90")
    return start_s, end_s
