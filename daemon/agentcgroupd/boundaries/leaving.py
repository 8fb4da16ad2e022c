"""Processes that are moved out of calls, or are made outside of them: counted at once, and told, as
far as they are few, when there is time.

A tool can move processes as fast as it likes. So the kernel's program tells of some in each second,
the first of each call are told one by one, and the rest is only counted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial

from agentcgroup.text import printable
from agentcgroupd.boundaries.processes import key_of
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.calls.counters import shown
from agentcgroupd.calls.words import gone_words_of
from agentcgroupd.enforce.outside import outside_path
from agentcgroupd.errors import BpfError, KnobError
from agentcgroupd.state.ending import GONE_MOST, Gone
from agentcgroupd.state.session import Call, unix_usec
from agentcgroupd.telemetry.notices import Notices

log = logging.getLogger(__name__)

SOURCE = "cgroup_attach_task"


class Moves:
    """Takes down what leaves calls. On the event loop."""

    def __init__(self, lifecycle: Lifecycle, notices: Notices, calls: Mapping[int, Call]) -> None:
        """`calls`: the open ones, by the ids of their cgroups."""
        self._lifecycle, self._notices, self._calls = lifecycle, notices, calls

    def start(self) -> None:
        """Have the programs know of the processes that are in calls already."""
        inner_first = sorted(self._calls.values(), key=lambda c: -len(c.cgroup.path.parts))
        for call in inner_first:
            try:
                for pid in call.cgroup.all_procs():
                    self._lifecycle.note(pid, call.cgroup.id)
            except (BpfError, KnobError, OSError) as error:
                log.warning("call %s: that its processes leave is not told: %s", call.id, error)

    def count(self, event: abi.LeftEvent) -> list[partial[None]]:
        """Count a process that left, at once: the end of its call may be dealt with next. What the
        daemon moves itself is told where it does so. Returns what is to be told later."""
        call = self._calls.get(event.event.cgroup_id)
        if call is None or event.mover.pid == os.getpid():
            return []
        main, account = call.main, call.account
        is_main = main is not None and (main.pid, main.start_ticks) == key_of(event.process)
        account.gone_more = account.gone_more or bool(event.more)
        number = account.count_gone(is_main)
        if number > GONE_MOST + 1:
            return []
        if number > GONE_MOST:
            return [partial(self._tell_more, call)]
        gone = _gone(call, event)
        words = gone_words_of(gone)
        source = "sched_process_fork" if event.made else SOURCE
        account.name_gone(gone, is_main, words, source)
        return [partial(self._tell, call, gone, is_main, words)]

    def _tell(self, call: Call, gone: Gone, is_main: bool, words: str) -> None:
        _keep(call)
        self._notices.process_left(call, gone, is_main, f"{words}, where its limits do not hold.")

    def _tell_more(self, call: Call) -> None:
        _keep(call)
        self._notices.more_left(call)

    def lost(self) -> None:
        """Take down that more may have left than was told."""
        for call in self._calls.values():
            if not call.account.gone_more:
                call.account.gone_more = True
                what = "events of processes that left this call or another one were lost"
                call.account.add(what, SOURCE, unix_usec())


def _gone(call: Call, event: abi.LeftEvent) -> Gone:
    name, by = (printable(p.comm.decode("utf-8", "replace")) for p in (event.process, event.mover))
    path = outside_path(call, call.session.cgroup, event.to_cgroup_id)
    if path is None:
        # It has been removed. The kernel's path begins at the root of the tree, and may be cut.
        path = bytes(event.path).split(b"\0")[0].decode("utf-8", "replace")
    path = shown(path) if path else "a cgroup that is gone"
    return Gone(event.process.pid, name, event.mover.pid, by, path, unix_usec())


def _keep(call: Call) -> None:
    """Write the call's record, for a daemon that is started again."""
    try:
        call.cgroup.set_xattr(call.record())
    except KnobError as error:
        log.debug("call %s: %s", call.id, error)
