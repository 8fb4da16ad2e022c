"""The simulator's kernel: recorded sessions in one memory pool, advanced from event to event.

Sessions follow their plans as `replay.driver` does: plan time stands while a call that the agent
waits for is late, and a call that ends early brings forward what follows. What is assumed of the
kernel is in `simulate`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from agentcgroup_lab.simulate.plans import CallProfile, Profile, Segment
from agentcgroup_lab.simulate.pool import INFINITY, SimulatedPool
from agentcgroup_lab.simulate.types import KernelModel, Lane, SimulatedCall, Strategy
from agentcgroupd.enforce.limits import AGENT_OOM_SCORE_ADJ, oom_score_adj
from agentcgroupd.policy.learning import Peaks

EPSILON_S = 1e-6


class World(SimulatedPool):
    """The pool with all its sessions."""

    def __init__(
        self, kernel: KernelModel, limit_bytes: int, strategy: Strategy, lanes: int
    ) -> None:
        super().__init__(kernel, limit_bytes)
        self.strategy = strategy
        self.share = self.limit / max(1, lanes)
        """Bytes of one session under a static split."""
        self.calls: dict[SimulatedCall, None] = {}
        self.lanes: list[Lane] = []
        self.peaks = Peaks()
        """Peaks of ended calls, as the daemon remembers them."""
        self.delays: list[tuple[bool, float, float]] = []
        """Finished calls: whether it was important, seconds late, seconds paused."""
        self.call_ended: Callable[[], None] = lambda: None
        self.call_began: Callable[[], None] = lambda: None
        self.follow: Callable[[Lane], None] = lambda lane: None
        """Called with a lane whose session is over."""
        self.hit: Callable[[], None] = lambda: None
        """Called when a call is killed."""
        self._ids = count(1)

    def settle(self) -> None:
        """Count, at the end, what sessions and pauses had so far."""
        for call in self.calls:
            if call.frozen_at_s is not None:
                self.counts["paused_usec"] += int((self.now - call.frozen_at_s) * 1e6)
        for lane in self.lanes:
            if lane.state == "runs":
                self._move(lane)
                lane.spent_s += self.now - lane.begun_s
                self.counts["sessions_hit"] += lane.hit

    def set_pace(self, call: SimulatedCall) -> None:
        """Set a call's speed, and when it is done, after anything that changes how it goes on."""
        self.sync(call)
        self.slope -= self.slope_of(call)
        rate = call.segment.rate
        call.capped = False
        if call.frozen_at_s is not None:
            call.speed = 0.0
        elif call.throttled_bytes is None or rate <= 0.0:
            call.speed = 1.0
        elif self.kernel.zram_ratio and self.swap_free > 0.0:
            call.speed, call.capped = self.kernel.zram_speed, True
        else:
            call.speed = min(1.0, self.kernel.throttled_bytes_per_s / rate)
        self.slope += self.slope_of(call)
        call.version += 1
        call.view = None
        if call.speed > 0.0:
            self.at(self.now + max(0.0, call.left_s) / call.speed, self._step, call, call.version)

    def _step(self, call: SimulatedCall, version: int) -> None:
        """The call's next segment, or its end."""
        if call.version != version:
            return
        self.sync(call)
        if call.position + 1 == len(call.profile.segments):
            self.end_call(call, "finished")
            return
        self._enter(call, call.position + 1)

    def _enter(self, call: SimulatedCall, position: int) -> None:
        self.slope -= self.slope_of(call)
        call.position = position
        segment = call.segment = call.profile.segments[position]
        call.speed = 0.0
        call.left_s = segment.duration_s
        self.resize(call, segment.start_bytes)
        if segment.rate > 0.0 and call.denied_bytes is not None:
            self.end_call(call, "denied")  # a MemoryError, which ends it in its own way
            return
        if self.strategy == "static" and self._over_share(call, segment):
            return
        self.set_pace(call)

    def _over_share(self, call: SimulatedCall, segment: Segment) -> bool:
        """Return whether the call has died of a static split: its session reached its own limit."""
        lane = call.lane
        held = lane.agent_bytes + sum(c.held_bytes for c in lane.calls)
        if held + segment.rate * segment.duration_s <= self.share:
            return False
        self._kernel_kills([*lane.calls], [lane])
        return call not in lane.calls

    def start_call(self, lane: Lane, planned: CallProfile, skip_s: float = 0.0) -> None:
        """Begin a call, at `skip_s` of its plan."""
        first = planned.segments[0]
        name = f"{lane.id}.{next(self._ids)}"
        call = SimulatedCall(name, lane, planned, self.now, first, first.duration_s, self.now)
        self.calls[call] = None
        lane.calls.add(call)
        lane.active_s = self.now
        if not planned.background:
            lane.open[call] = planned.end_s
        position = 0
        while skip_s > 0.0 and position + 1 < len(planned.segments):
            duration_s = planned.segments[position].duration_s
            if skip_s < duration_s:
                break
            skip_s -= duration_s
            position += 1
        self._enter(call, position)
        if call.lane.calls and call in lane.calls and skip_s > 0.0:
            call.left_s = max(0.0, call.left_s - skip_s)
            self.usage += call.segment.rate * skip_s
            call.held_bytes += call.segment.rate * skip_s
            self.set_pace(call)
        self.call_began()

    def end_call(self, call: SimulatedCall, how: str) -> None:
        """End a call: all that it held is free. `how`: the count that it adds to."""
        self.sync(call)
        lane = call.lane
        if call.frozen_at_s is not None:
            call.paused_s += self.now - call.frozen_at_s
        self.slope -= self.slope_of(call)
        call.speed = 0.0
        call.version += 1
        self.resize(call, 0.0)
        self.peaks.add(round(call.peak_bytes))
        del self.calls[call]
        lane.calls.discard(call)
        self.counts[how] += 1
        planned = call.profile
        if how == "finished":
            late_s = self.now - call.began_s - planned.duration_s
            self.delays.append((lane.important, late_s, call.paused_s))
        elif how in ("killed", "oom"):
            lane.hit = True
            self.hit()
            self.counts["work_lost_usec"] += int(call.cpu_s * 1e6)
        self.counts["paused_usec"] += int(call.paused_s * 1e6)
        if lane.state == "runs":
            self._after_call(lane, call)
        self.call_ended()

    def _after_call(self, lane: Lane, call: SimulatedCall) -> None:
        self._move(lane)
        lane.active_s = self.now
        end_s = lane.open.pop(call, None)
        if end_s is not None:
            lane.last_end_s = max(lane.last_end_s, end_s)
            if not lane.open:
                lane.at_s = max(lane.at_s, min(lane.last_end_s, self._next_start_s(lane)))
        self.wake(lane)
        self._plan_next(lane)

    def open_session(self, lane: Lane, profile: Profile, phase_s: float = 0.0) -> None:
        """Begin a recording at a point of its time."""
        lane.profile, lane.state = profile, "runs"
        lane.at_s, lane.since_s, lane.begun_s = phase_s, self.now, self.now
        lane.last_end_s = 0.0
        lane.next_call = lane.next_step = 0
        lane.agent_swapped = 0.0
        lane.hit = False
        lane.active_s = self.now
        lane.reclaimed_s = None
        self.counts["sessions"] += 1
        self._agent_steps(lane)
        while lane.next_call < len(profile.calls):
            planned = profile.calls[lane.next_call]
            if planned.start_s >= phase_s:
                break
            lane.next_call += 1
            if planned.end_s > phase_s and lane.state == "runs":
                self.start_call(lane, planned, phase_s - planned.start_s)
        if lane.state == "runs":
            self._plan_next(lane)

    def close_session(self, lane: Lane, how: str) -> None:
        """End a session. `how`: `ended`, or `lost` with all its calls."""
        self._move(lane)
        lane.state = "over"
        lane.version += 1
        if how == "lost":
            lane.hit = True
            for call in [*lane.calls]:
                self.end_call(call, "oom")
        self.counts["sessions_" + how] += 1
        self.counts["sessions_hit"] += lane.hit
        self.agent_holds(lane, 0.0)
        lane.open.clear()
        lane.spent_s += self.now - lane.begun_s
        self.follow(lane)

    def _move(self, lane: Lane) -> None:
        """Move plan time on to now, or to where a call that still runs should have ended."""
        passed = self.now - lane.since_s
        if passed > 0.0:
            before_s = lane.at_s
            at_s = before_s + passed
            for end_s in lane.open.values():
                if end_s < at_s:
                    at_s = end_s
            if at_s > before_s:
                lane.done_s += at_s - before_s
                lane.at_s = at_s
            lane.since_s = self.now

    @staticmethod
    def _next_start_s(lane: Lane) -> float:
        profile = lane.profile
        assert profile is not None
        if lane.next_call < len(profile.calls):
            return profile.calls[lane.next_call].start_s
        return profile.duration_s

    def _plan_next(self, lane: Lane) -> None:
        """Set the time at which its plan is next due, if no call holds it up."""
        profile = lane.profile
        assert profile is not None
        lane.version += 1
        due_s = self._next_start_s(lane)
        if lane.next_step < len(profile.agent):
            due_s = min(due_s, profile.agent[lane.next_step].at_s)
        if lane.next_call >= len(profile.calls) and due_s >= profile.duration_s and lane.calls:
            return  # the end of a call is awaited
        for end_s in lane.open.values():
            if end_s < due_s:
                return
        wait_s = max(0.0, due_s - lane.at_s)
        self.at(max(lane.since_s, self.now) + wait_s, self._lane_due, lane, lane.version)

    def _lane_due(self, lane: Lane, version: int) -> None:
        if lane.version != version:
            return
        self._move(lane)
        profile = lane.profile
        assert profile is not None
        self._agent_steps(lane)
        while lane.next_call < len(profile.calls):
            planned = profile.calls[lane.next_call]
            if planned.start_s > lane.at_s + EPSILON_S:
                break
            lane.next_call += 1
            self.wake(lane)
            self.start_call(lane, planned)
            if lane.state != "runs":
                return
        if lane.at_s + EPSILON_S >= profile.duration_s and not lane.calls:
            self.close_session(lane, "ended")
            return
        self._plan_next(lane)

    def _agent_steps(self, lane: Lane) -> None:
        profile = lane.profile
        assert profile is not None
        held = None
        while lane.next_step < len(profile.agent):
            step = profile.agent[lane.next_step]
            if step.at_s > lane.at_s + EPSILON_S:
                break
            held = step.memory_bytes
            lane.agent_pct = step.cpu_pct
            lane.next_step += 1
        if held is not None:
            if lane.agent_pct >= self.kernel.agent_works_pct:
                self.wake(lane)
            if lane.agent_pct >= self.quiet_pct:
                lane.active_s = self.now
            self.agent_holds(lane, float(held))
            if self.strategy == "static" and held > self.share:
                self._kernel_kills([*lane.calls], [lane])

    def go_on(self, call: SimulatedCall) -> None:
        """Let a paused call run again once what it touches is back."""
        back = call.swapped_bytes * (1.0 - self.kernel.call_cold_share)
        call.swapped_bytes -= back
        self.swapped -= back
        self.usage += back * (1.0 - self.kept)
        self.at(self.now + back * self.kernel.page_in_s_per_byte, self._resume, call, call.version)

    def _resume(self, call: SimulatedCall, version: int) -> None:
        if call.version == version and call.frozen_at_s is not None and call in self.calls:
            call.paused_s += self.now - call.frozen_at_s
            call.frozen_at_s = None
            call.resumed_at_s = self.now
            self.set_pace(call)

    def relieve(self) -> None:
        """Act as the kernel at the pool's limit: reclaim what is cold if possible, else kill."""
        self.usage = max(self.usage, self.limit)
        if self.kernel.zram_ratio:
            wanted = 0.01 * self.limit
            idle = [lane for lane in self.lanes if lane.state == "runs" and not lane.calls]
            freed = 0.0
            for lane in sorted(idle, key=lambda lane: lane.active_s):
                freed += self.reclaim_agent(lane, INFINITY) * (1.0 - self.kept)
                if freed >= wanted:
                    break
            if freed > 0.0 and self.usage < self.limit:
                self.counts["kernel_reclaims"] += 1
                return
        while self.usage >= self.limit:
            if not self._kernel_kills([*self.calls], self.lanes):
                return

    def _kernel_kills(self, calls: list[SimulatedCall], lanes: list[Lane]) -> bool:
        """Kill as oom_badness() of mm/oom_kill.c chooses: by what a task holds, and by its
        adjustment in thousandths of the limit, which calls and agents of the daemon have. Returns
        whether there was anything to kill."""
        for call in calls:
            self.sync(call)
        ours = self.strategy == "ours"

        def badness(call: SimulatedCall) -> tuple[float, str]:
            adjust = oom_score_adj(call.lane.priority) - AGENT_OOM_SCORE_ADJ if ours else 0
            return call.resident_bytes + adjust / 1000 * self.limit, call.id

        alive = [lane for lane in lanes if lane.state == "runs"]
        victim = max(calls, key=badness, default=None)
        agent = max(alive, key=lambda x: (x.agent_resident, x.id), default=None)
        if victim is not None and (agent is None or badness(victim)[0] >= agent.agent_resident):
            self.end_call(victim, "oom")
        elif agent is not None:
            self.close_session(agent, "lost")
        else:
            return False
        return True
