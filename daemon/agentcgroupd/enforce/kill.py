"""Kills of calls that last until nothing is left of the call."""

from __future__ import annotations

import asyncio
import logging
import signal

from agentcgroupd.errors import KnobError
from agentcgroupd.state.session import Call

log = logging.getLogger(__name__)

AGAIN_S = 0.05
"""How long after cgroup.kill the processes that are left are killed one by one."""
AGAIN_MOST_S = 5.0
"""The longest pause between two tries; each pause is twice the one before."""
TIMER = "kill"
"""Name of the timer in Call.timers, all of which are cancelled when the call is over."""


def kill(call: Call) -> None:
    """Kill all processes of a call, and those that are left again and again, until the call is
    over: cgroup.kill misses a process whose main thread has ended (seen on Linux 6.18). On the
    event loop. Raises KnobError, or CgroupGone."""
    _again_later(call, AGAIN_S)
    call.cgroup.kill()


def _again_later(call: Call, wait_s: float) -> None:
    before = call.timers.pop(TIMER, None)
    if before is not None:
        before.cancel()
    loop = asyncio.get_running_loop()
    call.timers[TIMER] = loop.call_later(wait_s, _kill_again, call, wait_s)


def _kill_again(call: Call, waited_s: float) -> None:
    try:
        call.cgroup.signal(signal.SIGKILL)
    except KnobError as error:
        log.debug("call %s: %s", call.id, error)
    _again_later(call, min(2 * waited_s, AGAIN_MOST_S))
