"""How a call begins, what enters it, and how its grant changes; calls/ending.py has the rest of its
life."""

from __future__ import annotations

import errno
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls import nesting
from agentcgroupd.calls.ending import OpenCalls
from agentcgroupd.calls.observer import CallObserver
from agentcgroupd.calls.purposes import purpose_of, with_parents
from agentcgroupd.calls.reports import Reports
from agentcgroupd.calls.rightsize import Affinity, tell_resident
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.config import CallDefaults
from agentcgroupd.enforce import memory_high
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.enforce.kill import ask_end, kill
from agentcgroupd.enforce.limits import (
    put_call_before_agent,
    rewrite_grant,
    settle,
    write_grant,
)
from agentcgroupd.enforce.pause import session_frozen_usec
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
from agentcgroupd.host.syscalls import cpus_of, pidfd_alive
from agentcgroupd.intents.grant import Ceiling, Grant, grant_for, merge
from agentcgroupd.intents.inner import check_gpu, cut, inner_grant, without_gpu
from agentcgroupd.intents.lowering import lowered, refuse_raise
from agentcgroupd.intents.parse import NAME_CHARS_MAX, Intent, said_in
from agentcgroupd.intents.request import CallRequest
from agentcgroupd.state.candidate import Candidate
from agentcgroupd.state.ending import Account, Asker
from agentcgroupd.state.process import Process
from agentcgroupd.state.records import plain
from agentcgroupd.state.second_records import SecondRecords
from agentcgroupd.state.session import (
    CALL_PREFIX,
    Call,
    Session,
    boottime_usec,
    lies_in,
    unix_usec,
)
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.telemetry.wire import call_to_proto
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

TOLD_S = 0.005
"""How long after its beginning a call that nobody has entered is told of: until then the answer is
on its way, and the launcher in the daemon's queue."""


class Calls(OpenCalls):
    """All open calls, how they begin, and what processes enter them."""

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
        second: SecondRecords,
    ) -> None:
        """`ceiling`: the limits above a new call of a session. `waiting`: how many calls of a
        session wait to begin; they count towards its calls_max. `turns`: when a session has its
        turn on the loop. `second`: where the records of open calls are kept besides."""
        super().__init__(
            config, events, actions, notices, reports, observer, self.admit, turns, second
        )
        self._ceiling = ceiling
        self._waiting = waiting
        self._rightsize = config.rightsize
        self._affinity = Affinity(config.rightsize, self.open.get)
        self.begun = 0

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
                self._keep(call)
                self._follow(call)
                nesting.begun(call)
            except (AgentcgroupdError, OSError) as error:
                self._forget(call)
                call.cgroup.remove()
                self.second.drop(call.id)
                if isinstance(error, RequestError):
                    raise
                raise Unavailable(f"the call's limits could not be set: {error}") from None
            self.begun += 1
            # Somebody waits for the answer, and then to enter.
            self._loop.call_soon(self._have_guarded, call)
            self._untold[call.id] = partial(self._tell_begun, call, candidate.request.intent)
            self._loop.call_later(TOLD_S, self._told, call.id)
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
            one_command=request.one_command,
            observed=request.observed,
            account=Account(began=began),
            likely_bytes=candidate.likely_bytes,
            parent=outer,
            cut=candidate.cut,
            frozen_since_usec=outer.frozen_since_usec if outer is not None else None,
            session_frozen_usec=session_frozen_usec(session),
        )

    def _tell_begun(self, call: Call, intent: Intent) -> None:
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
            intent=said_in(intent),
            observed=call.observed,
            grant=plain(call.grant),
            parent=call.parent.id if call.parent is not None else None,
        )
        if self._feed.listening:
            self._feed.publish(call.session.id, pb.Event(begun=call_to_proto(call, admin=True)))

    # Entering

    def attach(self, call: Call, process: Process, came_from: Call | None = None) -> None:
        """Move a process into a call as its main process, whose exit status is the call's.
        `came_from`: the call that it is in so far. Raises RequestError or KnobError."""
        if call.state == pb.CALL_STATE_ENDING:
            raise FailedPrecondition(f"call {call.id} is ending")
        self._leavers.check_room(call)
        self._have_guarded(call)
        with self._metrics.time("attach"):
            _move(process, call.leaf)
        self._leave_others(call, process)
        self._leavers.replaced(call)
        self._begin_account(call)
        if call.purpose is None:
            call.purpose = purpose_of(call, process, came_from)
            self._loop.call_soon(with_parents, call, came_from)
        call.main = process.copy()
        call.cpus_seen = cpus_of(process.pid)
        self._affinity.pin(call, process)
        tell_resident(call, process, self._rightsize)
        call.client_status = call.exit_status = None
        self._leftovers.watch(call)
        call.went_on_as = ""
        self._entered(call, process.pid)

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
        Raises KnobError, or FailedPrecondition if the process has ended."""
        self._have_guarded(call)
        _move(process, call.leaf)
        self._entered(call, process.pid)
        if call.state == pb.CALL_STATE_ENDING:
            kill(call)

    def _entered(self, call: Call, pid: int) -> None:
        """Take down that a process has entered a call. Raises KnobError."""
        self._observer.entered(pid)
        put_call_before_agent(call.session, call.cgroup, pid, call.grant.priority)
        call.entered = True
        if call.state == pb.CALL_STATE_PENDING:
            call.state = pb.CALL_STATE_RUNNING
        self._deadlines.entered(call)
        # Before the answer: where there is one CPU, the command may be over before anything else.
        self._keep(call)
        if call.id in self._untold:
            self._loop.call_soon(self._told, call.id)

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
        self.actions.io_unweight(call, "Its grant was changed.")
        leftovers = call.grant.leftovers
        call.grant = rewrite_grant(call.session, call.cgroup, call.grant, grant)
        self._note_disk_limit(call)
        memory_high.write(call)
        if call.grant.leftovers != leftovers:
            self._leftovers.watch(call)
        call.likely_bytes, _ = self._reports.expect(call.session, call.name, call.argv, call.grant)
        self._keep(call)
        self._deadlines.changed(call)
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
        # The last word on each field: however often a grant is changed, its record stays small.
        said = {sentence.partition(":")[0]: sentence for sentence in (*call.cut, *cut_now)}
        call.cut = tuple(said.values())
        return grant

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
        """Move a process into a session's agent leaf. Raises KnobError, or FailedPrecondition if
        the process has ended."""
        _move(process, session.agent)
        self._observer.agent_entered(process.pid)


def _move(process: Process, leaf: Cgroup) -> None:
    """Move a process into a cgroup. Raises KnobError, or FailedPrecondition if it has ended.

    The kernel goes by the pid, which another process has some time after this one has ended; that
    one must stay where it is. So it is asked before, too.
    """
    if pidfd_alive(process.pidfd):
        leaf.attach(process.pid)
        if pidfd_alive(process.pidfd):
            return
    raise FailedPrecondition(f"process {process.pid} ended before it could enter")
