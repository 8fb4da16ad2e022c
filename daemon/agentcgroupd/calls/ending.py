"""Open calls, and how each of them ends: every way out removes its cgroup and leaves a report.

A call ends when its cgroup is empty, whoever forgot to say so. One that was begun through gRPC is
held open by its owner, so that several commands can run in it; it ends when the owner says so, or
when the cgroup is empty and the owner is gone, or has closed the connection of a call for one
command.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import replace
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls import nesting
from agentcgroupd.calls.evidence import main_status
from agentcgroupd.calls.facts import CALLER_REASONS
from agentcgroupd.calls.leaving import Leavers
from agentcgroupd.calls.leftovers import Leftovers, kept_feedback
from agentcgroupd.calls.observer import CallObserver
from agentcgroupd.calls.owners import Owners
from agentcgroupd.calls.reports import Reports
from agentcgroupd.calls.stuck import stuck_words
from agentcgroupd.calls.timers import Deadlines
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.config import CallDefaults
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.enforce.kill import (
    ask_end,
    end_with,
    kill,
    kill_command,
    kill_outsiders,
    main_ended_well,
)
from agentcgroupd.errors import (
    CgroupGone,
    KnobError,
    Unavailable,
)
from agentcgroupd.state.ending import Asker
from agentcgroupd.state.process import Process
from agentcgroupd.state.second_records import SecondRecords
from agentcgroupd.state.session import (
    Call,
    Session,
    all_inside,
)
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.telemetry.wire import grant_to_proto
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

END_TIMEOUT_S = 15.0
"""How long EndCall waits for killed processes to be gone. A process in uninterruptible sleep can
take longer; its call ends when it does, and EndCall is told so."""


class OpenCalls:
    """All open calls. Runs on the event loop; only the kernel is waited for."""

    def __init__(
        self,
        config: CallDefaults,
        events: FileEvents,
        actions: Actions,
        notices: Notices,
        reports: Reports,
        observer: CallObserver,
        admit: Callable[[Call, Process], None],
        turns: Turns,
        second: SecondRecords,
    ) -> None:
        """`admit` moves one more process into a call. `turns`: when a session has its turn on the
        loop. `second`: where the records of open calls are kept besides."""
        self._config = config
        self._events = events
        self.actions = actions
        self._notices = notices
        self._audit, self._metrics, self._feed = notices.audit, notices.metrics, notices.feed
        self._reports = reports
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._owners = Owners(self.let_go_of, turns)
        self._leavers = Leavers(notices, admit, self._recheck)
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
        self._leftovers = Leftovers(config, notices, self._populated, self._kill, self._recheck)
        self.open: dict[str, Call] = {}
        self.disk_limited: dict[str, Call] = {}
        """Open calls that have a limit of what they write to disks, by id."""
        self._postponed: dict[str, Call] = {}
        self._untold: dict[str, Callable[[], None]] = {}
        """Calls that have begun and are about to be told of, with what does that."""
        self._unguarded: dict[str, Call] = {}
        """Calls of which `_have_guarded` is still to be done, by id."""
        self.ended = 0
        self.second = second

    # Following

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
        self._unguarded[call.id] = call
        self._note_disk_limit(call)

    def _note_disk_limit(self, call: Call) -> None:
        if call.grant.disk_max_bytes is not None:
            self.disk_limited[call.id] = call
        else:
            self.disk_limited.pop(call.id, None)

    def _have_guarded(self, call: Call) -> None:
        """Start the deadlines of a call and have it guarded, unless that is done: after the answer
        to its caller, but before a process enters it."""
        if self._unguarded.pop(call.id, None) is not None:
            self._deadlines.begun(call)
            self._observer.call_begun(call)

    def _keep(self, call: Call) -> None:
        """Write a call's record, and the second one. Raises KnobError."""
        record = call.record()
        call.cgroup.set_xattr(record)
        self.second.keep(call.id, call.cgroup.id, record)

    def _told(self, call_id: str) -> None:
        """Tell of a call that has begun, unless that is done."""
        tell = self._untold.pop(call_id, None)
        if tell is not None:
            tell()

    def restore(self, session: Session, call: Call) -> None:
        """Take up a call that an earlier daemon began; it may have ended meanwhile. Raises
        BpfError, KnobError or OSError."""
        call.held = call.held and call.owner is not None
        self._follow(call)
        self._have_guarded(call)
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
        elif call.one_command and call.entered:
            self._deadlines.answered(call)

    # Ending

    def end(
        self,
        call: Call,
        detach: bool,
        status: int | None,
        asker: Asker,
        reason: pb.EndReason.ValueType = pb.END_REASON_UNSPECIFIED,
        why: str = "",
    ) -> pb.Report | Coroutine[Any, Any, pb.Report]:
        """End a call and give its report; with `detach`, only let go of it. Where processes have
        to die first, the report is to be awaited. `status`: of the main process, by its parent;
        `reason`: what the asker says for the report. One that says that its command has ended lets
        what is left go on if the call's leftovers are to be kept. `why`: who it is, as a clause,
        where `asker` does not say it."""
        if status is not None:
            call.client_status = status
        call.held = False
        goes_on = self._goes_on(call)
        keep = reason == pb.END_REASON_DONE and call.grant.leftovers == "keep"
        ends_it = not detach and not keep
        # Of a main process that has ended a reason may say who killed it; of one that is let go of,
        # nothing.
        if ends_it if goes_on else reason in CALLER_REASONS:
            self._leavers.look(call)
            ask_end(call, asker, why, reason)
        report = None if goes_on else self._finish(call)
        if report is not None:
            return report
        if detach or keep:
            call.grant = replace(call.grant, leftovers="keep")
            call.cgroup.set_xattr(call.record())
            return self._so_far(call, keep)
        report_later = self.ended_report(call)
        self._kill(call)
        return report_later

    def end_command(
        self, call: Call, asker: Asker, reason: pb.EndReason.ValueType, why: str
    ) -> pb.Report:
        """Kill the main process of a call that stays open; say so. Parameters as those of `end`."""
        self._leavers.look(call)
        kill_command(call, asker, why, reason)
        return self._so_far(call, False)

    def ended_report(self, call: Call) -> Coroutine[Any, Any, pb.Report]:
        """Give the report of an open call, to be awaited: it comes when the call has ended. What is
        awaited raises Unavailable after END_TIMEOUT_S."""
        if call.done is None:
            call.done = self._loop.create_future()
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
                f"call {call.id} was killed, but {stuck_words(call)}; its report comes when the "
                "last process has ended"
            ) from None

    def _kill(self, call: Call) -> None:
        """Kill all processes of a call, whose end was asked for."""
        call.state = pb.CALL_STATE_ENDING
        self.actions.hurry(call)
        try:
            kill(call)
        except CgroupGone:
            self._finish(call)
        # The innermost first: a call is over after those inside it.
        for each in reversed((call, *all_inside(call))):
            if each.id in self.open and self._leavers.outlives(each):
                self._deadlines.killed(each, self._give_up)

    def _give_up(self, call: Call) -> None:
        """Wait no longer for a main process that is outside of its call and does not die."""
        call.account.given_up = True
        if not self._populated(call):
            self._finish(call)

    def _populated(self, call: Call) -> bool:
        try:
            if not call.cgroup.populated():
                return False
            if not call.entered:
                self._found_inside(call)
        except CgroupGone:
            call.account.removed = True
            return False
        return True

    def _found_inside(self, call: Call) -> None:
        """Take down that a process has entered by another way than the attach socket, by a write to
        cgroup.procs. Nobody says that it is the main process, so its end is not the call's. Raises
        KnobError."""
        call.entered = True
        if call.state == pb.CALL_STATE_PENDING:
            call.state = pb.CALL_STATE_RUNNING
        self._deadlines.entered(call)
        self._keep(call)

    def _goes_on(self, call: Call) -> bool:
        """Whether a process of a call is left, in its cgroup or, as its main process or that of a
        call inside it, elsewhere."""
        return self._populated(call) or any(
            self._leavers.outlives(each) for each in (call, *all_inside(call))
        )

    def _recheck(self, call: Call) -> None:
        """Check a call whose main process has ended, or that waited for that of one inside it."""
        try:
            self._changed(call)
        except (KnobError, OSError, ValueError) as error:
            log.error("call %s: whether it is over: %s", call.id, error)

    def _changed(self, call: Call) -> None:
        """Check a call whose cgroup.events has changed: a process entered, the last one left, or
        the call was frozen or thawed."""
        if call.id not in self.open or self._goes_on(call):
            return
        if call.observed and self._observer.behind():
            self._postponed[call.id] = call
            return
        if call.one_command and main_ended_well(call):
            self._finish(call)
        elif call.held and call.entered and call.state != pb.CALL_STATE_ENDING:
            self._deadlines.emptied(call)
        elif call.entered or call.account.removed or call.state == pb.CALL_STATE_ENDING:
            self._finish(call)

    def let_go_of(self, call: Call) -> None:
        """Let go of a call: who held it open has ended, or waits for it no longer."""
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
        if any(self._leavers.outlives(each) for each in (call, *all_inside(call))):
            return None
        for inner in list(call.inner.values()):
            # Its cgroup is in this one, so it is empty too.
            if inner.held or not inner.entered:
                end_with(inner, call)
            if self._finish(inner) is None:
                return None  # a process has entered it meanwhile, and so this one
        with self._metrics.time("finish"):
            self._observer.catch_up()
            nesting.went_on(call)
            self._observer.call_ending(call)
            report = self._reports.of(call)
            if call.line is not None:
                # Nothing that follows changes the report, and its caller waits for it. If a process
                # has just been put into the cgroup, the call ends with that.
                call.held = False
                call.line(report)
            self._told(call.id)
            # Before the cgroup goes: a daemon killed in between would lose the report. One killed
            # after this finds the empty cgroup and writes the entry again; the later one counts.
            self._reports.write(report)
            nesting.inner_ends(call)
            removed = self._remove(call)
            if removed is None:
                return None
            kill_outsiders(call)
            self._forget(call, removed)
            self.second.drop(call.id)
            self.ended += 1
            self._reports.keep(call.session, report)
            self._reports.learn(call, report)
        self._observer.call_ended(call, report.memory_peak_bytes)
        if call.done is not None and not call.done.done():
            call.done.set_result(report)
        if call.parent is not None:
            # That may have waited for this one's main process alone, which nothing else tells.
            self._loop.call_soon(self._recheck, call.parent)
        return report

    def _remove(self, call: Call) -> bool | None:
        """Remove the cgroup of a call; False: it cannot be. None: a process has entered since it
        was seen to be empty; when that ends, the call is looked at again."""
        try:
            call.cgroup.remove()
        except KnobError as error:
            if error.errno == errno.EBUSY:
                self._audit.write("call_goes_on", session=call.session.id, call=call.id)
                return None
            log.error("call %s: its cgroup could not be removed: %s", call.id, error)
            return False
        return True

    def _forget(self, call: Call, removed: bool = False) -> None:
        self.open.pop(call.id, None)
        self._unguarded.pop(call.id, None)
        self.disk_limited.pop(call.id, None)
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
        for process in (call.main, *call.outsiders, *call.left_mains):
            if process is not None:
                process.close()
        call.main = None
        call.outsiders.clear()
        call.left_mains.clear()

    def withdraw(self, call: Call) -> None:
        """End a call whose process could not enter."""
        self._finish(call)

    # Checking

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
