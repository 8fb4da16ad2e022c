"""The pool's limit beside what the pool has in zram."""

from __future__ import annotations

from typing import Any

import pytest

from agentcgroupd.cgroup import knobs
from agentcgroupd.guard import host_reader
from agentcgroupd.guard.host_reader import HOST_USEC, SLACK_BYTES, ZRAM_USEC, HostReader
from agentcgroupd.policy.snapshot import Host

MIB = 1 << 20
BUDGET = 1000 * MIB


class Pool:
    """A pool whose limit is noted, with so much in zram."""

    memory_max_bytes = BUDGET

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cgroup: Any = self
        self.used, self.zram, self.looked = 100 * MIB, 0, 0
        self.limits: list[int] = []
        monkeypatch.setattr(host_reader, "read_host", lambda programs, pool: programs)
        monkeypatch.setattr(host_reader, "zram_used_bytes", self._zram)
        pool: Any = self
        self.reader = HostReader(pool, Host)
        self.now_usec = HOST_USEC

    def _zram(self, pool: object) -> int:
        self.looked += 1
        return self.zram

    def read(self, knob: object) -> int:
        assert knob is knobs.MEMORY_CURRENT
        return self.used

    def write(self, knob: object, value: int, wait: bool) -> None:
        assert knob is knobs.MEMORY_MAX and not wait
        self.limits.append(value)

    def look(self, after_usec: int = ZRAM_USEC) -> list[int]:
        """What has been written to the limit after a while."""
        self.now_usec += after_usec
        self.reader(self.now_usec)
        written, self.limits = self.limits, []
        return written


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """With nothing in zram."""
    return Pool(monkeypatch)


def test_the_limit_falls_by_what_zram_takes_and_rises_again(pool: Pool) -> None:
    assert pool.look() == []
    pool.zram = 200 * MIB
    assert pool.look(HOST_USEC) == [800 * MIB]
    assert pool.reader.zram_bytes == 200 * MIB
    pool.zram = 300 * MIB
    assert pool.look() == [700 * MIB], "soon, now that there is some"
    pool.zram += MIB
    assert pool.look() == [], "not for so little"
    pool.zram = 100 * MIB
    assert pool.look() == [900 * MIB]
    pool.zram = MIB
    assert pool.look() == [999 * MIB]
    pool.zram = 0
    assert pool.look() == [BUDGET]


def test_the_limit_never_falls_to_what_is_in_use(pool: Pool) -> None:
    pool.used, pool.zram = 900 * MIB, 300 * MIB
    assert pool.look(HOST_USEC) == [900 * MIB + SLACK_BYTES]
    pool.used = 600 * MIB
    assert pool.look() == [700 * MIB]


def test_without_zram_it_is_looked_at_seldom(pool: Pool) -> None:
    for _ in range(10):
        pool.look()
    assert pool.looked == 1
