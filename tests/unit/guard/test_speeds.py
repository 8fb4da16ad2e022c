"""How fast calls grow, as far as looks at them tell."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroupd.guard import ledgers
from agentcgroupd.guard.ledgers import KNOWN_USEC, Ledger
from agentcgroupd.state.session import Call

MIB = 1 << 20
LOOK_USEC = 10_000


class Looked:
    """A call that is looked at every 10 ms."""

    def __init__(self) -> None:
        found: Any = SimpleNamespace(
            id="c",
            name="c",
            session=SimpleNamespace(id="s"),
            priority=50,
            began_boot_usec=0,
            likely_bytes=0,
            frozen_since_usec=None,
            grant=SimpleNamespace(memory_expected_bytes=0, memory_max_bytes=None),
        )
        self.call: Call = found
        self.ledger = Ledger(self.call, bound=1 << 40, priority=50)
        self.now_usec, self.held = 1_000_000, 0.0

    def run(self, seconds: float, mib_per_s: float) -> None:
        for _ in range(round(seconds * 1e6 / LOOK_USEC)):
            self.now_usec += LOOK_USEC
            self.held += mib_per_s * MIB * LOOK_USEC / 1e6
            self.ledger.grew(int(self.held), self.now_usec)
            self.ledger.seen = int(self.held)

    @property
    def mib_per_s(self) -> float:
        return self.ledger.view(self.now_usec).growth_bytes_per_s / MIB


@pytest.fixture(autouse=True)
def never_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "frozen_usec", lambda call, now: 0)


def test_a_call_is_fast_until_its_speed_has_been_seen() -> None:
    looked = Looked()
    looked.run(0.1, 30)
    assert looked.mib_per_s == math.inf
    looked.run(0.2, 30)
    assert looked.mib_per_s == pytest.approx(30, rel=0.05)


def test_one_that_stops_to_grow_may_begin_again() -> None:
    looked = Looked()
    looked.run(0.5, 200)
    looked.run(1.0, 0)
    assert looked.mib_per_s == pytest.approx(100, rel=0.05)


def test_what_it_does_at_its_bound_is_not_its_speed() -> None:
    """The kernel lets a batch of pages through for each sleep there."""
    looked = Looked()
    looked.run(0.5, 200)
    looked.ledger.bound = looked.ledger.seen
    looked.run(5.0, 1.3)
    assert looked.mib_per_s == pytest.approx(200, rel=0.05)


def test_pauses_and_rests_tell_nothing() -> None:
    looked = Looked()
    looked.run(0.05, 0)
    for _ in range(5):
        looked.now_usec += 10_000_000
        looked.run(0.01, 0)
    assert looked.mib_per_s == math.inf
    looked.call.frozen_since_usec = looked.now_usec
    looked.run(2 * KNOWN_USEC / 1e6, 0)
    assert looked.mib_per_s == math.inf
