"""Sessions as the policy sees them, kept up to date a few at a time.

What a session uses changes slowly against how often the guard asks, and reading its five small
files costs some 30 to 50 microseconds. So each update samples only those whose sample is oldest, as
many as fit into its share of time; the views of the others are made from what was seen before, or
left as they are where nothing was done to the session: of 1,000 sessions a quarter has its turn.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.errors import KnobError
from agentcgroupd.policy.snapshot import SessionView
from agentcgroupd.state.session import Session

SAMPLE_USEC = 200_000
"""A session is not sampled again sooner."""
REFAULTS_USEC = 1_000_000
"""memory.stat is dearer: the kernel gathers its per-CPU counters for it."""
SAMPLING_NS_MOST = 2_000_000
"""Time that one update spends on sampling..."""
SAMPLING_SHARE = 0.05
"""...and that all updates together spend, as a part of one core."""
VIEWS_IN_TURN = 250
"""Views of sessions that nothing was done to are made anew so many at a time."""
QUIET_SHARE = 0.05
"""An agent that uses less of one core than this waits."""


def _value(text: str, key: str) -> int:
    at = text.index(key) + len(key)
    return int(text[at : text.index("\n", at)])


def parse_usage(text: str) -> int:
    """usage_usec of cpu.stat."""
    return _value(text, "usage_usec ")


def parse_refaults(text: str) -> int:
    """Pages of anonymous and of file memory, together, that memory.stat counts as refaulted."""
    return _value(text, "workingset_refault_anon ") + _value(text, "workingset_refault_file ")


def parse_stalled(text: str) -> int:
    """The total of the line `some` of a PSI file, in usec."""
    return _value(text, " total=")


# Only what is needed of these files: parsing all of it would cost more than reading it.
_CPU_USAGE = Knob("cpu.stat", parse_usage)
_REFAULTS = Knob("memory.stat", parse_refaults)
_STALLED = Knob("memory.pressure", parse_stalled)


@dataclass(slots=True)
class Sample:
    """What was last seen of one session. Times in usec since boot."""

    at_usec: int
    memory_bytes: int
    agent_bytes: int
    cpu_usec: int
    stalled_usec: int
    refaults: int
    refaults_at_usec: int
    calls_begun: int
    in_call: bool
    quiet_since_usec: int | None = None
    stalled_share: float = 0.0
    refaults_per_s: float = 0.0


class SessionSampler:
    """Keeps a sample of each open session. `views` notices by itself which ones came and went."""

    def __init__(
        self,
        sessions: Callable[[], Iterable[Session]],
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """`clock_ns` measures what sampling costs."""
        self._sessions = sessions
        self._clock_ns = clock_ns
        self._samples: OrderedDict[str, Sample] = OrderedDict()
        """The oldest first."""
        self._updated_usec: int | None = None
        self._made: dict[str, tuple[SessionView, Sample, bool, int | None, int]] = {}
        """Views, each with what it was made from."""
        self._turn = 0

    def views(self, now_usec: int) -> tuple[SessionView, ...]:
        """Take the samples that are due, and show all sessions that have been sampled at least
        once. `now_usec`: CLOCK_BOOTTIME."""
        sessions = {s.id: s for s in self._sessions() if not s.closing}
        for gone in self._samples.keys() - sessions.keys():
            del self._samples[gone]
        self._sample(sessions, now_usec)
        if len(self._made) > len(self._samples):
            self._made = {id: made for id, made in self._made.items() if id in self._samples}
        turn, self._turn = self._turn, (self._turn + VIEWS_IN_TURN) % max(1, len(sessions))
        views = []
        for number, (id, session) in enumerate(sessions.items()):
            sample = self._samples.get(id)
            if sample is not None:
                is_its_turn = (number - turn) % len(sessions) < VIEWS_IN_TURN
                views.append(self._view(session, sample, now_usec, is_its_turn))
        return tuple(views)

    def _view(self, session: Session, sample: Sample, now: int, is_its_turn: bool) -> SessionView:
        """Show a session as it was seen before, unless that has changed or it is its turn."""
        made = self._made.get(session.id)
        done, begun = session.reclaimed_at_usec, _begun(session)
        if made is not None and not is_its_turn and made[1] is sample:
            if made[2] == session.slowed and made[3] == done and made[4] == begun:
                return made[0]
        view = _view(session, sample, now)
        self._made[session.id] = view, sample, session.slowed, done, begun
        return view

    def _sample(self, sessions: dict[str, Session], now_usec: int) -> None:
        if self._updated_usec is None:
            budget_ns = SAMPLING_NS_MOST
        else:
            since_ns = (now_usec - self._updated_usec) * 1000
            budget_ns = min(SAMPLING_NS_MOST, int(since_ns * SAMPLING_SHARE))
        self._updated_usec = now_usec
        new = [id for id in sessions if id not in self._samples]
        due = [
            id for id, sample in self._samples.items() if now_usec - sample.at_usec >= SAMPLE_USEC
        ]
        end_ns = self._clock_ns() + budget_ns
        # At least one, so that on however slow a machine every session is sampled in the end.
        for id in (*new, *due):
            try:
                self._samples[id] = _sampled(sessions[id], self._samples.get(id), now_usec)
                self._samples.move_to_end(id)
            except KnobError:
                self._samples.pop(id, None)  # it is being closed
            if self._clock_ns() >= end_ns:
                break


def _begun(session: Session) -> int:
    return session.calls_ended + len(session.calls)


def _sampled(session: Session, before: Sample | None, now: int) -> Sample:
    """Raises KnobError."""
    agent, own = session.agent, session.cgroup
    psi = _STALLED.file in session.offered
    sample = Sample(
        at_usec=now,
        memory_bytes=own.read(knobs.MEMORY_CURRENT),
        agent_bytes=agent.read(knobs.MEMORY_CURRENT),
        cpu_usec=agent.read(_CPU_USAGE),
        stalled_usec=own.read_if(_STALLED) or 0 if psi else 0,
        refaults=0 if before is None else before.refaults,
        refaults_at_usec=now if before is None else before.refaults_at_usec,
        calls_begun=_begun(session),
        in_call=bool(session.calls),
    )
    if before is None:
        sample.refaults = own.read(_REFAULTS)
        return sample
    passed = max(1, now - before.at_usec)
    sample.stalled_share = min(1.0, max(0, sample.stalled_usec - before.stalled_usec) / passed)
    sample.refaults_per_s = before.refaults_per_s
    if now - before.refaults_at_usec >= REFAULTS_USEC:
        sample.refaults, sample.refaults_at_usec = own.read(_REFAULTS), now
        more = max(0, sample.refaults - before.refaults)
        sample.refaults_per_s = more * 1e6 / (now - before.refaults_at_usec)
    busy = (sample.cpu_usec - before.cpu_usec) / passed >= QUIET_SHARE
    called = sample.in_call or before.in_call or sample.calls_begun != before.calls_begun
    if not busy and not called:
        since = before.quiet_since_usec
        sample.quiet_since_usec = before.at_usec if since is None else since
    return sample


def _view(session: Session, sample: Sample, now: int) -> SessionView:
    quiet = sample.quiet_since_usec
    if quiet is not None and _begun(session) != sample.calls_begun:
        quiet = None  # a call began since it was sampled
    reclaimed = session.reclaimed_at_usec
    return SessionView(
        id=session.id,
        priority=session.limits.priority,
        memory_bytes=sample.memory_bytes,
        agent_bytes=sample.agent_bytes,
        guarantee_bytes=session.limits.memory_low_bytes or 0,
        waiting_usec=0 if quiet is None else now - quiet,
        refaults_per_s=sample.refaults_per_s,
        stalled_share=sample.stalled_share,
        sampled_usec=sample.at_usec,
        slowed=session.slowed,
        reclaimed_usec=None if reclaimed is None else now - reclaimed,
    )
