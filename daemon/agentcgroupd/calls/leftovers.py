"""The end of a call's command, and processes that it leaves running: ended shortly after it, or
kept, as its intent says.

What a command leaves running in a call that its owner holds open is not looked after here: the
owner says when its commands have ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.evidence import main_status
from agentcgroupd.config import CallDefaults
from agentcgroupd.enforce.kill import ask_end, main_ended, terminate, went_on_beside
from agentcgroupd.enforce.left_running import note_left_running
from agentcgroupd.errors import KnobError
from agentcgroupd.state.ending import Asker
from agentcgroupd.state.session import Call
from agentcgroupd.telemetry.notices import Notices

log = logging.getLogger(__name__)

_GRACE, _KILL = "leftovers", "leftovers_kill"
"""Names of timers in Call.timers, all of which are cancelled when the call is over."""


def kept_feedback(call: Call) -> pb.Feedback:
    """Tell the agent that processes of a call go on, and how to end them. Raises KnobError."""
    count = len(call.cgroup.all_procs())
    sentence = (
        f"What the command left running (processes: {count}) goes on in call {call.id}, within "
        f"its limits, as leftovers = keep asks. `agentcg end {call.id}` ends it."
    )
    code = pb.FEEDBACK_CODE_LEFTOVERS_KEPT
    return pb.Feedback(code=code, sentence=sentence, numbers={"processes": count})


class Leftovers:
    """Watches the main processes of calls. Used on the event loop."""

    def __init__(
        self,
        config: CallDefaults,
        notices: Notices,
        populated: Callable[[Call], bool],
        kill: Callable[[Call], None],
        recheck: Callable[[Call], None],
    ) -> None:
        """`kill` kills all processes of a call whose end was asked for; `recheck` ends a call that
        is over."""
        self._config, self._notices = config, notices
        self._populated, self._kill, self._recheck = populated, kill, recheck
        self._loop = asyncio.get_running_loop()
        self._fds: dict[Call, int] = {}

    def watch(self, call: Call) -> None:
        """Wait for the end of a call's main process; to be called again when it has another one,
        nobody holds the call open any more, or its grant says something else."""
        self.drop(call)
        for name in (_GRACE, _KILL):
            self._cancel(call, name)
        if call.main is not None:
            # A pidfd is readable when the last thread has ended, not when the first one has.
            fd = self._fds[call] = os.dup(call.main.pidfd)
            self._loop.add_reader(fd, self._main_ended, call)
        elif call.held or went_on_beside(call) or not main_ended(call):
            return
        elif call.grant.leftovers == "end":
            self._later(call, _GRACE, self._config.leftovers_grace, self._due)

    def drop(self, call: Call) -> None:
        """Wait no more; no error if nothing was waited for."""
        fd = self._fds.pop(call, None)
        if fd is not None:
            self._loop.remove_reader(fd)
            os.close(fd)

    def _later(self, call: Call, name: str, usec: int, action: Callable[[Call], None]) -> None:
        self._cancel(call, name)
        call.timers[name] = self._loop.call_later(usec / 1e6, self._carefully, action, call)

    @staticmethod
    def _cancel(call: Call, name: str) -> None:
        timer = call.timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    @staticmethod
    def _carefully(action: Callable[[Call], None], call: Call) -> None:
        try:
            action(call)
        except KnobError as error:
            log.debug("call %s: what it left running cannot be dealt with: %s", call.id, error)

    def _main_ended(self, call: Call) -> None:
        self.drop(call)
        # On older kernels the status is lost as soon as the parent has waited for the process.
        status, evidence = main_status(call)
        if evidence == pb.EVIDENCE_KERNEL:
            call.exit_status = status
        if call.one_command and call.exit_status == 0:
            self._recheck(call)
            if call.main is None:
                return  # it was over
        self._carefully(self._keep_status, call)
        if not call.held:
            self._later(call, _GRACE, self._config.leftovers_grace, self._due)

    def _keep_status(self, call: Call) -> None:
        """Keep how the command ended for a daemon that is started again, if the call goes on."""
        if call.held or self._populated(call):
            call.cgroup.set_xattr(call.record())

    def _due(self, call: Call) -> None:
        """End or keep what is left some time after the command has ended. An empty call is ended by
        its cgroup.events."""
        if call.state == pb.CALL_STATE_ENDING or not self._populated(call):
            return
        note_left_running(call, call.cgroup.all_procs())
        if call.grant.leftovers == "keep":
            if not call.observed:
                self._notices.tell(call.session, call.id, kept_feedback(call))
            return
        ask_end(call, Asker.LEFTOVERS)
        if call.frozen_since_usec is not None:
            # SIGTERM would wait for the thaw, and the memory is wanted now.
            self._kill(call)
            return
        call.state = pb.CALL_STATE_ENDING
        terminate(call)
        self._later(call, _KILL, self._config.term_grace, self._kill)
