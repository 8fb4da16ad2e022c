"""The queue for room: calls that were asked for and have not begun.

Who may start is decided by policy.queue; this keeps the queue, tells agents their place, and wakes
them. A call that waits has no cgroup and no process; if its caller goes away, it is gone. The
agent's own leaf never waits, and neither does a call that says nothing of its memory.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import FailedPrecondition, KnobError, ResourceExhausted
from agentcgroupd.intents.grant import Grant
from agentcgroupd.intents.parse import cut_argv
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
from agentcgroupd.state.session import Call, Session, boottime_usec, unix_usec
from agentcgroupd.telemetry.wire import grant_to_proto
from agentcgroupd.units import show_bytes, show_usec

log = logging.getLogger(__name__)

FRESH_USEC = 20_000
"""A snapshot may be this old: five hundred calls that come at once look once."""
FREED_WINDOW_USEC = 60_000_000
"""How fast room comes back is judged by the calls that ended in this time."""


@dataclass(slots=True, eq=False)
class Asked:
    """A call that waits."""

    session: Session
    name: str
    argv: tuple[str, ...]
    grant: Grant
    waiting: Waiting
    refuse: bool
    """At the deadline, which its intent named; else it starts then."""
    asked_unix_usec: int
    turn: asyncio.Future[None] = field(repr=False)

    @property
    def id(self) -> str:
        """Of the call that it will be."""
        return self.waiting.id

    @property
    def waits_usec(self) -> int:
        """At most, from when it was asked for."""
        return self.waiting.deadline_usec - self.waiting.since_usec


class Queue:
    """All that wait. Runs on the event loop."""

    def __init__(
        self,
        policy: Callable[[], Policy],
        look: Callable[[], Snapshot],
        actions: Actions,
    ) -> None:
        """`look` makes a snapshot; it may raise KnobError, and then nobody waits."""
        self._policy = policy
        self._look = look
        self._actions = actions
        self._loop = asyncio.get_running_loop()
        self._asked: dict[str, Asked] = {}
        self._starting: dict[str, CallView] = {}
        """May start, but are in no snapshot yet."""
        self._latest: Snapshot | None = None
        self._freed: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        return len(self._asked)

    def count(self, session: Session) -> int:
        """How many of one session wait."""
        return len(self.of(session)) if self._asked else 0

    def of(self, session: Session) -> list[Asked]:
        """Those of one session."""
        return [a for a in self._asked.values() if a.session is session]

    # Asking

    def ask(
        self,
        session: Session,
        name: str,
        argv: list[str],
        grant: Grant,
        expected_bytes: int,
        call_id: str = "",
    ) -> Asked | None:
        """A place in the queue for a call that has been granted, or None: it may begin at once.
        Raises ResourceExhausted when too many wait, or this one may not."""
        admission = self._policy().admission
        if not admission.enabled or expected_bytes <= 0:
            return None
        now = self._fresh()
        if now is None or is_small(self._policy(), expected_bytes, now.limit_bytes):
            return None
        usec = boottime_usec()
        wait = admission.wait if grant.wait_usec is None else grant.wait_usec
        waiting = Waiting(call_id or secrets.token_hex(6), session.id, grant.priority,
                          expected_bytes, usec, usec + wait)  # fmt: skip
        asked = Asked(session, name, cut_argv(argv), grant, waiting, grant.wait_usec is not None,
                      unix_usec(), self._loop.create_future())  # fmt: skip
        self._asked[asked.id] = asked
        self._start(now)
        del self._asked[asked.id]
        if asked.turn.done():
            return None
        if wait == 0:
            raise ResourceExhausted(self._refusal(asked, now), "memory", show_bytes(expected_bytes),
                                    self._allowed(now))  # fmt: skip
        if len(self._asked) >= admission.waiting_max:
            raise ResourceExhausted(
                f"calls: {len(self._asked)} calls wait for memory already, which is all that may; "
                "try again later, or expect less memory", "memory", show_bytes(expected_bytes),
                self._allowed(now),
            )  # fmt: skip
        self._asked[asked.id] = asked
        return asked

    def _allowed(self, now: Snapshot) -> str:
        room = max(0, free_for_admission_bytes(self._policy(), self._with_starting(now)))
        return f"at most {show_bytes(room)} at this moment"

    def _refusal(self, asked: Asked, now: Snapshot) -> str:
        return (
            f"memory: {show_bytes(asked.waiting.expected_bytes)} for {asked.name!r} is not there "
            f"({self._allowed(now)}); try again later, say how long it may wait, or expect less"
        )

    async def wait(self, asked: Asked) -> None:
        """Until it is its turn, or its time is over and it starts all the same. Raises
        ResourceExhausted where its intent said how long it waits, FailedPrecondition when its
        session is closed. Whoever stops waiting is out of the queue."""
        self._tell_waiting(asked)
        left = asked.waiting.deadline_usec - boottime_usec()
        try:
            await asyncio.wait_for(asyncio.shield(asked.turn), max(0, left) / 1e6)
        except TimeoutError:
            if asked.refuse:
                why = f"after {show_usec(asked.waits_usec)} of waiting"
                self._actions.metrics.calls_waited.labels("refused").observe(asked.waits_usec / 1e6)
                now = self._latest
                sentence = self._refusal(asked, now) if now is not None else "there is no room"
                raise ResourceExhausted(f"{sentence} ({why})", "wait",
                                        show_usec(asked.waits_usec)) from None  # fmt: skip
        finally:
            self._asked.pop(asked.id, None)
            self._actions.metrics.calls_waiting.set(len(self._asked))
            asked.turn.cancel()

    def began(self, call: Call, asked: Asked) -> None:
        """Its cgroup is there: said, and counted."""
        waited = boottime_usec() - asked.waiting.since_usec
        call.waited_usec = waited
        self._actions.metrics.calls_waited.labels("started").observe(waited / 1e6)
        late = "" if waited < asked.waits_usec else (
            " There is still no room for what it expects: it may be paused for others."
        )  # fmt: skip
        self._actions.audit.write("call_started", session=call.session.id, call=call.id,
                                  waited_usec=waited)  # fmt: skip
        self._actions.tell(call.session, call.id, pb.Feedback(
            code=pb.FEEDBACK_CODE_STARTED,
            sentence=f"{call.name!r} begins after {show_usec(waited)} of waiting for memory.{late}",
            numbers={"waited_usec": float(waited)},
        ))  # fmt: skip

    def ended(self, held_bytes: int) -> None:
        """A call has given this much back."""
        now = boottime_usec()
        self._freed.append((now, held_bytes))
        while self._freed and now - self._freed[0][0] > FREED_WINDOW_USEC:
            self._freed.popleft()

    def leave(self, call_id: str, why: str, session: Session | None = None) -> pb.Report | None:
        """Take a call out that has not begun; its report, or None where it does not wait (in this
        session)."""
        asked = self._asked.get(call_id)
        if asked is None or session not in (None, asked.session):
            return None
        sentence = f"It had not begun: {why} while it waited for room."
        self.cancel(asked, sentence)
        return pb.Report(call_id=call_id, session_id=asked.session.id, name=asked.name,
                         verdict=pb.VERDICT_CANCELLED, sentence=sentence)  # fmt: skip

    def cancel(self, asked: Asked, why: str) -> None:
        """It is not wanted any more."""
        if not asked.turn.done():
            asked.turn.set_exception(FailedPrecondition(why))
            asked.turn.exception()  # whoever waits sees it; where nobody does, it is no mistake

    def close_session(self, session: Session) -> None:
        """Nothing of a session waits any more."""
        for asked in self.of(session):
            self.cancel(asked, f"session {session.id} is being closed")

    # Starting

    def look(self, now: Snapshot) -> None:
        """The guard has looked: whoever fits now starts."""
        self._latest = now
        self._starting.clear()
        if self._asked:
            self._start(now)

    def _fresh(self) -> Snapshot | None:
        if self._latest is None or boottime_usec() - self._latest.now_usec > FRESH_USEC:
            self._starting.clear()
            try:
                self._latest = self._look()
            except KnobError as error:
                log.error("the pool cannot be read, so nobody waits for room: %s", error)
                self._latest = None
        return self._latest

    def _with_starting(self, now: Snapshot) -> Snapshot:
        return replace(now, calls=(*now.calls, *self._starting.values()))

    def _start(self, now: Snapshot) -> None:
        policy = self._policy()
        waiting = [a.waiting for a in self._asked.values() if not a.turn.done()]
        for call_id in admit(policy, self._with_starting(now), waiting):
            asked = self._asked[call_id]
            w = asked.waiting
            self._starting[call_id] = CallView(
                id=w.id, name=asked.name, session_id=w.session_id, priority=w.priority,
                began_usec=now.now_usec, memory_bytes=0, growth_bytes_per_s=0.0, cpu_usec=0,
                expected_bytes=w.expected_bytes,
            )  # fmt: skip
            asked.turn.set_result(None)

    # Telling

    def place(self, asked: Asked) -> pb.Place:
        """Where it stands."""
        policy, now_usec = self._policy(), boottime_usec()
        order = in_order(policy, now_usec, [a.waiting for a in self._asked.values()])
        index = next((i for i, w in enumerate(order) if w.id == asked.id), 0)
        ahead = sum(w.expected_bytes for w in order[: index + 1])
        room = 0
        if self._latest is not None:
            room = free_for_admission_bytes(policy, self._with_starting(self._latest))
        speed = 0.0
        if self._freed:
            passed = max(1_000_000, now_usec - self._freed[0][0])
            speed = sum(freed for _, freed in self._freed) * 1e6 / passed
        return pb.Place(
            position=index + 1, waiting=len(order),
            waited_usec=max(0, now_usec - asked.waiting.since_usec),
            estimate_usec=estimate_usec(ahead, room, speed),
            deadline_usec=max(0, asked.waiting.deadline_usec - now_usec),
            expected_bytes=asked.waiting.expected_bytes, room_bytes=max(0, room),
        )  # fmt: skip

    def to_proto(self, asked: Asked) -> pb.Call:
        """As ListCalls shows it."""
        return pb.Call(
            id=asked.id, session_id=asked.session.id, name=asked.name, argv=asked.argv,
            state=pb.CALL_STATE_WAITING, grant=grant_to_proto(asked.grant),
            began_unix_usec=asked.asked_unix_usec, place=self.place(asked),
        )  # fmt: skip

    def _tell_waiting(self, asked: Asked) -> None:
        place = self.place(asked)
        about = f", in about {show_usec(place.estimate_usec)}" if place.HasField(
            "estimate_usec") else ""  # fmt: skip
        then = "is refused" if asked.refuse else "starts whatever there is"
        sentence = (
            f"{asked.name!r} waits for memory: it expects {show_bytes(place.expected_bytes)}, "
            f"{show_bytes(place.room_bytes)} are there. Number {place.position} of "
            f"{place.waiting}{about}; after {show_usec(asked.waits_usec)} it {then}."
        )
        self._actions.metrics.calls_waiting.set(len(self._asked))
        self._actions.audit.write("call_waiting", session=asked.session.id, call=asked.id,
                                  name=asked.name, expected_bytes=place.expected_bytes,
                                  position=place.position)  # fmt: skip
        numbers = {"position": float(place.position), "waiting": float(place.waiting),
                   "expected_bytes": float(place.expected_bytes),
                   "room_bytes": float(place.room_bytes)}  # fmt: skip
        if place.HasField("estimate_usec"):
            numbers["estimate_usec"] = float(place.estimate_usec)
        self._actions.tell(asked.session, asked.id, pb.Feedback(
            code=pb.FEEDBACK_CODE_WAITING, sentence=sentence, numbers=numbers,
        ))  # fmt: skip
