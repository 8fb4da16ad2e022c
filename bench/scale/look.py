"""What a look at many open calls costs the guard, and what it then decides.

The sampler, the engine and the program in the kernel are the daemon's own; cgroups are real ones,
without processes. Where the kernel has no memory controller for them, what growing calls hold is
written into the program's mapped memory by the benchmark: the walk and all that follows is real,
reading a page counter is not.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import look as bpf_look
from agentcgroupd.bpf.look import LookProgram
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.guard.look import KernelLook, Seen
from agentcgroupd.guard.sampler import Sampler
from agentcgroupd.intents.grant import Grant
from agentcgroupd.policy.engine import decide, kill_free_bytes
from agentcgroupd.policy.load import load_policy
from agentcgroupd.policy.snapshot import TICK, Host, SessionView, State
from agentcgroupd.state.session import Call, boottime_usec
from agentcgroupd.units import CgroupId

LIMIT_BYTES = 64 << 30
MIB = 1 << 20
GRANT = Grant(
    memory_expected_bytes=0,
    memory_high_bytes=None,
    memory_max_bytes=None,
    cpu_weight=100,
    cpu_max_millicores=None,
    pids_max=None,
    timeout_usec=None,
    priority=50,
    on_pressure="freeze",
)


class _Host:
    """A host on which calls have credit."""

    zram_bytes = 0

    def __call__(self, now_usec: int) -> Host:
        return Host(can_hold=True)


class _Pool:
    """A pool that is two thirds full."""

    def __init__(self, id: int) -> None:
        self.id = id
        self.used = LIMIT_BYTES * 2 // 3

    def read(self, knob: knobs.Knob[Any]) -> Any:
        return {"inactive_file": 0} if knob is knobs.MEMORY_STAT else self.used

    def read_if(self, knob: knobs.Knob[Any]) -> None:
        """Have no pressure."""


@contextmanager
def cgroups(sessions: int, calls: int) -> Iterator[tuple[Cgroup, list[Cgroup]]]:
    """Make cgroups of sessions with calls below one; removed in the end."""
    root = Cgroup.open(cgroup2_mount())
    top = root.make_child(f"agentcg-scale-{secrets.token_hex(4)}")
    made: list[Cgroup] = []
    try:
        above = [top.make_child(f"s{number}") for number in range(sessions)]
        made = [above[number % sessions].make_child(f"c{number}") for number in range(calls)]
        yield top, made
    finally:
        top.kill_and_remove(120)
        root.close()


@dataclass(slots=True)
class Took:
    """Milliseconds of each look, and of each decision."""

    look_ms: list[float]
    decide_ms: list[float]


class _Look(KernelLook):
    """Keeps the slots of all calls."""

    def __init__(self, program: LookProgram, root: CgroupId) -> None:
        super().__init__(program, lambda: root)
        self.slots: list[int] = []

    def opened(self, seen: Seen) -> None:
        super().opened(seen)
        assert seen.slot is not None
        self.slots.append(seen.slot)


class Watched:
    """A sampler over open calls."""

    def __init__(self, program: LookProgram, top: Cgroup, leaves: list[Cgroup], views: int) -> None:
        """`views`: sessions that are shown."""
        self._program = program
        self._policy = load_policy(Path("default")).policy
        pool: Any = SimpleNamespace(cgroup=_Pool(top.id), memory_max_bytes=LIMIT_BYTES)
        self._used = pool.cgroup.used
        opened: dict[str, Call] = {}
        known: Any = SimpleNamespace(open=opened)
        shown = tuple(SessionView(f"s{n}", 50, 200 * MIB, 190 * MIB) for n in range(views))
        look = _Look(program, top.id)
        peaks = tuple(n * 10 * MIB for n in range(500))
        self._sampler = Sampler(pool, known, lambda now: shown, _Host(), lambda: peaks, tuple, look)
        least = kill_free_bytes(self._policy, LIMIT_BYTES)
        self._sampler.cpu_below_bytes = lambda: least
        for number, leaf in enumerate(leaves):
            call = opened[str(number)] = _call(str(number), leaf)
            self._sampler.call_opened(call)
        self._calls = list(opened.values())
        self._slots = look.slots

    def measure(self, growing: int, rounds: int) -> Took:
        """Look and decide, while so many calls grow by 1 MiB between two looks."""
        state, took = State(), Took([], [])
        chosen = self._slots[:: max(1, len(self._slots) // growing)][:growing] if growing else []
        for call in self._calls[:: max(1, len(self._calls) // max(1, growing))][:growing]:
            self._sampler.touch(call)
        for _ in range(rounds + 3):
            for slot in chosen:
                entry = self._program.entries[slot]
                entry.before_bytes, entry.usage_bytes = entry.usage_bytes, entry.usage_bytes + MIB
            time.sleep(0.005)
            began = time.perf_counter()
            snapshot = self._sampler.sample(self._used)
            looked = time.perf_counter()
            state = decide(self._policy, snapshot, TICK, state).state
            ended = time.perf_counter()
            took.look_ms.append((looked - began) * 1e3)
            took.decide_ms.append((ended - looked) * 1e3)
        return Took(took.look_ms[3:], took.decide_ms[3:])


def _call(name: str, leaf: Cgroup) -> Call:
    session: Any = SimpleNamespace(id="s")
    now = boottime_usec()
    return Call(
        id=name,
        session=session,
        name="tool",
        argv=(),
        grant=GRANT,
        cgroup=leaf,
        began_unix_usec=0,
        began_boot_usec=now,
        held=False,
        entered=True,
        state=pb.CALL_STATE_RUNNING,
    )


def measure(sessions: int, calls: int, growing: tuple[int, ...], rounds: int) -> dict[int, Took]:
    """Look and decide with so many open calls, for each number of growing ones. Raises BpfError
    where the kernel takes no such program."""
    program, (state,) = bpf_look.load()
    if program is None:
        raise SystemExit(f"no look at all calls here: {state.reason}")
    try:
        with cgroups(sessions, calls) as (top, leaves):
            watched = Watched(program, top, leaves, sessions)
            return {count: watched.measure(count, rounds) for count in growing}
    finally:
        program.close()
