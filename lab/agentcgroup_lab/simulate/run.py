"""Simulates what a policy does to recorded agents, without a kernel: the same engine and the same
plans as in a replay, thousands of sessions in minutes.

What is assumed, where it comes from, and what it leaves out:

- Use of the pool is the sum of what agents and calls hold, as the plans say (`replay.attribute`). A
  call rises evenly over a recorded step, as a replayed one does, or at `rise_bytes_per_s` from its
  start where that is faster: recordings have one sample a second, finer ones rose by 1.3 GB/s.
- There are cores for everyone; CPU weight, IO and file cache are not simulated.
- A paused call holds what it has and does not go on. Pausing takes no time (measured: 0.85 ms).
- At the pool's limit the kernel kills as mm/oom_kill.c chooses: what holds most, where a call run
  by the daemon has `oom_score_adj` from its priority. An agent that is killed is a lost session.
- Without swap, a throttled call that grows gets 1.1 MB/s (measured: 8 to 10 s for 10 MB above
  `memory.high`). With zram it runs at 0.95 of its speed (measured: 0.43 s against 0.41 s for
  140 MB), and what it takes is counted at 1/ratio.
- zram's own memory counts against the pool, as the guard counts it.
- Reclaim takes what it is asked to, at once, at most 95 % of what does not run. When the agent
  works again (a call begins or ends, or it burns 2 % of a core or more) all but its cold share
  comes back, at 2 ms a MB, during which its session stands. How much of an idle agent is cold is
  not in the recordings: 0.8 is an assumption, and `cold_share` is there to be varied. Of a paused
  call half comes back when it goes on.
- A call whose growth is denied fails at its next growth; its agent goes on, as after a kill.
- No call says what it expects, and none waits in the queue.
- The pool is sampled by the daemon's own schedule, and what ended calls took is remembered by the
  daemon's own code; what a sample costs is assumed (`simulate.guard`).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from agentcgroup_lab.simulate.guard import Sampling, SimulatedGuard
from agentcgroup_lab.simulate.plans import Profile
from agentcgroup_lab.simulate.pool import INFINITY
from agentcgroup_lab.simulate.types import KernelModel, Lane, Strategy
from agentcgroup_lab.simulate.world import World
from agentcgroupd.policy.schema import Policy
from agentcgroupd.units import IMPORTANT_PRIORITY, PRIORITY_WORDS

NORMAL_PRIORITY = PRIORITY_WORDS["normal"]
AGAIN_S = 1.0
"""After a session has ended the next one begins, where sessions repeat."""


@dataclass(frozen=True, slots=True)
class SimulatedSession:
    """A session to simulate once."""

    profile: Profile
    important: bool = False
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings of a simulation.

    With `duration_s` every session is followed by another recording until that time, so that there
    are always as many; without, each runs once, and all until their end.
    """

    pool_bytes: int
    sessions: int
    seed: int = 0
    strategy: Strategy = "ours"
    duration_s: float | None = 600.0
    ramp_s: float = 60.0
    """Sessions begin one after the other within this time; the pool's use counts from then on."""
    spread: float = 1.0
    """Sessions begin at a random point within this part of their recordings."""
    important_share: float = 0.1
    kernel: KernelModel = field(default_factory=KernelModel)
    sampling: Sampling = field(default_factory=Sampling)
    can_deny: bool = False
    until_killed: bool = False
    """End with the first call that is killed."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Times that sessions took over undisturbed."""

    sessions: int
    p50: float
    p95: float
    most: float


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a simulation."""

    strategy: Strategy
    policy: str
    pool_bytes: int
    sessions: int
    seed: int
    seconds: float
    calls_finished: int
    calls_killed: int
    """Calls killed by the policy."""
    calls_oom: int
    """Calls killed by the kernel, or with their agent."""
    calls_denied: int
    """Calls that failed with ENOMEM."""
    sessions_s: float
    """Time of all sessions together, from their beginnings to their ends."""
    sessions_begun: int
    sessions_lost: int
    """Agents killed by the kernel."""
    sessions_hit: int
    """Sessions that were lost, or had at least one call killed."""
    work_lost_s: float
    important: Delay
    everyone: Delay
    call_late_s: dict[str, float]
    """Seconds by which calls ended late: p50, p95, p99, most; with a prefix, those of important
    sessions."""
    use_mean: float
    """Mean share of the pool that was in use."""
    use_p95: float
    paused_share: float
    """Part of all sessions' time in which a call of theirs was paused."""
    actions: dict[str, int]
    samples: int
    """Samples in which the guard asked the engine."""
    kernel_reclaims: int
    took_s: float

    @property
    def calls_survived(self) -> float:
        """Part of all ended calls that nobody killed."""
        survived = self.calls_finished + self.calls_denied
        killed = self.calls_killed + self.calls_oom
        return survived / max(1, survived + killed)

    @property
    def sessions_survived(self) -> float:
        """Part of all sessions in which nothing was killed."""
        return 1.0 - self.sessions_hit / max(1, self.sessions_begun)

    def to_json(self) -> dict[str, Any]:
        """Plain values by name, the derived ones included."""
        derived = {
            "calls_survived": self.calls_survived,
            "sessions_survived": self.sessions_survived,
        }
        return {**asdict(self), **derived}


def reserved(pool_bytes: int, profiles: Sequence[Profile]) -> int:
    """Number of sessions that fit when each one's peak is kept free for it. Which one will reach
    what nobody knows before, so each gets the highest of all."""
    return pool_bytes // max(profile.peak_bytes for profile in profiles)


class _Slots:
    """Which recording comes next, and when."""

    def __init__(self, world: World, profiles: Sequence[Profile], setup: Setup) -> None:
        self._world, self._setup = world, setup
        self._random = random.Random(f"{setup.seed}/slots")
        self._order = list(profiles)
        self._random.shuffle(self._order)
        self._next = 0
        self._queue: list[Lane] = []

    def pick(self) -> Profile:
        """Return the next recording: all once in a random order, then again."""
        profile = self._order[self._next % len(self._order)]
        self._next += 1
        return profile

    def fill(self, lanes: Sequence[Lane], at_once: int) -> None:
        """Begin with `at_once` of them; the rest wait for a place."""
        world, setup = self._world, self._setup
        for index, lane in enumerate(lanes[:at_once]):
            world.at(setup.ramp_s * index / at_once, self._first, lane, 0)
        world.at(setup.ramp_s, world.measure, None, 0)
        self._queue = list(lanes[at_once:])

    def follow(self, lane: Lane) -> None:
        """Begin the next session: on the lane that has waited longest, or on this one again."""
        if self._queue:
            self._queue.append(lane)
            lane.state = "waits"
            lane = self._queue.pop(0)
        self._world.at(self._world.now + AGAIN_S, self._open, lane, 0)

    def _first(self, lane: Lane, _: int) -> None:
        profile = self.pick()
        share = self._random.random() * self._setup.spread
        self._world.open_session(lane, profile, share * profile.duration_s)

    def _open(self, lane: Lane, _: int) -> None:
        self._world.open_session(lane, self.pick())


def simulate(
    policy: Policy,
    profiles: Sequence[Profile],
    setup: Setup,
    progress: Callable[[float], None] = lambda at_s: None,
) -> Result:
    """Run `setup.sessions` sessions of these recordings on one pool. The same arguments give the
    same result, but for `took_s`. `progress` is told the simulated time."""
    world = World(setup.kernel, setup.pool_bytes, setup.strategy, setup.sessions)
    choice = random.Random(f"{setup.seed}/important")
    count = max(1, round(setup.important_share * setup.sessions)) if setup.important_share else 0
    important = set(choice.sample(range(setup.sessions), min(count, setup.sessions)))
    world.lanes = [_lane(index, index in important) for index in range(setup.sessions)]
    slots = _Slots(world, profiles, setup)
    at_once = setup.sessions
    if setup.strategy == "reserve":
        at_once = max(1, min(at_once, reserved(setup.pool_bytes, profiles)))
    guard = _guard(world, policy, setup)
    slots.fill(world.lanes, at_once)
    world.follow = slots.follow
    return _run(world, guard, policy, setup, setup.duration_s or INFINITY, progress)


def simulate_once(
    policy: Policy,
    sessions: Sequence[SimulatedSession],
    setup: Setup,
    progress: Callable[[float], None] = lambda at_s: None,
) -> Result:
    """Run these very sessions, each once and whole, until the last has ended."""
    world = World(setup.kernel, setup.pool_bytes, setup.strategy, len(sessions))
    world.lanes = [_lane(index, one.important) for index, one in enumerate(sessions)]
    guard = _guard(world, policy, setup)

    def begin(lane: Lane, index: int) -> None:
        world.open_session(lane, sessions[index].profile)

    left = len(sessions)

    def follow(lane: Lane) -> None:
        nonlocal left
        left -= 1
        if not left:
            world.finish()

    for index, lane in enumerate(world.lanes):
        world.at(sessions[index].delay_s, begin, lane, index)
    world.follow = follow
    return _run(world, guard, policy, setup, INFINITY, progress)


def _lane(index: int, important: bool) -> Lane:
    priority = IMPORTANT_PRIORITY if important else NORMAL_PRIORITY
    return Lane(f"s{index + 1}", priority, important)


def _guard(world: World, policy: Policy, setup: Setup) -> SimulatedGuard | None:
    if setup.strategy != "ours":
        return None
    return SimulatedGuard(world, policy, setup.sampling, setup.can_deny)


def _run(
    world: World,
    guard: SimulatedGuard | None,
    policy: Policy,
    setup: Setup,
    until_s: float,
    progress: Callable[[float], None],
) -> Result:
    started = time.perf_counter()
    if setup.until_killed:
        world.hit = world.finish
    world.run(until_s, progress)
    took_s = time.perf_counter() - started
    world.settle()
    counts, seconds = world.counts, max(world.now, 1e-9)
    measured_s = max(1e-9, seconds - world.measured_from_s)
    spent_s = sum(lane.spent_s for lane in world.lanes)
    everyone_late = [late_s for _, late_s, _ in world.delays]
    important_late = [late_s for important, late_s, _ in world.delays if important]
    return Result(
        strategy=setup.strategy,
        policy=policy.name,
        pool_bytes=setup.pool_bytes,
        sessions=len(world.lanes),
        seed=setup.seed,
        seconds=seconds,
        calls_finished=counts["finished"],
        calls_killed=counts["killed"],
        calls_oom=counts["oom"],
        calls_denied=counts["denied"],
        sessions_s=spent_s,
        sessions_begun=counts["sessions"],
        sessions_lost=counts["sessions_lost"],
        sessions_hit=counts["sessions_hit"],
        work_lost_s=counts["work_lost_usec"] / 1e6,
        important=_delay([lane for lane in world.lanes if lane.important]),
        everyone=_delay(world.lanes),
        call_late_s=_quantiles("", everyone_late) | _quantiles("important_", important_late),
        use_mean=world.area / measured_s / world.limit,
        use_p95=world.use_quantile(0.95),
        paused_share=counts["paused_usec"] / 1e6 / max(spent_s, 1e-9),
        actions=_actions(counts),
        samples=guard.samples if guard else 0,
        kernel_reclaims=counts["kernel_reclaims"],
        took_s=round(took_s, 3),
    )


def _actions(counts: Mapping[str, int]) -> dict[str, int]:
    """Count of each action that was taken, by its name."""
    taken = {name: count for name, count in sorted(counts.items()) if name.startswith("action_")}
    return {name.removeprefix("action_"): count for name, count in taken.items()}


def _delay(lanes: Sequence[Lane]) -> Delay:
    ratios = sorted(lane.spent_s / lane.done_s for lane in lanes if lane.done_s > 1.0)
    if not ratios:
        return Delay(0, 1.0, 1.0, 1.0)
    p50 = statistics.median(ratios)
    p95 = ratios[min(len(ratios) - 1, int(0.95 * len(ratios)))]
    return Delay(len(ratios), round(p50, 5), round(p95, 5), round(ratios[-1], 5))


_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "most": 1.0}


def _quantiles(prefix: str, values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    last = len(ordered) - 1
    places = {name: min(last, int(share * len(ordered))) for name, share in _QUANTILES.items()}
    return {f"{prefix}{name}": round(ordered[place], 4) for name, place in places.items()}
