"""Recorded agents on a made-up clock, under the real guard: mixes of the benchmark `isolation`, on
the machine that is modelled in `herd_model`.

A run of some seconds takes a few, so that a change of the guard can be tried on many mixes. What is
left out: CPU time, what it takes to start a process, and all of the kernel but memory.high, the
freezer and the limit, at which the largest call is killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentcgroup_lab.replay.engine import SessionSpec
from agentcgroup_lab.trace.plan import Plan, PlannedCall, Step
from agentcgroupd.policy.load import load_policy
from agentcgroupd.policy.scale import scaled
from agentcgroupd.state.session import Call
from agentcgroupd.units import IMPORTANT_PRIORITY, PRIORITY_WORDS
from bench.isolation.mixes import Mix
from tests.unit.guard.herd_model import (
    BASE_BYTES,
    CORE_BYTES_PER_S,
    STEP_S,
    Machine,
    ModelCgroup,
    stopped_by_policy,
)
from tests.unit.guard.test_loop import run_in_made_up_time

AGENT_LEAST_BYTES = 4_000_000
TIMES_LONGEST = 10.0
"""A mix has this many times its longest session to end."""


@dataclass(slots=True, eq=False)
class PlannedCgroup(ModelCgroup):
    """A call's cgroup in which its plan is followed: growth is even over a step, a fall at once."""

    steps: Sequence[Step] = ()
    at: int = -1
    left_s: float = 0.0

    def follow(self, steps: Sequence[Step]) -> None:
        """Begin with the plan's first step."""
        self.steps, self.began_s = steps, 0.0
        self._next()

    @property
    def _wanted(self) -> float:
        return float(max(self.steps[self.at].memory_bytes, BASE_BYTES))

    def _next(self) -> None:
        self.at += 1
        if self.at == len(self.steps):
            return
        self.left_s = self.steps[self.at].duration_ms / 1000.0
        self.used = min(self.used, self._wanted)
        self.bytes_per_s = (self._wanted - self.used) / max(self.left_s, STEP_S)

    def step(self, now_s: float, room: float) -> None:
        """Go on for a moment, unless it sleeps, is held, or is done."""
        if self.frozen or now_s < self.asleep_until_s or self.full_s is not None:
            return
        self.left_s -= STEP_S
        if self.used < self._wanted:
            self.goal_bytes = int(self._wanted)
            ModelCgroup.step(self, now_s, room)
            self.full_s = None  # the plan's end counts, not that of a step
        if self.left_s <= STEP_S / 2 and self.used >= self._wanted - 1:
            self._next()
            if self.at == len(self.steps):
                self.full_s = now_s


@dataclass(eq=False)
class Session:
    """A recorded session: plan time stands while a call that the agent waits for is late."""

    spec: SessionSpec
    at_s: float = 0.0
    begun: int = 0
    open: dict[int, float] = field(default_factory=dict)
    last_end_s: float = 0.0
    running: int = 0
    killed: int = 0
    ended_s: float | None = None

    def __post_init__(self) -> None:
        self.at_s = -self.spec.delay_s

    @property
    def plan(self) -> Plan:
        """Give the session's plan."""
        return self.spec.plan

    @property
    def agent_bytes(self) -> int:
        """Give what its agent holds."""
        if self.ended_s is not None:
            return 0
        return max(AGENT_LEAST_BYTES, self.plan.agent_bytes_at(max(0.0, self.at_s)))

    def due(self, now_s: float) -> list[PlannedCall]:
        """Move plan time on by a step; returns the calls that begin."""
        if self.ended_s is not None:
            return []
        self.at_s = max(self.at_s, min([self.at_s + STEP_S, *self.open.values()]))
        calls = []
        while self.begun < len(self.plan.calls):
            call = self.plan.calls[self.begun]
            if call.start_s > self.at_s:
                break
            self.begun += 1
            self.running += 1
            calls.append(call)
            if not call.background:
                self.open[call.index] = call.end_s
        if self.at_s >= self.plan.duration_s and not self.running:
            self.ended_s = now_s
        return calls

    def over(self, call: PlannedCall, killed: bool) -> None:
        """Note the end of a call: what follows comes earlier where it was killed."""
        self.running -= 1
        self.killed += killed
        if call.background:
            return
        self.last_end_s = max(self.last_end_s, self.open.pop(call.index))
        if not self.open:
            more = self.begun < len(self.plan.calls)
            next_s = self.plan.calls[self.begun].start_s if more else self.plan.duration_s
            self.at_s = max(self.at_s, min(self.last_end_s, next_s))


@dataclass(eq=False)
class RecordedMachine(Machine):
    """A pool with sessions."""

    sessions: list[Session] = field(default_factory=list)
    of_call: dict[str, tuple[Session, PlannedCall]] = field(default_factory=dict)

    def used(self) -> float:
        """Give what calls and agents hold."""
        return super().used() + sum(session.agent_bytes for session in self.sessions)

    def step(self) -> None:
        """Let all go on for a moment."""
        now_s = self.loop.time()
        for session in self.sessions:
            for planned in session.due(now_s):
                self._start(session, planned)
        for call in list(self.calls.values()):
            self.of(call).step(now_s, CORE_BYTES_PER_S * STEP_S)
        while self.used() > self.limit_bytes and self.calls:
            self.limit_hit += 1
            self._finish(max(self.calls.values(), key=lambda call: self.of(call).used), True)
        for call in list(self.calls.values()):
            if stopped_by_policy(call):
                self._finish(call, True)
            elif self.of(call).full_s is not None and not self.of(call).frozen:
                self._finish(call, False)

    def _start(self, session: Session, planned: PlannedCall) -> None:
        important = session.spec.important
        call = self.begin(
            f"{session.spec.id}.{planned.index}",
            planned.peak_bytes,
            0.0,
            priority=IMPORTANT_PRIORITY if important else PRIORITY_WORDS["normal"],
            cgroup_type=PlannedCgroup,
        )
        cgroup: Any = call.cgroup
        cgroup.follow(planned.steps)
        self.of_call[call.id] = session, planned

    def _finish(self, call: Call, killed: bool) -> None:
        session, planned = self.of_call.pop(call.id)
        self.end(call)
        session.over(planned, killed)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mix."""

    calls: int
    killed: int
    makespan: float
    """Time of all, of the time before which no order of things ends (bench.isolation.bound)."""
    important_ratio: float
    """The time of the important session, of its time alone."""


def replay(mix: Mix, ratio: float, directory: Path, cpus: int = 16) -> Outcome:
    """Run a mix on a pool that it exceeds by this ratio."""
    policy = scaled(load_policy(None).policy, min(1.0, mix.options.memory_scale))

    async def run() -> Outcome:
        machine = RecordedMachine(policy, mix.pool_bytes(ratio), directory)
        machine.sessions = [Session(spec) for spec in mix.specs()]
        began_s = machine.loop.time()
        until_s = began_s + TIMES_LONGEST * max(s.plan.duration_s for s in machine.sessions)
        while any(s.ended_s is None for s in machine.sessions) and machine.loop.time() < until_s:
            machine.step()
            await asyncio.sleep(STEP_S)
        machine.guard.stop()
        ends = [until_s if s.ended_s is None else s.ended_s for s in machine.sessions]
        first = machine.sessions[0]
        return Outcome(
            sum(len(session.plan.calls) for session in machine.sessions),
            sum(session.killed for session in machine.sessions),
            (max(ends) - began_s) / mix.bound_s(ratio, cpus),
            (ends[0] - began_s - first.spec.delay_s) / first.plan.duration_s,
        )

    return run_in_made_up_time(run())
