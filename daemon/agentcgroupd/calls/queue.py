"""The one queue of calls that were asked for and have not begun.

A call may need several resources (memory of the pool, a part of a GPU) and is let in by one after
the other; what it has been let in by is kept for it while it waits for the next. Who may start is
decided by each resource; the queue keeps the calls, tells agents their place, and wakes them. A
call that waits has no cgroup and no process; if its caller goes away, nothing of it is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import FailedPrecondition, ResourceExhausted
from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.candidate import Candidate, Wait
from agentcgroupd.state.session import Call, Session, boottime_usec, unix_usec
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.telemetry.wire import grant_to_proto
from agentcgroupd.units import show_usec


class Reservation(Protocol):
    """What a resource keeps for a call from when it may start until it has begun or given up."""

    def apply(self, grant: Grant) -> Grant:
        """Add what is kept to the call's grant."""

    def release(self) -> None:
        """Keep it no longer. Safe to call twice."""


class Resource(Protocol):
    """Something that calls wait for until there is enough of it."""

    name: str
    """The word for it in sentences such as `waits for memory`."""

    def on_freed(self, retry: Callable[[], None]) -> None:
        """Take what is to be called whenever there may be more of the resource."""

    def needed_by(self, candidate: Candidate) -> bool:
        """Tell whether a call has to be let in; False: it may start whatever there is."""

    def wait_of(self, candidate: Candidate, now_usec: int) -> Wait:
        """Make the terms on which a call waits from now on."""

    def waiting_max(self) -> int:
        """How many calls may wait at a time."""

    def waiting_share(self) -> float:
        """What part of the places that others leave the calls of one session may have, 0 to 1."""

    def let_in(self, waiting: Sequence[Wait]) -> Mapping[str, Reservation | None]:
        """Choose the calls that may start now, by id, each with what is kept for it."""

    def in_order(self, waiting: Iterable[Wait]) -> list[Wait]:
        """Sort calls that wait, the next to start first."""

    def outlook(self, ahead: Sequence[Wait]) -> Mapping[str, int]:
        """Say more of a call's place, by the names in the message Place. `ahead`: the calls that
        start before it, and it."""

    def asked(self, candidate: Candidate) -> Mapping[str, int]:
        """Say what a call asks for, for the audit log."""

    def shortage(self, candidate: Candidate) -> str:
        """Say what a call waits for and what is there, in words."""

    def refusal(self, candidate: Candidate, waited_usec: int = 0) -> ResourceExhausted:
        """Make the error for a call that is not let in, or no longer waits."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A call on its way through the queue."""

    candidate: Candidate
    asked_usec: int
    asked_unix_usec: int
    reservations: list[Reservation] = field(default_factory=list)
    waited_for: list[Resource] = field(default_factory=list)
    """Resources that it has had to wait for, the present one last."""
    wait: Wait | None = None
    """The terms on which it waits now; None: it may start."""
    started: asyncio.Future[None] | None = None
    """Done when the call need not wait for the present resource any more."""
    cancelled: str = ""
    """Why the call is not wanted any more; empty: it is."""
    late: bool = False
    """Whether the call starts because its time is over, not because there is room."""

    def apply(self, grant: Grant) -> Grant:
        """Add what is kept for the call to its grant."""
        for reservation in self.reservations:
            grant = reservation.apply(grant)
        return grant

    def release(self) -> None:
        """Keep nothing for the call any more: it has begun, or never will."""
        for reservation in self.reservations:
            reservation.release()

    def start(self, reservation: Reservation | None) -> None:
        """End the wait for the present resource, with what that keeps for the call."""
        if reservation is not None:
            self.reservations.append(reservation)
        assert self.started is not None
        self.started.set_result(None)


class AdmissionQueue:
    """All calls that wait, whatever for. Runs on the event loop."""

    def __init__(self, resources: Iterable[Resource], notices: Notices) -> None:
        """`resources`: in the order in which a call is let in by them."""
        self._notices = notices
        self._tickets: dict[str, Ticket] = {}
        self._resources: list[Resource] = []
        for resource in resources:
            self.add(resource)

    def add(self, resource: Resource) -> None:
        """Let calls be let in by one more resource, after those that are there."""
        self._resources.append(resource)
        resource.on_freed(lambda: self._start_waiting(resource))

    def __len__(self) -> int:
        return len(self._tickets)

    def waits(self, call_id: str) -> bool:
        """Tell whether a call waits."""
        return call_id in self._tickets

    def count(self, session: Session) -> int:
        """How many calls of one session wait."""
        return len(self.of(session)) if self._tickets else 0

    def of(self, session: Session) -> list[Ticket]:
        """Calls of one session that wait."""
        return [t for t in self._tickets.values() if t.candidate.session is session]

    def longest_wait_usec(self) -> int:
        """How long the call that waits longest has waited; 0 where none waits."""
        asked = [t.asked_usec for t in self._tickets.values() if t.wait is not None]
        return boottime_usec() - min(asked) if asked else 0

    def waits_for(self, resource: Resource) -> bool:
        """Tell whether any call waits for a resource."""
        return any(self._waiting(resource))

    def _waiting(self, resource: Resource) -> list[Wait]:
        """Calls that wait for a resource and have not been let in."""
        return [
            ticket.wait
            for ticket in self._tickets.values()
            if ticket.wait is not None
            and ticket.waited_for[-1] is resource
            and ticket.started is not None
            and not ticket.started.done()
        ]

    # Entering and waiting

    def enter(self, candidate: Candidate) -> Ticket:
        """Take a call into the queue, or let it start at once: then its ticket has no `wait`.

        Either way the ticket is to be released in the end. Raises ResourceExhausted when the call
        may not wait, or too many do; then nothing is kept for it.
        """
        ticket = Ticket(candidate, boottime_usec(), unix_usec())
        try:
            self._advance(ticket, self._resources)
        except BaseException:
            ticket.release()
            raise
        return ticket

    def _advance(self, ticket: Ticket, resources: Iterable[Resource]) -> None:
        """Let a call in by one resource after the other, until it has to wait for one."""
        candidate = ticket.candidate
        ticket.wait = None
        for resource in resources:
            if not resource.needed_by(candidate):
                continue
            wait = resource.wait_of(candidate, boottime_usec())
            if self._can_start(resource, wait, ticket):
                continue
            if wait.patience_usec == 0:
                raise resource.refusal(candidate)
            self._check_length(resource, candidate)
            ticket.wait = wait
            ticket.waited_for.append(resource)
            ticket.started = asyncio.get_running_loop().create_future()
            self._tickets[candidate.id] = ticket
            return

    def _can_start(self, resource: Resource, wait: Wait, ticket: Ticket) -> bool:
        """Ask a resource to let a call in at once, beside those that wait for it."""
        found = dict(resource.let_in([*self._waiting(resource), wait]))
        if wait.id not in found:
            self._start(found)
            return False
        reservation = found.pop(wait.id)
        if reservation is not None:
            ticket.reservations.append(reservation)
        self._start(found)
        return True

    def _check_length(self, resource: Resource, candidate: Candidate) -> None:
        waiting, most = self._waiting(resource), resource.waiting_max()
        mine = sum(wait.candidate.session is candidate.session for wait in waiting)
        left = most - (len(waiting) - mine)
        if len(waiting) >= most:
            who = f"{len(waiting)} calls wait for {resource.name} already, which is all that may"
        elif mine >= max(1, int(left * resource.waiting_share())):
            who = (
                f"{mine} calls of this session wait for {resource.name} already, which is its "
                f"share of the {left} places that other sessions leave"
            )
        else:
            return
        refusal = resource.refusal(candidate)
        raise ResourceExhausted(
            f"calls: {who}; try again later, or ask for less",
            refusal.field,
            refusal.value,
            refusal.allowed,
        )

    def _start(self, found: Mapping[str, Reservation | None]) -> None:
        for call_id, reservation in found.items():
            self._tickets[call_id].start(reservation)

    def _start_waiting(self, resource: Resource) -> None:
        """Start whoever fits, because there may be more of a resource than before."""
        waiting = self._waiting(resource)
        if waiting:
            self._start(resource.let_in(waiting))

    async def wait(self, ticket: Ticket) -> None:
        """Wait until a call may start, or until its time is over and it starts all the same.

        Raises ResourceExhausted when it is refused, FailedPrecondition when it is not wanted any
        more. Whoever stops waiting is out of the queue.
        """
        while ticket.wait is not None:
            resource = ticket.waited_for[-1]
            await self._wait_for(resource, ticket, ticket.wait)
            following = self._resources[self._resources.index(resource) + 1 :]
            self._advance(ticket, following)

    async def _wait_for(self, resource: Resource, ticket: Ticket, wait: Wait) -> None:
        assert ticket.started is not None
        metrics = self._notices.metrics
        self._say_waiting(resource, ticket, wait)
        left_usec = max(0, wait.deadline_usec - boottime_usec())
        try:
            await asyncio.wait_for(asyncio.shield(ticket.started), left_usec / 1e6)
        except TimeoutError:
            if ticket.started.done():
                pass  # let in at the last moment
            elif wait.refused_late:
                metrics.calls_waited.labels("refused").observe(wait.patience_usec / 1e6)
                raise resource.refusal(ticket.candidate, wait.patience_usec) from None
            else:
                ticket.late = True
        finally:
            self._tickets.pop(wait.id, None)
            metrics.calls_waiting.set(len(self._tickets))
            ticket.started.cancel()
        if ticket.cancelled:
            raise FailedPrecondition(ticket.cancelled)

    def began(self, call: Call, ticket: Ticket) -> None:
        """Say and count that a call that waited has its cgroup."""
        waited = boottime_usec() - ticket.asked_usec
        call.waited_usec = waited
        self._notices.metrics.calls_waited.labels("started").observe(waited / 1e6)
        self._notices.audit.write(
            "call_started", session=call.session.id, call=call.id, waited_usec=waited
        )
        names = " and ".join(resource.name for resource in ticket.waited_for)
        sentence = f"{call.name!r} begins after {show_usec(waited)} of waiting for {names}."
        if ticket.late:
            sentence += " There is still no room for what it expects: it may be paused for others."
        feedback = pb.Feedback(
            code=pb.FEEDBACK_CODE_STARTED,
            sentence=sentence,
            numbers={"waited_usec": float(waited)},
        )
        self._notices.tell(call.session, call.id, feedback)

    # Leaving

    def leave(self, call_id: str, why: str, session: Session | None = None) -> pb.Report | None:
        """Take a call out that has not begun, and give its report; None where no such call waits.

        `session`: the only one whose calls may be taken out; None: any.
        """
        ticket = self._tickets.get(call_id)
        if ticket is None or session not in (None, ticket.candidate.session):
            return None
        name = ticket.waited_for[-1].name
        sentence = f"It had not begun: {why} while it waited for {name}."
        self._cancel(ticket, sentence)
        return pb.Report(
            call_id=call_id,
            session_id=ticket.candidate.session.id,
            name=ticket.candidate.request.name,
            verdict=pb.VERDICT_CANCELLED,
            sentence=sentence,
        )

    def _cancel(self, ticket: Ticket, why: str) -> None:
        ticket.cancelled = why
        if ticket.started is not None and not ticket.started.done():
            ticket.started.set_result(None)

    def close_session(self, session: Session) -> None:
        """Take all calls of a session out."""
        for ticket in self.of(session):
            self._cancel(ticket, f"session {session.id} is being closed")

    # Telling

    def place(self, ticket: Ticket) -> pb.Place:
        """Say where a call stands among those that wait for the same resource."""
        wait, now_usec = ticket.wait, boottime_usec()
        assert wait is not None
        return pb.Place(
            waited_usec=max(0, now_usec - wait.since_usec),
            deadline_usec=max(0, wait.deadline_usec - now_usec),
            **self._standing(ticket.waited_for[-1], wait),
        )

    def _standing(self, resource: Resource, wait: Wait) -> dict[str, int]:
        """A call's position, and what more the resource says of it, by the names in Place."""
        order = resource.in_order(self._waiting(resource))
        ids = [other.id for other in order]
        # One that has been let in but has not yet gone on stands before all others.
        position = ids.index(wait.id) + 1 if wait.id in ids else 1
        outlook = resource.outlook(order[:position] or [wait])
        return {"position": position, "waiting": len(order), **outlook}

    def waiting(self, session: Session) -> list[pb.Call]:
        """Describe the calls of a session that wait, for ListCalls."""
        return [self._to_proto(ticket) for ticket in self.of(session) if ticket.wait is not None]

    def _to_proto(self, ticket: Ticket) -> pb.Call:
        candidate = ticket.candidate
        return pb.Call(
            id=candidate.id,
            session_id=candidate.session.id,
            name=candidate.request.name,
            argv=candidate.request.argv,
            state=pb.CALL_STATE_WAITING,
            grant=grant_to_proto(candidate.grant),
            began_unix_usec=ticket.asked_unix_usec,
            place=self.place(ticket),
        )

    def _say_waiting(self, resource: Resource, ticket: Ticket, wait: Wait) -> None:
        candidate, standing = ticket.candidate, self._standing(resource, wait)
        estimate = standing.get("estimate_usec")
        about = "" if estimate is None else f", in about {show_usec(estimate)}"
        then = "is refused" if wait.refused_late else "starts whatever there is"
        sentence = (
            f"{candidate.request.name!r} waits for {resource.shortage(candidate)}. Number "
            f"{standing['position']} of {standing['waiting']}{about}; after "
            f"{show_usec(wait.patience_usec)} it {then}."
        )
        self._notices.metrics.calls_waiting.set(len(self._tickets))
        self._notices.audit.write(
            "call_waiting",
            session=candidate.session.id,
            call=candidate.id,
            name=candidate.request.name,
            position=standing["position"],
            **resource.asked(candidate),
        )
        numbers = {name: float(value) for name, value in standing.items()}
        feedback = pb.Feedback(code=pb.FEEDBACK_CODE_WAITING, sentence=sentence, numbers=numbers)
        self._notices.tell(candidate.session, candidate.id, feedback)
