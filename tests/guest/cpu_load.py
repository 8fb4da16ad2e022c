"""Cgroups with the cpu controller and processes that use CPU in them, for tests and benchmarks of
the scheduler. Everything is forked from the caller: in the guest an exec takes 50 ms."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from agentcgroupd.bpf.sched import SchedSettings
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount

SCHED_EXT = 7
"""include/uapi/linux/sched.h"""
SETTINGS = SchedSettings(
    slice_usec=4000, wait_max_usec=10_000_000, boost_lead_usec=20_000, penalty_most=8
)
"""Settings of the scheduler in tests."""


def spin() -> None:
    """For ever."""
    while True:
        pass


class Load:
    """A cgroup of its own below the root, with what is made and started in it; all of it is gone at
    the end."""

    def __init__(self, policy: int = SCHED_EXT, controllers: str = "+cpu +memory") -> None:
        """`policy`: of what is started."""
        self._policy, self._controllers = policy, controllers
        mount = cgroup2_mount()
        (mount / "cgroup.subtree_control").write_text("+cpu +memory")
        self.root = mount / f"agentcg-test-{secrets.token_hex(4)}"
        self.root.mkdir()
        self._pids: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        cgroup = Cgroup.open(self.root)
        cgroup.kill_and_remove(20)
        cgroup.close()
        for pid in self._pids:
            os.waitpid(pid, 0)

    def make(self, name: str, weight: int = 100, cpu_max: str = "max") -> Path:
        """A cgroup, with those above it."""
        path = self.root / name
        for above in reversed([p for p in path.parents if p.is_relative_to(self.root)]):
            above.mkdir(exist_ok=True)
            (above / "cgroup.subtree_control").write_text(self._controllers)
        path.mkdir(exist_ok=True)
        self.write(name, "cpu.weight", weight)
        if cpu_max != "max":
            self.write(name, "cpu.max", cpu_max)
        return path

    def write(self, name: str, file: str, value: object) -> None:
        """Write an interface file."""
        (self.root / name / file).write_text(str(value))

    def id(self, name: str) -> int:
        """Id of a cgroup."""
        return (self.root / name).stat().st_ino

    def start(self, name: str, run: Callable[[], None] = spin, policy: int | None = None) -> int:
        """A process in a cgroup; returns its pid."""
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                wanted = self._policy if policy is None else policy
                os.sched_setscheduler(0, wanted, os.sched_param(0))
                self.write(name, "cgroup.procs", os.getpid())
                run()
            finally:
                os._exit(0)
        self._pids.append(pid)
        return pid

    def wait(self, pid: int) -> int:
        """Until a process has ended; its wait status."""
        self._pids.remove(pid)
        return os.waitpid(pid, 0)[1]

    def usage_usec(self, name: str) -> int:
        """CPU time of a cgroup and all below it."""
        text = (self.root / name / "cpu.stat").read_text(encoding="ascii")
        return int(text.split()[1])

    def used_usec(self, names: Mapping[str, object] | list[str], seconds: float) -> dict[str, int]:
        """CPU time of each in the next `seconds`."""
        before = {name: self.usage_usec(name) for name in names}
        time.sleep(seconds)
        return {name: self.usage_usec(name) - before[name] for name in names}


def settled(
    load: Load,
    names: list[str],
    is_right: Callable[[dict[str, int], float], bool],
    least_s: float = 1.0,
    most_s: float = 10.0,
) -> dict[str, int]:
    """CPU time of each since now, as soon as it is right, or after `most_s`: on a busy machine an
    emulated CPU stands still now and then, and a short time shows that more than the scheduler.
    What is wrong for good does not become right by waiting."""
    before = {name: load.usage_usec(name) for name in names}
    began = time.monotonic()
    while True:
        time.sleep(least_s)
        took = time.monotonic() - began
        used = {name: load.usage_usec(name) - before[name] for name in names}
        if is_right(used, took) or took > most_s:
            return used


def shares(used: Mapping[str, int]) -> dict[str, float]:
    """Share of each load, in percent of all."""
    total = sum(used.values())
    return {name: 100 * value / total for name, value in used.items()}
