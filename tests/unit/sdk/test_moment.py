"""Points in time, as numbers and as people write them."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from agentcgroup.errors import InvalidIntent
from agentcgroup.moment import moment_usec


def test_a_number_is_seconds_since_1970() -> None:
    assert moment_usec("since", 1.5) == 1_500_000 and moment_usec("since", 0) == 0


@pytest.mark.parametrize(
    ("text", "ago_s"), [("30s", 30), ("10m", 600), ("2h", 7200), ("1d", 86400)]
)
def test_so_long_ago(text: str, ago_s: int) -> None:
    before = time.time()
    found = moment_usec("since", text) / 1e6 + ago_s
    assert before - 0.001 <= found <= time.time() + 0.001


def test_a_date() -> None:
    at = datetime(2026, 1, 31, 12)
    assert moment_usec("since", "2026-01-31T12:00") == int(at.timestamp() * 1e6)


@pytest.mark.parametrize("text", ["", "yesterday", "2", "-1h", "1 h", "9999999999h", "0001-01-01"])
def test_what_is_none_is_named(text: str) -> None:
    with pytest.raises(
        InvalidIntent, match=r"since: .* cannot be used: allowed is 30s, 10m"
    ) as told:
        moment_usec("since", text)
    assert (told.value.field, told.value.value) == ("since", text)
