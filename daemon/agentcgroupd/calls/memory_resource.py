"""Memory of the pool, as a resource that calls wait for.

Calls that say what they expect share what is free; policy.queue decides who starts. A call that
says nothing never waits, and neither does the agent's own leaf.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from agentcgroupd.errors import KnobError, ResourceExhausted
from agentcgroupd.policy.queue import (
    Waiting,
    admit,
    estimate_usec,
    free_for_admission_bytes,
    in_order,
    is_small,
)
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import CallView, Snapshot
from agentcgroupd.state.candidate import Candidate, Wait
from agentcgroupd.state.session import boottime_usec
from agentcgroupd.units import show_bytes, show_usec

log = logging.getLogger(__name__)

FRESH_USEC = 20_000
"""A snapshot may be this old: five hundred calls that come at once take one."""
FREED_WINDOW_USEC = 60_000_000
"""How fast memory comes back is judged by the calls that ended in this time."""


class MemoryResource:
    """What the pool has free for calls that begin. Implements calls.queue.Resource."""

    name = "memory"

    def __init__(self, policy: Callable[[], Policy], snapshot: Callable[[], Snapshot]) -> None:
        """`policy`: the one in force. `snapshot` reads the pool now; it may raise KnobError, and
        then nobody waits."""
        self._policy = policy
        self._snapshot = snapshot
        self._retry: Callable[[], None] = lambda: None
        self._starting: dict[str, CallView] = {}
        """Calls that may start but are in no snapshot yet, by id."""
        self._latest: Snapshot | None = None
        self._freed: deque[tuple[int, int]] = deque()
        """(usec, bytes) of calls that ended."""
        self._turns: dict[str, int] = {}
        """By session: when a call of it that had waited was last let in, or it was last seen to
        hold a call that it does not use."""

    def on_freed(self, retry: Callable[[], None]) -> None:
        """Take what is to be called after each snapshot."""
        self._retry = retry

    def sampled(self, now: Snapshot) -> None:
        """Take a snapshot of the guard's: whoever fits now starts."""
        self._latest = now
        self._starting.clear()
        sessions = {session.id for session in now.sessions}
        for gone in self._turns.keys() - sessions:
            del self._turns[gone]
        for call in now.calls:
            if call.is_unused and call.expected_bytes:
                self._turns[call.session_id] = now.now_usec
        self._retry()

    def call_ended(self, held_bytes: int) -> None:
        """Note that a call has given this much back."""
        now = boottime_usec()
        self._freed.append((now, held_bytes))
        while self._freed and now - self._freed[0][0] > FREED_WINDOW_USEC:
            self._freed.popleft()

    def _fresh(self) -> Snapshot | None:
        """A snapshot that is new enough; None where the pool cannot be read."""
        if self._latest is None or boottime_usec() - self._latest.now_usec > FRESH_USEC:
            self._starting.clear()
            try:
                self._latest = self._snapshot()
            except KnobError as error:
                log.error("the pool cannot be read, so nobody waits for memory: %s", error)
                self._latest = None
        return self._latest

    def _with_starting(self, now: Snapshot) -> Snapshot:
        return replace(now, calls=(*now.calls, *self._starting.values()))

    def _room_bytes(self) -> int:
        """What calls that begin now may be expected to take, as far as it is known; below 0 where
        more is promised than there is."""
        if self._latest is None:
            return 0
        return free_for_admission_bytes(self._policy(), self._with_starting(self._latest))

    def _free_bytes(self) -> int:
        return max(0, self._room_bytes())

    # Resource

    def needed_by(self, candidate: Candidate) -> bool:
        """Tell whether a call expects so much that it may have to wait."""
        policy, expected = self._policy(), candidate.likely_bytes
        if not policy.admission.enabled or expected <= 0:
            return False
        now = self._fresh()
        return now is not None and not is_small(policy, expected, now.limit_bytes)

    def wait_of(self, candidate: Candidate, now_usec: int) -> Wait:
        """Let a call wait as long as its intent says, or else the policy."""
        patience = candidate.grant.wait_usec
        refused_late = patience is not None
        if patience is None:
            patience = self._policy().admission.wait
        return Wait(candidate, now_usec, now_usec + patience, refused_late)

    def waiting_max(self) -> int:
        """How many calls may wait at a time, by the policy."""
        return self._policy().admission.waiting_max

    def waiting_share(self) -> float:
        """What part of the places that others leave one session may have, by the policy."""
        return self._policy().admission.waiting_share

    def let_in(self, waiting: Sequence[Wait]) -> dict[str, None]:
        """Choose the calls that may start now. Until the next snapshot shows them, what they
        expect counts as taken; beyond that nothing is kept for them."""
        now = self._latest
        if now is None:
            return {}
        by_id = {wait.id: wait.candidate for wait in waiting}
        order = [_as_waiting(wait) for wait in waiting]
        waited = {wait.id for wait in waiting if wait.since_usec < now.now_usec}
        started = admit(self._policy(), self._with_starting(now), order, self._turns)
        for call_id in started:
            if call_id in waited:
                self._turns[by_id[call_id].session.id] = now.now_usec
            self._starting[call_id] = _as_view(by_id[call_id], now.now_usec)
        return dict.fromkeys(started)

    def in_order(self, waiting: Iterable[Wait]) -> list[Wait]:
        """Sort calls by priority and age, the next to start first."""
        by_id = {wait.id: wait for wait in waiting}
        asking = list(map(_as_waiting, by_id.values()))
        order = in_order(self._policy(), boottime_usec(), asking, self._turns)
        return [by_id[w.id] for w in order]

    def outlook(self, ahead: Sequence[Wait]) -> dict[str, int]:
        """Say what is expected, what is free, and when the last of these calls may start, judged
        by how fast memory has come back lately; the latter is left out where none has."""
        found = {
            "expected_bytes": ahead[-1].candidate.likely_bytes,
            "room_bytes": self._free_bytes(),
        }
        bytes_per_s = 0.0
        if self._freed:
            passed = max(1_000_000, boottime_usec() - self._freed[0][0])
            bytes_per_s = sum(freed for _, freed in self._freed) * 1e6 / passed
        needed = sum(wait.candidate.likely_bytes for wait in ahead)
        estimate = estimate_usec(needed, self._room_bytes(), bytes_per_s)
        if estimate is not None:
            found["estimate_usec"] = estimate
        return found

    def asked(self, candidate: Candidate) -> dict[str, int]:
        """Say what a call expects, for the audit log."""
        return {"expected_bytes": candidate.likely_bytes}

    def shortage(self, candidate: Candidate) -> str:
        """Say what a call expects and what is there, in words."""
        expected, free = show_bytes(candidate.likely_bytes), show_bytes(self._free_bytes())
        return f"memory: it expects {expected}, {free} are there"

    def refusal(self, candidate: Candidate, waited_usec: int = 0) -> ResourceExhausted:
        """Make the error for a call that is not let in, or no longer waits."""
        expected = show_bytes(candidate.likely_bytes)
        allowed = f"at most {show_bytes(self._free_bytes())} at this moment"
        sentence = (
            f"memory: {expected} for {candidate.request.name!r} is not there ({allowed}); try "
            "again later, say how long it may wait, or expect less"
        )
        if not waited_usec:
            return ResourceExhausted(sentence, "memory", expected, allowed)
        waited = show_usec(waited_usec)
        return ResourceExhausted(f"{sentence} (after {waited} of waiting)", "wait", waited)


def _as_waiting(wait: Wait) -> Waiting:
    candidate = wait.candidate
    return Waiting(
        candidate.id,
        candidate.session.id,
        candidate.grant.priority,
        candidate.likely_bytes,
        wait.since_usec,
        wait.deadline_usec,
    )


def _as_view(candidate: Candidate, now_usec: int) -> CallView:
    """What the next snapshot will show of a call that starts now: it has taken nothing yet."""
    return CallView(
        id=candidate.id,
        name=candidate.request.name,
        session_id=candidate.session.id,
        priority=candidate.grant.priority,
        began_usec=now_usec,
        memory_bytes=0,
        growth_bytes_per_s=0.0,
        cpu_usec=0,
        expected_bytes=candidate.likely_bytes,
    )
