"""Requests to end a call, taken down with what was there then; kills that last until nothing is
left of the call."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.enforce.left_running import note_left_running
from agentcgroupd.enforce.outside import SEARCH_S, find_outsiders, place_outside
from agentcgroupd.enforce.tracers import kill_tracers
from agentcgroupd.errors import KnobError
from agentcgroupd.host.syscalls import pidfd_ended, process_stat
from agentcgroupd.state.ending import CALLER_WORDS, Asked, Asker
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Call, all_inside, unix_usec

log = logging.getLogger(__name__)

AGAIN_S = 0.05
"""How long after cgroup.kill the processes that are left are killed one by one."""
AGAIN_MOST_S = 5.0
"""The longest pause between two tries; each pause is twice the one before."""
TRACERS_S = 1.6
"""From this pause on, 3 s after the first kill, tracers that keep a killed process are killed."""
TIMER, SIGNALS_TIMER = "kill", "signals"
"""Names of timers in Call.timers, all of which are cancelled when the call is over."""
SIGNALS_S = 0.005
"""How long the processes of a call are signalled at a time."""


_ASKED = {
    Asker.TIMEOUT: ("its timeout passed", "timer"),
    Asker.AGENT: ("its agent ended it", "EndCall"),
    Asker.TOOL: ("the tool of a call ended it", "EndCall"),
    Asker.OPERATOR: ("the operator ended it", "EndCall"),
    Asker.SESSION: ("its session was closed", "CloseSession"),
    Asker.POLICY: ("the policy ended it", "policy"),
    Asker.LEFTOVERS: ("its command had ended", "pidfd"),
    Asker.OUTER: ("the call that it was begun in was ended", "its outer call"),
    Asker.WENT_ON: ("its main process asked for another call", "attach"),
}
"""What each request is, as a clause, and where it comes from."""


def main_ended(call: Call) -> bool:
    """Whether the main process is known to have ended, with all of its threads, or to have gone on
    as another call."""
    if call.main is not None:
        return pidfd_ended(call.main.pidfd)
    if went_on_beside(call):
        return True
    known = call.exit_status is not None or call.client_status is not None
    return known or call.account.main_lost


def main_ended_well(call: Call) -> bool:
    """Whether the kernel has told that the main process has ended, with all of its threads, and
    with status 0."""
    return call.exit_status == 0 and call.main is not None and pidfd_ended(call.main.pidfd)


def went_on_beside(call: Call) -> bool:
    """Whether the main process has gone on as a call that is not inside this one."""
    return any(asked.by is Asker.WENT_ON for asked in call.account.asked)


def ask_end(
    call: Call,
    by: Asker,
    why: str = "",
    reason: pb.EndReason.ValueType = pb.END_REASON_UNSPECIFIED,
    search_s: float = SEARCH_S,
) -> None:
    """Take down that the end of a call was asked for, and whether its main process ran then, before
    anything is done about it. `why`: a sentence for the report, where `by` does not say it.
    `search_s`: how long processes outside of it may be looked for."""
    ran = call.entered and not main_ended(call)
    pids: list[int] = []
    try:
        pids = call.cgroup.all_procs()
    except KnobError as error:
        log.debug("call %s: its processes cannot be counted: %s", call.id, error)
    count = len(pids)
    if call.entered and not ran:
        note_left_running(call, pids)
    if ran and by is not Asker.WENT_ON:
        find_outsiders(call, pids, search_s)
    what, source = _ASKED[by]
    if reason in CALLER_WORDS:
        what += f" and says that {CALLER_WORDS[reason]}"
    if call.entered:
        state = "its main process ran" if ran else "its main process had ended"
        what += f"; {state}, and there {'was' if count == 1 else 'were'} {count} in its cgroups"
    if call.outsiders:
        what += f", and {len(call.outsiders)} that the main process had started elsewhere"
    asked = Asked(by, unix_usec(), ran, count, len(call.outsiders), why, reason)
    call.account.ask(asked, what, source)
    if ran and call.main is not None and _has_ended_main_thread(call.main.pid):
        text = f"the main thread of the main process ({call.main.pid}) had ended, others ran"
        call.account.add(text, "/proc/<pid>/stat", asked.at_unix_usec)
    try:
        # A daemon that is started again before the end has to know why it came.
        call.cgroup.set_xattr(call.record())
    except KnobError as error:
        log.debug("call %s: %s", call.id, error)


def _has_ended_main_thread(pid: int) -> bool:
    try:
        return process_stat(pid).state == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def end_inside(call: Call) -> None:
    """Take down for the calls inside a call that they end with it."""
    inside = list(all_inside(call))
    for inner in inside:
        end_with(inner, call, SEARCH_S / len(inside))


def end_with(inner: Call, outer: Call, search_s: float = SEARCH_S) -> None:
    """Take down for a call inside another one that it ends with that, unless it is over by
    itself. `search_s` as for `ask_end`."""
    if inner.state == pb.CALL_STATE_ENDING:
        return
    lives = inner.main is not None and not pidfd_ended(inner.main.pidfd)  # wherever it is
    try:
        goes_on = lives or inner.held or not inner.entered or inner.cgroup.populated()
    except KnobError as error:
        log.debug("call %s: %s", inner.id, error)
        goes_on = False
    if goes_on:
        why = f"it ended with call {outer.id} that it was begun in"
        ask_end(inner, Asker.OUTER, why, search_s=search_s)
    inner.state, inner.held = pb.CALL_STATE_ENDING, False


def terminate(call: Call) -> None:
    """Send SIGTERM to all processes of a call, and to its main process wherever that has gone; no
    error if there are none any more."""
    end_inside(call)
    outside = [process for each in (call, *all_inside(call)) for process in _outside(each)]
    _signal_all(call, signal.SIGTERM)
    for process in outside:
        process.signal(signal.SIGTERM)


def _outside(call: Call) -> list[Process]:
    """List the processes of a call that are known to be elsewhere, its main process among them."""
    main = call.main if place_outside(call) is not None else None
    return [*call.outsiders, *call.left_mains, *([] if main is None else [main])]


def kill(call: Call) -> None:
    """Kill all processes of a call, and those that are left again and again, until the call is
    over: cgroup.kill misses a process whose main thread has ended (seen on Linux 6.18). The main
    process is killed wherever it has gone, and so are those of the calls inside. On the event loop.
    Raises KnobError, or CgroupGone."""
    end_inside(call)
    for each in (call, *all_inside(call)):
        if each.main is not None and not pidfd_ended(each.main.pidfd):
            each.account.main_killed = True
            _find_more(each)
    _again_later(call, AGAIN_S)
    try:
        call.cgroup.kill()
    finally:
        _kill_main_and_outsiders(call)


def _signal_all(call: Call, number: int) -> None:
    """Send a signal to all processes of a call: what is not done after SIGNALS_S follows while the
    loop goes round, unless the call is over by then or they are sent another one."""
    _cancel(call, SIGNALS_TIMER)
    _signal_more(call, call.cgroup.signal_parts(number))


def _signal_more(call: Call, parts: Iterator[int]) -> None:
    end = time.perf_counter() + SIGNALS_S
    try:
        for _ in parts:
            if time.perf_counter() >= end:
                later = asyncio.get_running_loop().call_later
                call.timers[SIGNALS_TIMER] = later(SIGNALS_S, _signal_more, call, parts)
                return
    except KnobError as error:
        log.debug("call %s: %s", call.id, error)
    call.timers.pop(SIGNALS_TIMER, None)


def _cancel(call: Call, name: str) -> None:
    timer = call.timers.pop(name, None)
    if timer is not None:
        timer.cancel()


def _find_more(call: Call) -> None:
    """Take along what the main process has started elsewhere since its end was asked for."""
    try:
        inside = call.cgroup.all_procs()
    except KnobError:
        inside = []
    if not find_outsiders(call, inside):
        return
    asked = call.account.asked
    for at, each in enumerate(asked):
        if each.main_ran and each.by is not Asker.WENT_ON:
            asked[at] = replace(each, outside=len(call.outsiders))
            return


def _again_later(call: Call, wait_s: float) -> None:
    _cancel(call, TIMER)
    loop = asyncio.get_running_loop()
    call.timers[TIMER] = loop.call_later(wait_s, _kill_again, call, wait_s)


def _kill_main_and_outsiders(call: Call) -> None:
    for each in (call, *all_inside(call)):
        if each.main is not None:
            each.main.signal(signal.SIGKILL)
        kill_outsiders(each)


def kill_command(
    call: Call, by: Asker, why: str, reason: pb.EndReason.ValueType = pb.END_REASON_UNSPECIFIED
) -> None:
    """Kill the main process of a call, wherever it is, and take down who asked for that; the call
    stays open. Nothing is done where the main process has ended. `why` as for `ask_end`."""
    if call.main is None or pidfd_ended(call.main.pidfd):
        return
    call.account.main_killed = True
    ask_end(call, by, why, reason)
    call.main.signal(signal.SIGKILL)


def kill_outsiders(call: Call) -> None:
    """Kill what the main process had started elsewhere when the end of the call was asked for, and
    the main processes of earlier commands that are elsewhere."""
    for process in (*call.outsiders, *call.left_mains):
        process.signal(signal.SIGKILL)


def _kill_again(call: Call, waited_s: float) -> None:
    _signal_all(call, signal.SIGKILL)
    _kill_main_and_outsiders(call)
    if waited_s >= TRACERS_S:
        kill_tracers(call)
    _again_later(call, min(2 * waited_s, AGAIN_MOST_S))
