"""What the demo replays: the recordings, the pool, the scale, and when peaks meet.

Each number follows from the recordings and from what this machine can do, by a rule below. The
contrast is a matter of arithmetic, not of luck: a choice that does not have it is refused.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agentcgroup_lab.replay import engine
from agentcgroup_lab.replay.backends import ReplayError
from agentcgroup_lab.replay.progress import MIB
from agentcgroup_lab.trace import format as trace_format
from agentcgroup_lab.trace import plan
from bench.demo.trim import largest, most_kept, steady, trimmed

SESSIONS = 4
HEADROOM = 1.3
"""The pool over what must fit: below some 6 % of free memory the daemon holds calls back."""
AGENT_LEAST_BYTES = 6_000_000
"""A replayed agent is a Python process, which holds so much by itself."""
CALL_OWN_BYTES = 1_500_000
"""The load itself, and its page tables."""
CLEARLY = 1.1
"""Factor between what has to be larger and what smaller, for a contrast that is certain."""
ALWAYS_FREE = 0.03
"""Part of the pool that the daemon keeps free while the others fill it. Once they hold the rest, a
larger call would wait for the end of one of them, however important it is."""
MORE = 1.04
"""Factor between what is left when the largest call has been killed and the pool: it is held at
the same moment, so little more is enough."""
MEMORY_SHARE = 0.5
"""Share of this machine's free memory that the pool may have."""
TOUCH_SHARE = 0.08
"""Share of the time in which this machine could touch the memory of all calls."""
CPU_SHARE = 0.05
"""Share of this machine's CPUs that all sessions may burn together: only memory is short."""
ARRIVE_SHARE = 0.1
"""Share of the time by which the others are there before the important call is at its peak."""
HOLD_LEAST_S = 0.6
"""Time to see that the others are held back."""
HOLD_SHARE = 1.5
"""How long the important call holds its peak, of the time in which the others fill the pool."""
SCALES = (1.0, 0.75, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12)
"""The least is where the agents' own processes are still small beside the calls."""
LATE_MOST = 12.0
"""How much longer than planned touching memory may take, on a slow machine or a busy one."""
PROBE_BYTES, PROBES = 24 << 20, 3


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of this machine. `touch_bytes_per_s`: of all sessions together, at the same time."""

    touch_bytes_per_s: float
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Plans, the first of them the important session's, the pool, and which calls meet."""

    names: tuple[str, ...]
    plans: tuple[plan.Plan, ...]
    pool_bytes: int

    @property
    def share_bytes(self) -> int:
        """An even part of the pool."""
        return self.pool_bytes // len(self.plans)

    @property
    def peaks(self) -> list[plan.PlannedCall]:
        """The call of each plan that holds most."""
        return [largest(one) for one in self.plans]

    def too_large(self, one: plan.Plan) -> int:
        """Number of calls that an even part of the pool cannot hold, for certain."""
        return sum(
            agent_bytes(one, call.start_s) + call.peak_bytes > self.share_bytes * CLEARLY
            for call in one.calls
        )

    def weakness(self) -> str:
        """Why the strategies would not differ for certain; empty where they do."""
        first, *others = self.peaks
        if any(call.peak_bytes * CLEARLY > first.peak_bytes for call in others):
            return "no recording has a call that is clearly larger than all calls of the others"
        # With the largest call gone, what is left is still too much: a second one is killed.
        agents = sum(
            agent_bytes(one, call.start_s) for one, call in zip(self.plans, self.peaks, strict=True)
        )
        if agents + sum(call.peak_bytes for call in others) < self.pool_bytes * MORE:
            return "the peaks of the others fit into the pool together"
        if not all(self.too_large(one) for one in self.plans):
            return "an even part of the pool holds the largest call of one of them"
        if self.may_lose_an_agent():
            return "the kernel may take an agent where it looks for a second call to kill"
        return ""

    def may_lose_an_agent(self) -> bool:
        """Whether the kernel could kill an agent as the calls rise one after the other.

        It kills what holds most, and may kill the next one, too, before the first has given its
        memory back. So that one has to hold clearly more than any agent.
        """
        agents = [
            agent_bytes(one, call.start_s) for one, call in zip(self.plans, self.peaks, strict=True)
        ]
        held: list[int] = []
        for call in self.peaks:
            room = self.pool_bytes - sum(agents) - sum(held)
            held.append(call.peak_bytes)
            if call.peak_bytes > room:
                at_limit = sorted([*held[:-1], max(0, room)])
                if at_limit[-2] < max(agents) * CLEARLY:
                    return True
                held.remove(max(held))
        return False


def agent_bytes(one: plan.Plan, at_s: float | None = None) -> int:
    """Bytes that an agent holds at a time, or at most."""
    planned = one.agent_peak_bytes if at_s is None else one.agent_bytes_at(at_s)
    return max(planned, AGENT_LEAST_BYTES)


def agent_least_bytes(one: plan.Plan, call: plan.PlannedCall) -> int:
    """Bytes that an agent holds at least while a call of its runs. Its plan goes on while the call
    does, however late that is."""
    levels = [one.agent_bytes_at(call.start_s)]
    levels += [step.memory_bytes for step in one.agent if call.start_s < step.at_s <= call.end_s]
    return max(min(levels), AGENT_LEAST_BYTES)


def measure() -> Speed:
    """Touch memory in as many processes at once as there will be sessions.

    The fastest round counts: a guest's memory is its host's only once it has been touched, and what
    else is done on this machine for a moment says nothing of the next.
    Raises ReplayError where this machine does not even have that little.
    """
    load = engine.find_load()
    seconds = math.inf
    with tempfile.NamedTemporaryFile("w") as schedule:
        schedule.write(f"0 {PROBE_BYTES} 0\n")
        schedule.flush()
        for _ in range(PROBES):
            started = time.monotonic()
            probes = [subprocess.Popen([load, schedule.name]) for _ in range(SESSIONS)]
            statuses = [probe.wait() for probe in probes]
            seconds = min(seconds, time.monotonic() - started)
            if any(statuses):
                raise ReplayError(
                    f"this machine could not touch {mebibytes(SESSIONS * PROBE_BYTES)} ({load} "
                    f"ended with {statuses}): free some memory, or raise the container's limit"
                )
    fields = dict(line.split(":", 1) for line in open("/proc/meminfo", encoding="ascii"))
    free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    return Speed(SESSIONS * PROBE_BYTES / seconds, free_bytes)


def load_recordings(directory: Path) -> dict[str, trace_format.Trace]:
    """Read all recordings of a directory, by name. Raises ReplayError for too few."""
    paths = sorted([*directory.glob("*.jsonl.gz"), *directory.glob("*.jsonl")])
    if len(paths) < SESSIONS:
        raise ReplayError(
            f"{directory} holds {len(paths)} recordings (*.jsonl.gz), {SESSIONS} are needed; "
            "TRACES=dir names another directory"
        )
    return {
        path.name.removesuffix(".gz").removesuffix(".jsonl"): trace_format.read(path)
        for path in paths
    }


def pool_for(plans: Sequence[plan.Plan]) -> int:
    """The smallest pool on which some order of things lets everything finish, with some headroom:
    any one session's largest call, while the agents, which cannot be stopped, stay."""
    agents = sum(agent_bytes(one) for one in plans)
    largest = max(call.peak_bytes for one in plans for call in one.calls)
    return int((agents + largest + CALL_OWN_BYTES) * HEADROOM)


def _choices(
    recordings: Mapping[str, trace_format.Trace], options: plan.Options
) -> Iterator[Choice]:
    plans = {
        name: steady(plan.make_plan(recorded, options)) for name, recorded in recordings.items()
    }
    rises = {
        name: max((call.peak_bytes for call in one.calls), default=0) for name, one in plans.items()
    }
    highest = sorted((name for name in plans if rises[name]), key=lambda name: -rises[name])
    for names in itertools.combinations(highest, SESSIONS):
        whole = tuple(plans[name] for name in names)
        pool_bytes = pool_for(whole)
        room_bytes = pool_bytes - sum(map(agent_bytes, whole)) - CALL_OWN_BYTES * len(whole)
        most = most_kept(whole, room_bytes)
        after_bytes = int(ALWAYS_FREE * pool_bytes)
        chosen = tuple(
            trimmed(one, most_bytes, None if one is not whole[0] else after_bytes)
            for one, most_bytes in zip(whole, most, strict=True)
        )
        yield Choice(names, chosen, pool_bytes)


def choose(recordings: Mapping[str, trace_format.Trace], options: plan.Options) -> Choice:
    """Choose the recordings of whose calls a static split loses most, among those with which the
    contrast is certain. The one with the largest call is the important session: it is the one that
    a kernel without further advice kills first. Raises ReplayError where there are none."""
    choices = list(_choices(recordings, options))
    certain = [choice for choice in choices if not choice.weakness()]
    if not certain:
        why = choices[0].weakness() if choices else "they have no calls"
        raise ReplayError(f"these recordings show no certain contrast: {why}")
    return max(certain, key=lambda choice: sum(map(choice.too_large, choice.plans)))


def shrink(choice: Choice, speed: Speed, plan_s: float) -> float:
    """Choose the factor for memory: what this machine has, and can touch in time; at most 1.
    Raises ReplayError for a machine that is too small."""
    touched = sum(call.peak_bytes for one in choice.plans for call in one.calls)
    by_time = TOUCH_SHARE * plan_s * speed.touch_bytes_per_s / touched
    by_memory = MEMORY_SHARE * speed.free_bytes / choice.pool_bytes
    least = SCALES[-1]
    if by_memory < least or by_time < least / LATE_MOST:
        raise ReplayError(
            f"this machine is too small: it touches {mebibytes(speed.touch_bytes_per_s)} a second "
            f"and has {mebibytes(speed.free_bytes)} free, and the pool would have "
            f"{mebibytes(choice.pool_bytes * least)}"
        )
    # A round number reads better; rounding down keeps both limits.
    return next((scale for scale in SCALES if scale <= min(by_time, by_memory)), least)


def peak_at_s(call: plan.PlannedCall) -> float:
    """The time in the plan at which a call has reached its peak."""
    peak = max(range(len(call.steps)), key=lambda at: call.steps[at].memory_bytes)
    return call.start_s + sum(step.duration_ms for step in call.steps[: peak + 1]) / 1000.0


def full_after_s(choice: Choice) -> float:
    """Seconds from when the first of the others rises to when all together hold more than the
    pool."""
    first, *others = choice.peaks
    held_bytes = first.peak_bytes + sum(
        agent_bytes(one, call.start_s) for one, call in zip(choice.plans, choice.peaks, strict=True)
    )
    at_ms = 0
    for call in others:
        level_bytes = 0
        for step in call.steps:
            at_ms += step.duration_ms
            held_bytes += max(0, step.memory_bytes - level_bytes)
            level_bytes = max(level_bytes, step.memory_bytes)
            if held_bytes > choice.pool_bytes:
                return at_ms / 1000.0
            if level_bytes == call.peak_bytes:
                break
    raise ReplayError("the peaks fit into the pool together")


def meet(choice: Choice, plan_s: float) -> tuple[engine.Meeting, list[float]]:
    """Make the meeting of the largest calls, and the times at which the sessions start: the others
    are there before the important session's call is at its peak, so that it waits for nobody."""
    first, *others = choice.peaks
    calls = {f"s{number}": call.index for number, call in enumerate(choice.peaks, 1)}
    hold_s = HOLD_LEAST_S + HOLD_SHARE * full_after_s(choice)
    at_s = peak_at_s(first) - ARRIVE_SHARE * plan_s
    starts_s = [0.0, *(at_s - call.start_s for call in others)]
    earliest_s = min(starts_s)
    return engine.Meeting("s1", calls, hold_s), [start_s - earliest_s for start_s in starts_s]


def mebibytes(n_bytes: float) -> str:
    """A size as it is printed."""
    return f"{n_bytes / MIB:.0f} MiB"


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that is replayed, and the rules that made it so, in words."""

    specs: list[engine.SessionSpec]
    pool_bytes: int
    how: engine.EngineOptions
    speed: float
    rules: dict[str, str]

    def how_alone(self) -> engine.EngineOptions:
        """Options for the important session without the others; it starts when it does beside
        them."""
        assert self.how.meeting is not None
        return replace(self.how, meeting=self.how.meeting.alone())


def prepare(directory: Path, plan_s: float, sample_s: float) -> Prepared:
    """Turn recordings into sessions that take about `plan_s` seconds, and a pool. `sample_s`:
    between two samples of it. Raises ReplayError, TraceError."""
    recordings = load_recordings(directory)
    speed = measure()
    cpu_max_pct = 100.0 * (os.cpu_count() or 1) * CPU_SHARE / SESSIONS
    options = plan.Options(cpu_max_pct=cpu_max_pct)
    as_recorded = choose(recordings, options)
    longest_s = max(one.duration_s for one in as_recorded.plans)
    options = replace(
        options,
        speed=max(1.0, longest_s / plan_s),
        memory_scale=shrink(as_recorded, speed, plan_s),
    )
    choice = choose(recordings, options)
    meeting, delays_s = meet(choice, plan_s)
    specs = [
        engine.SessionSpec(f"s{number}", name, one, important=number == 1, delay_s=delay_s)
        for number, (name, one, delay_s) in enumerate(
            zip(choice.names, choice.plans, delays_s, strict=True), 1
        )
    ]
    how = engine.EngineOptions(
        sample_period_s=sample_s,
        memory_scale=options.memory_scale,
        meeting=meeting,
        timeout_s=max(30.0, 8 * plan_s),
    )
    return Prepared(specs, choice.pool_bytes, how, options.speed, _rules(choice, speed, options))


def _rules(choice: Choice, speed: Speed, options: plan.Options) -> dict[str, str]:
    """Say in plain words what was chosen, and why."""
    sessions = [
        f"{name} ({len(one.calls)} calls up to {mebibytes(peak.peak_bytes)}, "
        f"agent {mebibytes(agent_bytes(one))})"
        for name, one, peak in zip(choice.names, choice.plans, choice.peaks, strict=True)
    ]
    together = sum(map(agent_bytes, choice.plans)) + sum(c.peak_bytes for c in choice.peaks)
    return {
        "machine": f"touches {mebibytes(speed.touch_bytes_per_s)}/s in {SESSIONS} processes "
        f"together, has {mebibytes(speed.free_bytes)} free",
        "scale": f"memory x{options.memory_scale:g}, {options.speed:.3g} times as fast as recorded",
        "sessions": ", ".join(sessions),
        "pool": f"{mebibytes(choice.pool_bytes)}: the largest call fits beside all agents, with "
        f"{HEADROOM - 1:.0%} to spare; an even part is {mebibytes(choice.share_bytes)}",
        "meeting": f"the largest call of each session waits for the others' at its peak: "
        f"{mebibytes(together)} are wanted at once",
    }
