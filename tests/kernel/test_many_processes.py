"""The end of a call of many processes keeps the loop only for moments."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.enforce import kill, outside
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Call
from tests.harness import wait_until

pytestmark = pytest.mark.full_speed

COUNT = 600
"""Processes: more than are signalled at a time."""
FORKS = f"import os, signal\nfor _ in range({COUNT - 1}):\n    os.fork() or signal.pause()"


@pytest.fixture
def top() -> Iterator[Cgroup]:
    """A cgroup of our own, removed with all below it."""
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    root.close()
    held = Cgroup.open(made.path)
    yield held
    held.kill_and_remove()
    held.close()


def a_call(cgroup: Cgroup, main: Process | None = None) -> Call:
    """What is needed of a call whose cgroup that is."""
    mount = str(cgroup2_mount())
    above = cgroup.path.parent
    session = SimpleNamespace(
        cgroup=SimpleNamespace(path=above), cgroup_path=str(above).removeprefix(mount) or "/"
    )
    call = SimpleNamespace(
        id="x", cgroup=cgroup, timers={}, main=main, outsiders=[], session=session
    )
    return cast(Call, call)


@pytest.fixture
def many(top: Cgroup) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has started many others in that cgroup."""
    code = "import sys\nsys.stdin.read(1)\n" + FORKS + "\nsignal.pause()"
    main = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE)
    top.attach(main.pid)
    assert main.stdin is not None
    main.stdin.write(b"x")
    main.stdin.flush()
    wait_until("all are there", lambda: len(top.procs()) >= COUNT, 20)
    yield main
    top.kill()
    main.wait()
    main.stdin.close()


async def signalled(call: Call) -> int:
    """How often the loop went round until all had been signalled."""
    kill._signal_all(call, signal.SIGTERM)
    rounds = 0
    while kill.SIGNALS_TIMER in call.timers:
        rounds += 1
        await asyncio.sleep(0.001)
    return rounds


@pytest.mark.usefixtures("many")
def test_many_processes_are_signalled_while_the_loop_goes_round(
    top: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill, "SIGNALS_S", 0.0001)
    assert asyncio.run(signalled(a_call(top))) >= 2
    wait_until("all have ended", lambda: not top.populated(), 20)


def test_processes_elsewhere_are_looked_for_among_many(
    top: Cgroup, many: subprocess.Popen[bytes]
) -> None:
    call = a_call(top, Process.of_pidfd(many.pid, os.pidfd_open(many.pid)))
    assert call.main is not None
    gone = top.procs()[-1]
    root = Cgroup.open(cgroup2_mount())
    try:
        root.attach(gone)
        outside.find_outsiders(call, top.all_procs(), 30.0)
        assert [process.pid for process in call.outsiders] == [gone]
        call.outsiders[0].close()
        call.outsiders.clear()
        began = time.perf_counter()
        outside.find_outsiders(call, [], 0.0)
        assert not call.outsiders and time.perf_counter() - began < 1
    finally:
        top.attach(gone)
        call.main.close()
        root.close()


@pytest.mark.parametrize("has_children", [True, False])
def test_the_search_ends_in_time(
    top: Cgroup, monkeypatch: pytest.MonkeyPatch, has_children: bool
) -> None:
    """Also where processes, or threads without any, are started faster than they are looked at."""
    looked = 0

    def children(pid: int) -> Iterator[list[int]]:
        nonlocal looked
        while True:
            looked += 1
            time.sleep(0.002)
            yield [os.getpid()] if has_children else []

    monkeypatch.setattr(outside, "children_of", children)
    call = a_call(top, Process.of_pidfd(os.getpid(), os.pidfd_open(os.getpid())))
    assert call.main is not None
    outside.find_outsiders(call, [os.getpid()])
    call.main.close()
    assert 1 <= looked <= outside.SEARCH_S / 0.002 + 1
