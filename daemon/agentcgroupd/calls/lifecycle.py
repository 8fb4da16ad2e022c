"""The life of a call: begin, attach, end; every way out removes its cgroup and leaves a report.

A call ends when its cgroup is empty, whoever forgot to say so. One that was begun through gRPC is
held open by its owner, so that several commands can run in it; it ends when the owner says so, or
when the owner is gone and the cgroup is empty.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls import nesting
from agentcgroupd.calls.evidence import main_status
from agentcgroupd.calls.facts import CALLER_REASONS
from agentcgroupd.calls.leaving import Leavers
from agentcgroupd.calls.leftovers import Leftovers, kept_feedback
from agentcgroupd.calls.owners import Owners
from agentcgroupd.calls.reports import Reports
from agentcgroupd.calls.timers import Deadlines
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.config import CallDefaults
from agentcgroupd.enforce import memory_high
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.enforce.kill import ask_end, end_with, kill, kill_outsiders
from agentcgroupd.enforce.limits import (
    put_call_before_agent,
    rewrite_grant,
    settle,
    write_grant,
)
from agentcgroupd.enforce.outside import place_outside
from agentcgroupd.errors import (
    AgentcgroupdError,
    CgroupGone,
    FailedPrecondition,
    KnobError,
    NotFound,
    RequestError,
    ResourceExhausted,
    Unavailable,
)
from agentcgroupd.host.syscalls import cpus_of, pidfd_alive, wait_channel
from agentcgroupd.intents.grant import Ceiling, Grant, grant_for, merge
from agentcgroupd.intents.inner import check_gpu, cut, inner_grant, without_gpu
from agentcgroupd.intents.lowering import lowered, refuse_raise
from agentcgroupd.intents.parse import NAME_CHARS_MAX, Intent
from agentcgroupd.intents.request import CallRequest
from agentcgroupd.state.candidate import Candidate
from agentcgroupd.state.ending import Account, Asker
from agentcgroupd.state.process import Process
from agentcgroupd.state.records import plain
from agentcgroupd.state.session import (
    CALL_PREFIX,
    Call,
    Session,
    boottime_usec,
    lies_in,
    unix_usec,
)
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.telemetry.wire import call_to_proto, grant_to_proto
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

END_TIMEOUT_S = 15.0
"""How long EndCall waits for killed processes to be gone. A process in uninterruptible sleep can
take longer; its call ends when it does, and EndCall is told so."""


class CallObserver(Protocol):
    """What follows calls: programs in the kernel, the guard, GPUs. Called on the event loop."""

    def call_opened(self, call: Call) -> None:
        """Take note of a call's cgroup, with no process in it or, after a restart, with some.
        Raises BpfError where the call cannot have what it was granted."""

    def call_begun(self, call: Call) -> None:
        """Take note that a call has begun, its limits set and its start told."""

    def regrant(self, call: Call, grant: Grant) -> Grant:
        """Change what an open call has to `grant`, and return that with what follows from it.
        Raises RequestError, with nothing changed."""

    def entered(self, pid: int) -> None:
        """Take note that a process is in a call or in an agent leaf, as all that it will fork."""

    def catch_up(self) -> None:
        """Read what is known of processes that have ended, before a call is judged by it."""

    def behind(self) -> bool:
        """Tell whether more processes of a call may still be on their way into it."""

    def call_ending(self, call: Call) -> None:
        """Take note that a call is empty and that its report is about to be made."""

    def call_closed(self, call: Call) -> None:
        """Take note that a call's cgroup is gone or given up."""

    def room_given_up(self, call: Call) -> None:
        """Take note that what an open call expects is not kept for it while it stands empty."""

    def call_ended(self, call: Call, held_bytes: int) -> None:
        """Take note that a call is over, and what it has held at most."""


class Calls:
    """All open calls. Runs on the event loop; only the kernel is waited for."""

    def __init__(
        self,
        config: CallDefaults,
        events: FileEvents,
        actions: Actions,
        notices: Notices,
        reports: Reports,
        observer: CallObserver,
        ceiling: Callable[[Session], Ceiling],
        waiting: Callable[[Session], int],
        turns: Turns,
    ) -> None:
        """`ceiling`: the limits above a new call of a session. `waiting`: how many calls of a
        session wait to begin; they count towards its calls_max. `turns`: when a session has its
        turn on the loop."""
        self._config = config
        self._events = events
        self.actions = actions
        self._notices = notices
        self._audit, self._metrics, self._feed = notices.audit, notices.metrics, notices.feed
        self._reports = reports
        self._observer = observer
        self._ceiling = ceiling
        self._waiting = waiting
        self._loop = asyncio.get_running_loop()
        self._owners = Owners(self._owner_gone, turns)
        self._leavers = Leavers(notices, self.admit, self._main_ended)
        self._deadlines = Deadlines(
            config,
            self._populated,
            self._goes_on,
            self._leavers.look,
            self._finish,
            self._kill,
            observer.room_given_up,
            turns,
        )
        self._leftovers = Leftovers(config, notices, self._populated, self._kill)
        self.open: dict[str, Call] = {}
        self._postponed: dict[str, Call] = {}
        self.begun = 0
        self.ended = 0

    # Beginning

    def begin(
        self, session: Session, request: CallRequest, owner: Process | None, age_usec: int = 0
    ) -> Call:
        """Begin a call that does not queue, which has its cgroup then and no process yet.

        `owner` holds the call open; None: the call ends when it is empty. `age_usec`: for how long
        its tool has run already. Raises RequestError, and then nothing is left behind.
        """
        with self.refusing(session, request.name):
            candidate = self.grant(session, request)
            return self.open_call(candidate, candidate.grant, owner, age_usec)

    @contextmanager
    def refusing(self, session: Session, name: str) -> Iterator[None]:
        """Count and write down a refusal on its way to the caller."""
        try:
            yield
        except RequestError as error:
            self._metrics.calls_refused.labels(error.code).inc()
            self._audit.write(
                "call_refused",
                session=session.id,
                name=name[:NAME_CHARS_MAX],
                code=error.code,
                sentence=error.sentence,
            )
            raise

    def grant(
        self,
        session: Session,
        request: CallRequest,
        call_id: str = "",
        outer: Call | None = None,
    ) -> Candidate:
        """Decide what a call gets, if one more may be there at all. `call_id`: the one that it has
        had since it was first granted; empty: it gets one. `outer`: the call that it is to begin
        in; None: in none. Raises RequestError."""
        self._check_count(session)
        if outer is not None:
            return self._grant_inside(outer, request)
        grant = grant_for(request.intent, self._ceiling(session))
        likely_bytes, advice = self._reports.expect(session, request.name, request.argv, grant)
        if advice:
            grant = replace(grant, advice=(*grant.advice, advice))
        call_id = call_id or secrets.token_hex(6)
        return Candidate(call_id, session, request, grant, likely_bytes)

    def _grant_inside(self, outer: Call, request: CallRequest) -> Candidate:
        """Decide what a call gets that begins inside another one. Raises RequestError."""
        nesting.check(outer, self._config.depth_max)
        try:
            room = nesting.room_in(outer)
        except KnobError as error:
            raise Unavailable(f"what is left of call {outer.id} cannot be read: {error}") from None
        session = outer.session
        grant, cut = inner_grant(request.intent, self._ceiling(session), room)
        # It counts as a part of the outer call wherever memory is shared out.
        return Candidate(secrets.token_hex(6), session, request, grant, 0, outer, cut)

    def _check_count(self, session: Session) -> None:
        """Refuse a call beyond calls_max. Raises FailedPrecondition or ResourceExhausted."""
        if session.closing:
            raise FailedPrecondition(f"session {session.id} is being closed")
        count, most = len(session.calls) + self._waiting(session), session.limits.calls_max
        if count < most:
            return
        sentence = (
            f"calls: {count} calls of this session are open or waiting, which is all it may have; "
            "end one first"
        )
        raise ResourceExhausted(sentence, "calls_max", str(count + 1), f"at most {most}")

    def open_call(
        self, candidate: Candidate, grant: Grant, owner: Process | None, age_usec: int = 0
    ) -> Call:
        """Make a call's cgroup with its limits, and enter it in the books.

        `grant`: the candidate's, completed by what was kept for it. Raises RequestError, and then
        nothing is left behind.
        """
        with self._metrics.time("begin"):
            call = self._with_cgroup(candidate, grant, owner, age_usec)
            try:
                outer = nesting.above(call.parent)
                call.grant = write_grant(call.session, call.cgroup, grant, outer)
                call.bounds.written = (call.grant.memory_high_bytes,)
                call.cgroup.set_xattr(call.record())
                self._follow(call)
                nesting.begun(call)
            except (AgentcgroupdError, OSError) as error:
                self._forget(call)
                call.cgroup.remove()
                if isinstance(error, RequestError):
                    raise
                raise Unavailable(f"the call's limits could not be set: {error}") from None
            self._tell_begun(call)
        self._observer.call_begun(call)
        return call

    def _with_cgroup(
        self, candidate: Candidate, grant: Grant, owner: Process | None, age_usec: int
    ) -> Call:
        """Make a call's cgroup, without limits yet. Raises NotFound or Unavailable."""
        session, request = candidate.session, candidate.request
        try:
            outer = candidate.outer
            if outer is not None:
                nesting.split(outer)
            began = self._reports.baseline_of_new(session, outer)
            above = session.cgroup if outer is None else outer.cgroup
            cgroup = above.make_child(CALL_PREFIX + candidate.id)
        except CgroupGone:
            raise NotFound(f"the cgroup of session {session.id} is gone") from None
        except KnobError as error:
            if error.errno == errno.EAGAIN:
                # kernel/cgroup/cgroup.c: cgroup_check_hierarchy_limits
                sentence = "the session has as many cgroups as it may (cgroup.max.descendants)"
                raise ResourceExhausted(sentence, "cgroups_max") from None
            raise Unavailable(f"the call's cgroup could not be made: {error}") from None
        return Call(
            id=candidate.id,
            session=session,
            name=request.name,
            argv=request.argv,
            grant=grant,
            cgroup=cgroup,
            began_unix_usec=unix_usec() - age_usec,
            began_boot_usec=boottime_usec() - age_usec,
            held=owner is not None,
            owner=owner,
            observed=request.observed,
            account=Account(began=began),
            likely_bytes=candidate.likely_bytes,
            parent=outer,
            cut=candidate.cut,
            frozen_since_usec=outer.frozen_since_usec if outer is not None else None,
        )

    def _follow(self, call: Call) -> None:
        """Start to look after a call, new or found again. Raises BpfError, KnobError or OSError."""
        call.watch = self._events.watch(
            call.cgroup, knobs.CGROUP_EVENTS, lambda: self._changed(call), call.session.turns_key
        )
        self.open[call.id] = call
        call.session.calls[call.id] = call
        if call.parent is not None:
            call.parent.inner[call.id] = call
        self._observer.call_opened(call)
        if call.owner is not None:
            self._owners.add(call)
        self._deadlines.begun(call)

    def _tell_begun(self, call: Call) -> None:
        self.begun += 1
        self._metrics.calls_begun.inc()
        if call.observed:
            self._metrics.calls_observed.labels("yes").inc()
        if call.grant.advice:
            self._metrics.calls_reduced.inc()
        self._audit.write(
            "call_begun",
            session=call.session.id,
            call=call.id,
            name=call.name,
            argv=list(call.argv),
            grant=plain(call.grant),
            parent=call.parent.id if call.parent is not None else None,
        )
        if self._feed.listening:
            self._feed.publish(call.session.id, pb.Event(begun=call_to_proto(call, admin=True)))

    # Entering

    def attach(self, call: Call, process: Process) -> None:
        """Move a process into a call as its main process, whose exit status is the call's. Raises
        RequestError or KnobError."""
        if call.state == pb.CALL_STATE_ENDING:
            raise FailedPrecondition(f"call {call.id} is ending")
        with self._metrics.time("attach"):
            call.leaf.attach(process.pid)
            if not pidfd_alive(process.pidfd):
                raise FailedPrecondition(f"process {process.pid} ended before it could enter")
        self._leave_others(call, process)
        self._begin_account(call)
        if call.main is not None:
            self._leavers.drop(call)
            call.main.close()
        call.main = process.copy()
        call.cpus_seen = cpus_of(process.pid)
        call.client_status = call.exit_status = None
        self._leftovers.watch(call)
        call.went_on_as = ""
        self._entered(call, process)

    def _leave_others(self, call: Call, process: Process) -> None:
        """Let go of the call whose main process has just gone on to another one: a shell that ends
        in `exec agentcg-exec ...`."""
        for other in call.session.calls.values():
            main = other.main
            if other is call or main is None:
                continue
            if (main.pid, main.start_ticks) != (process.pid, process.start_ticks):
                continue
            other.went_on_as = other.went_on_as or call.id
            if lies_in(call, other):
                # It stays open around the other one, whose end is its own.
                other.cgroup.set_xattr(other.record())
            else:
                ask_end(other, Asker.WENT_ON, f"It went on as call {call.id}.")
                self._leavers.drop(other)
                main.close()
                other.main = None

    def _begin_account(self, call: Call) -> None:
        """Judge a call from now on by what happens to the process that has entered it: what was
        counted for those before it is set apart."""
        baseline = None
        if call.account.commands:
            try:
                baseline = self._reports.baseline_now(call)
            except KnobError as error:
                log.warning("call %s: its counters cannot be read: %s", call.id, error)
        call.account.command_begins(baseline)

    def admit(self, call: Call, process: Process) -> None:
        """Move one more process into a call; if the call is ending, the process is killed with it.
        Raises KnobError."""
        call.leaf.attach(process.pid)
        self._entered(call, process)
        if call.state == pb.CALL_STATE_ENDING:
            kill(call)

    def _entered(self, call: Call, process: Process) -> None:
        self._observer.entered(process.pid)
        put_call_before_agent(call.session, call.cgroup, process.pid, call.grant.priority)
        call.entered = True
        if call.state == pb.CALL_STATE_PENDING:
            call.state = pb.CALL_STATE_RUNNING
        self._deadlines.entered(call)
        call.cgroup.set_xattr(call.record())

    def update(self, call: Call, intent: Intent, only_lower: bool = False) -> Call:
        """Change an open call's grant. `only_lower`: refuse what would raise anything that the call
        has. Raises RequestError, with nothing changed."""
        if call.state == pb.CALL_STATE_ENDING:
            raise FailedPrecondition(f"call {call.id} is ending")
        if only_lower:
            refuse_raise(call.id, call.grant, intent)
        current = call.cgroup.read_if(knobs.MEMORY_CURRENT)
        grant = self._merge(call, intent, current)
        grant = settle(call.session, grant, call.grant.settings, nesting.above(call.parent))
        if only_lower:
            grant = lowered(call.grant, grant)
        grant = self._observer.regrant(call, grant)
        # What the policy did is undone first: its next decision is made under the new grant.
        self.actions.unthrottle(call, "Its grant was changed.")
        leftovers = call.grant.leftovers
        call.grant = rewrite_grant(call.session, call.cgroup, call.grant, grant)
        memory_high.write(call)
        if call.grant.leftovers != leftovers:
            self._leftovers.watch(call)
        call.likely_bytes, _ = self._reports.expect(call.session, call.name, call.argv, call.grant)
        call.cgroup.set_xattr(call.record())
        self._deadlines.granted(call)
        self._audit.write(
            "call_updated", session=call.session.id, call=call.id, grant=plain(call.grant)
        )
        return call

    def _merge(self, call: Call, intent: Intent, current: int | None) -> Grant:
        """Decide what an open call gets for a change of its intent; inside another one, at most
        what is left of that. Raises InvalidField or KnobError."""
        ceiling = self._ceiling(call.session)
        if call.parent is None:
            return merge(call.grant, intent, ceiling, current)
        room = nesting.room_in(call.parent, call)
        check_gpu(intent, room)
        grant, cut_now = cut(merge(call.grant, without_gpu(intent), ceiling, current), intent, room)
        call.cut = (*call.cut, *cut_now)
        return grant

    # Ending

    def end(
        self,
        call: Call,
        detach: bool,
        status: int | None,
        asker: Asker,
        reason: pb.EndReason.ValueType = pb.END_REASON_UNSPECIFIED,
    ) -> pb.Report | Coroutine[Any, Any, pb.Report]:
        """End a call and give its report; with `detach`, only let go of it. Where processes have
        to die first, the report is to be awaited. `status`: of the main process, by its parent;
        `reason`: what the asker says for the report. One that says that its command has ended lets
        what is left go on if the call's leftovers are to be kept."""
        if status is not None:
            call.client_status = status
        call.held = False
        goes_on = self._goes_on(call)
        keep = reason == pb.END_REASON_DONE and call.grant.leftovers == "keep"
        if (goes_on and not detach and not keep) or reason in CALLER_REASONS:
            self._leavers.look(call)
            ask_end(call, asker, reason=reason)
        report = None if goes_on else self._finish(call)
        if report is not None:
            return report
        if detach or keep:
            call.grant = replace(call.grant, leftovers="keep")
            call.cgroup.set_xattr(call.record())
            return self._so_far(call, keep)
        if call.done is None:
            call.done = self._loop.create_future()
        self._kill(call)
        return self._ended(call, call.done)

    def _so_far(self, call: Call, keep: bool) -> pb.Report:
        """Give what can be said of a call that its owner has let go of. With `keep`, and if its
        main process has ended, that is how this one ended; else only that the call goes on."""
        if keep and main_status(call)[0] is not None:
            self._observer.catch_up()
            report = self._reports.of(call)
            kept = kept_feedback(call)
            self._notices.tell(call.session, call.id, kept)
            report.feedback.append(kept)
            return report
        return pb.Report(
            call_id=call.id,
            session_id=call.session.id,
            name=call.name,
            grant=grant_to_proto(call.grant),
            sentence="The call goes on until its last process ends.",
        )

    async def _ended(self, call: Call, done: asyncio.Future[pb.Report]) -> pb.Report:
        try:
            return await asyncio.wait_for(asyncio.shield(done), END_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable(
                f"call {call.id} was killed, but {self._stuck(call)}; its report comes when the "
                "last process has ended"
            ) from None

    def _stuck(self, call: Call) -> str:
        """Say which processes of a killed call are still there, and where they wait."""
        try:
            found = call.cgroup.all_procs()
        except KnobError as error:
            return f"its processes cannot be read: {error}"
        if call.main is not None and place_outside(call) is not None:
            found.append(call.main.pid)
        waits = [f"process {pid} waits in the kernel at {wait_channel(pid)}" for pid in found[:3]]
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        return ", ".join(waits) + more if waits else "its cgroup still counts as populated"

    def _kill(self, call: Call) -> None:
        """Kill all processes of a call, whose end was asked for."""
        call.state = pb.CALL_STATE_ENDING
        self.actions.hurry(call)
        try:
            kill(call)
        except CgroupGone:
            self._finish(call)
        if self._leavers.outlives(call):
            self._deadlines.killed(call, self._give_up)

    def _give_up(self, call: Call) -> None:
        """Wait no longer for a main process that is outside of its call and does not die."""
        call.account.given_up = True
        if not self._populated(call):
            self._finish(call)

    def _populated(self, call: Call) -> bool:
        try:
            return call.cgroup.populated()
        except CgroupGone:
            call.account.removed = True
            return False

    def _goes_on(self, call: Call) -> bool:
        """Whether a process of a call is left, in its cgroup or, as its main process, elsewhere."""
        return self._populated(call) or self._leavers.outlives(call)

    def _main_ended(self, call: Call) -> None:
        """Check a call that waited for its main process alone."""
        try:
            self._changed(call)
        except (KnobError, OSError, ValueError) as error:
            log.error("call %s: its main process ended: %s", call.id, error)

    def _changed(self, call: Call) -> None:
        """Check a call whose cgroup.events has changed: a process entered, the last one left, or
        the call was frozen or thawed."""
        if call.id not in self.open or self._goes_on(call):
            return
        if call.observed and self._observer.behind():
            self._postponed[call.id] = call
            return
        if call.held and call.entered and call.state != pb.CALL_STATE_ENDING:
            self._deadlines.emptied(call)
        elif call.entered or call.account.removed:
            self._finish(call)

    def _owner_gone(self, call: Call) -> None:
        """Let go of a call: the process that held it open has ended."""
        if call.id not in self.open:
            return  # it has ended meanwhile
        call.held = False
        if not self._goes_on(call):
            self._finish(call)
        else:
            self._leftovers.watch(call)
            call.cgroup.set_xattr(call.record())

    def _finish(self, call: Call) -> pb.Report | None:
        """Report a call whose cgroup is empty, remove the cgroup, and tell everyone, once for each
        call. None: a process has entered meanwhile, and the call goes on."""
        if call.id not in self.open:
            return call.session.report(call.id)
        if self._leavers.outlives(call):
            return None
        for inner in list(call.inner.values()):
            # Its cgroup is in this one, so it is empty too.
            if inner.held or not inner.entered:
                end_with(inner, call)
            self._finish(inner)
        with self._metrics.time("finish"):
            self._observer.catch_up()
            nesting.went_on(call)
            self._observer.call_ending(call)
            report = self._reports.of(call)
            # Before the cgroup goes: a daemon killed in between would lose the report. One killed
            # after this finds the empty cgroup and writes the entry again; the later one counts.
            self._reports.write(report)
            removed = True
            nesting.inner_ends(call)
            try:
                call.cgroup.remove()
            except KnobError as error:
                if error.errno == errno.EBUSY:
                    # A process has entered since the event; when it ends, this is called again.
                    self._audit.write("call_goes_on", session=call.session.id, call=call.id)
                    return None
                log.error("call %s: its cgroup could not be removed: %s", call.id, error)
                removed = False
            kill_outsiders(call)
            self._forget(call, removed)
            self.ended += 1
            self._reports.keep(call.session, report)
            self._reports.learn(call, report)
        self._observer.call_ended(call, report.memory_peak_bytes)
        if call.done is not None and not call.done.done():
            call.done.set_result(report)
        return report

    def _forget(self, call: Call, removed: bool = False) -> None:
        self.open.pop(call.id, None)
        call.session.calls.pop(call.id, None)
        if call.parent is not None:
            call.parent.inner.pop(call.id, None)
        if call.watch is not None:
            (self._events.forget if removed else self._events.unwatch)(call.watch)
        self._deadlines.drop(call)
        self._leavers.drop(call)
        self._leftovers.drop(call)
        self._owners.drop(call)
        self._observer.call_closed(call)
        for process in (call.main, *call.outsiders):
            if process is not None:
                process.close()
        call.main = None
        call.outsiders.clear()

    def record_short(
        self,
        session: Session,
        name: str,
        argv: Sequence[str],
        wall_usec: int,
        status: int | None,
        cpu: Mapping[str, int],
        refused: str,
    ) -> None:
        """Make the report of a call that had ended before it could have a cgroup, or was `refused`
        one and why. `status`: as waitpid(2) gives it; `cpu`: keys as in cpu.stat."""
        report = self._reports.of_short(session, name, argv, wall_usec, status, cpu, refused)
        self._reports.write(report)
        self._reports.keep(session, report)
        self.begun += 1
        self.ended += 1
        self._metrics.calls_begun.inc()
        self._metrics.calls_observed.labels("no").inc()

    def agent_entered(self, session: Session, process: Process) -> None:
        """Move a process into a session's agent leaf. Raises KnobError."""
        session.agent.attach(process.pid)
        self._observer.entered(process.pid)

    def withdraw(self, call: Call) -> None:
        """End a call whose process could not enter."""
        self._finish(call)

    # Finding again

    def restore(self, session: Session, call: Call) -> None:
        """Take up a call that an earlier daemon began; it may have ended meanwhile. Raises
        BpfError, KnobError or OSError."""
        call.held = call.held and call.owner is not None
        self._follow(call)
        if call.owner is not None:
            # Owners keeps a pidfd of its own.
            call.owner.close()
        self.actions.take_up(call)
        if self._goes_on(call):
            call.entered = True
            call.state = pb.CALL_STATE_RUNNING
            self._deadlines.entered(call)
            self._leftovers.watch(call)
        elif not call.held:
            self._finish(call)

    def end_if_empty(self, call: Call) -> None:
        """End a call that is known to be empty without waiting for its events file to say so."""
        if call.id in self.open and not self._goes_on(call):
            self._finish(call)

    def check_postponed(self) -> None:
        """Check calls that seemed empty while events of processes had not been dealt with."""
        postponed, self._postponed = self._postponed, {}
        for _ in self._check(postponed.values()):
            pass

    def check_all(self) -> Iterator[None]:
        """Check every call as if its events file had just changed, one a step; for the periodic
        sweep."""
        return self._check(list(self.open.values()))

    def _check(self, calls: Iterable[Call]) -> Iterator[None]:
        for call in calls:
            try:
                self._changed(call)
                self._leavers.look(call)
            except (KnobError, OSError, ValueError) as error:
                # One call that cannot be read must not take the others with it.
                log.error("call %s: %s", call.id, error)
            yield

    def release(self) -> None:
        """Undo what keeps open calls from going on without the daemon. They stay open."""
        for call in list(self.open.values()):
            self.actions.let_go(call, "The daemon is stopping.")

    def let_go(self) -> None:
        """Release open calls and follow them no more: they stay as they are for the next daemon."""
        self.release()
        for call in list(self.open.values()):
            self._forget(call)
