"""Calls that hold a file lock for which somebody more important waits."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroupd.guard.lock_holders import READ_USEC, LockHolders
from agentcgroupd.host.locks import Contested, contested, parse_locks
from tests.harness import wait_until

# Lines of Linux 6.18; the last two are of a process in another pid namespace, and of a lease.
LOCKS = """\
1: FLOCK  ADVISORY  WRITE 101 00:2a:17 0 EOF
1: -> FLOCK  ADVISORY  WRITE 102 00:2a:17 0 EOF
1:  -> FLOCK  ADVISORY  WRITE 103 00:2a:17 0 EOF
2: POSIX  ADVISORY  READ  104 00:2a:18 0 EOF
3: OFDLCK ADVISORY  WRITE -1 00:2a:19 0 EOF
3: -> OFDLCK ADVISORY  WRITE -1 00:2a:19 0 EOF
4: FLOCK  ADVISORY  WRITE 0 00:2a:20 0 EOF
4: -> FLOCK  ADVISORY  WRITE 105 00:2a:20 0 EOF
5: LEASE  ACTIVE    WRITE 106 00:2a:21 0 EOF
"""


def test_only_locks_with_somebody_waiting_are_told() -> None:
    assert parse_locks(LOCKS) == [Contested(101, [102, 103])]


@pytest.mark.parametrize("how", ["flock", "lockf"])
def test_the_kernels_own_file(how: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        getattr(fcntl, how)(file, fcntl.LOCK_EX)
        code = f"import fcntl; fcntl.{how}(open({str(path)!r}, 'w'), fcntl.LOCK_EX)"
        with subprocess.Popen([sys.executable, "-c", code]) as waiter:
            mine = Contested(os.getpid(), [waiter.pid])
            wait_until("somebody waits", lambda: mine in contested())
            getattr(fcntl, how)(file, fcntl.LOCK_UN)
        assert mine not in contested()


FORGER = 6


class World:
    """A batch session with a call that holds a lock, an important one, and who is where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.locks: list[Contested] = []
        self.touched: list[str] = []
        self.sessions: dict[str, Any] = {}
        for name, priority in (("batch", 20), ("vip", 80)):
            grant = SimpleNamespace(priority=priority)
            call = SimpleNamespace(
                id=name,
                parent=None,
                grant=grant,
                lent_priority=0,
                frozen_since_usec=None,
                cgroup=SimpleNamespace(path=Path(f"call-{name}")),
            )
            self.sessions[name] = SimpleNamespace(
                cgroup_path=f"/pool/{name}",
                calls={name: call},
                limits=SimpleNamespace(priority=priority),
            )
        places = {
            1: b"/pool/batch/call-batch/deeper",
            2: b"/pool/vip/call-vip",
            3: b"/pool/vip/agent",
            4: b"/pool/batch/agent",
            5: b"/elsewhere",
        }
        # Its cgroup of v1 has a name that a reader of lines as text would take for a line.
        first = {FORGER: b"/x\r0::/pool/vip/agent"}

        def read(path: str) -> bytes:
            number = path.split("/")[2]
            pid = int(number)
            if (place := places.get(pid, b"/elsewhere" if pid == FORGER else None)) is None:
                raise FileNotFoundError
            return b"1:memory:%s\n0::%s\n" % (first.get(pid, b"/x"), place)

        monkeypatch.setattr("agentcgroupd.host.proc.read_whole", read)
        self.now_usec = 0
        self.holders = LockHolders(
            self.sessions, lambda call: self.touched.append(call.id), lambda: self.locks
        )

    def lent(self, *locks: Contested) -> int:
        """What the batch call is lent with these locks."""
        self.locks = list(locks)
        self.now_usec += READ_USEC
        self.holders.update(self.now_usec)
        return int(self.sessions["batch"].calls["batch"].lent_priority)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Nobody holds anything yet."""
    with monkeypatch.context() as patch:
        yield World(patch)


def test_who_holds_up_somebody_more_important_is_lent_that_priority(world: World) -> None:
    assert world.lent() == 0
    assert world.lent(Contested(1, [2])) == 80
    assert world.lent(Contested(1, [3])) == 80, "the agent itself"
    assert world.touched == ["batch"]
    assert world.lent() == 0
    assert world.touched == ["batch"] * 2
    assert world.lent(Contested(1, [4]), Contested(1, [5, 2])) == 80
    world.holders.clear()
    assert world.lent() == 0


@pytest.mark.parametrize("waiters", [[4], [5], [99], [1], [FORGER]])
def test_nobody_gains_by_waiting_for_himself_and_strangers_lend_nothing(
    world: World, waiters: list[int]
) -> None:
    assert world.lent(Contested(1, waiters)) == 0


def test_who_is_paused_itself_lends_nothing(world: World) -> None:
    world.sessions["vip"].calls["vip"].frozen_since_usec = 1
    assert world.lent(Contested(1, [2])) == 0


def test_the_file_is_read_seldom(world: World) -> None:
    assert world.lent(Contested(1, [2])) == 80
    world.locks = []
    world.holders.update(world.now_usec + READ_USEC - 1)
    assert world.sessions["batch"].calls["batch"].lent_priority == 80
