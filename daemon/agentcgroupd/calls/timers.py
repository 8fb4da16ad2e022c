"""Timers of open calls: how long a call may stand empty, and how long it may last."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.config import CallDefaults
from agentcgroupd.enforce.kill import ask_end, terminate
from agentcgroupd.enforce.pause import paused_usec
from agentcgroupd.state.ending import Asker
from agentcgroupd.state.session import (
    Call,
    all_inside,
    boottime_usec,
    frozen_usec,
    held_around,
)
from agentcgroupd.turns import Turns
from agentcgroupd.units import show_usec

FROZEN_CHECK_USEC = 100_000
"""How long after its timeout a call that is paused then is checked again."""
ASKS_AGAIN_USEC = 1_000_000
"""How soon a caller asks for a report again whose connection has broken; the SDK does at once."""
GIVE_UP_USEC = 5_000_000
"""How long a main process outside of its call may take to die of SIGKILL."""


class Deadlines:
    """Timers of all open calls. Made and used on a running loop."""

    def __init__(
        self,
        config: CallDefaults,
        populated: Callable[[Call], bool],
        goes_on: Callable[[Call], bool],
        look: Callable[[Call], None],
        finish: Callable[[Call], Any],
        kill: Callable[[Call], None],
        room_given_up: Callable[[Call], None],
        turns: Turns,
    ) -> None:
        """`populated`: whether there are processes in a call; `goes_on`: or its main process lives
        elsewhere. `look` finds out where that is. `finish` ends a call that is over; `kill` one
        that is not. `room_given_up`: called when no room is kept any more for a call with no
        process in it. `turns`: when what a timer does has its turn, for many may pass at the same
        moment."""
        self._config = config
        self._populated, self._goes_on = populated, goes_on
        self._look = look
        self._finish = finish
        self._kill = kill
        self._turns = turns
        self._room_given_up = room_given_up
        self._loop = asyncio.get_running_loop()

    def begun(self, call: Call) -> None:
        """Start the timers of a call that is new or was found again."""
        if not call.entered:
            self._set(call, "attach", self._config.attach_timeout, self._not_entered)
            self._set(call, "room", self._config.keep_room, self._give_up_room)
        self.granted(call)

    def changed(self, call: Call) -> None:
        """Set a call's timeout as its grant says now, which has just been changed."""
        call.timeout_late_usec = max(0, -(_left_usec(call) or 0))
        self.granted(call)

    def granted(self, call: Call) -> None:
        """Set a call's timeout as its grant says now, and those of the calls inside. One that would
        pass no sooner than that of the call around it is left to that."""
        for each in (call, *all_inside(call)):
            left, around = _left_usec(each), _left_around(each)
            if left is None or (around is not None and around <= left):
                self._cancel(each, "timeout")
            else:
                self._set(each, "timeout", left, self._timed_out)

    def entered(self, call: Call) -> None:
        """Stop waiting for a process to enter a call."""
        self._cancel(call, "attach")
        self._cancel(call, "idle")
        self._cancel(call, "room")
        call.keeps_room = True

    def emptied(self, call: Call) -> None:
        """Start to wait for the next process of a call that is empty and held open."""
        if "idle" not in call.timers:
            self._set(call, "idle", self._config.idle_timeout, self._idle)
            self._set(call, "room", self._config.keep_room, self._give_up_room)

    def answered(self, call: Call) -> None:
        """Have a call end soon whose only command ended before this daemon started: its caller has
        the report of the daemon before, or asks for one at once."""
        self._set(call, "idle", ASKS_AGAIN_USEC, self._finish)

    def killed(self, call: Call, give_up: Callable[[Call], None]) -> None:
        """Have a call given up whose main process, which has left it, does not die in time."""
        self._set(call, "give_up", GIVE_UP_USEC, give_up)

    def drop(self, call: Call) -> None:
        """Stop all timers of a call."""
        for timer in call.timers.values():
            timer.cancel()
        call.timers.clear()

    def _set(self, call: Call, name: str, usec: int, action: Callable[[Call], None]) -> None:
        self._cancel(call, name)
        due = self._loop.call_later(max(0, usec) / 1e6, self._due, call, name, action)
        call.timers[name] = due

    def _due(self, call: Call, name: str, action: Callable[[Call], None]) -> None:
        timer = call.timers.get(name)

        def act() -> None:
            # It may have been stopped or set anew while it waited for its turn.
            if call.timers.get(name) is timer:
                action(call)

        self._turns.submit(call.session.turns_key, act)

    @staticmethod
    def _cancel(call: Call, name: str) -> None:
        timer = call.timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _give_up_room(self, call: Call) -> None:
        if not self._populated(call):
            call.keeps_room = False
            self._room_given_up(call)

    def _not_entered(self, call: Call) -> None:
        if not self._populated(call):
            self._finish(call)

    def _idle(self, call: Call) -> None:
        if call.held and not self._populated(call):
            self._finish(call)

    def _timed_out(self, call: Call) -> None:
        """End a call that has had its time, not counting the time for which it was frozen."""
        used = boottime_usec() - call.began_boot_usec - paused_usec(call)
        left = (call.grant.timeout_usec or 0) - used
        if left > 0 or call.frozen_since_usec is not None or held_around(call) is not None:
            self._set(call, "timeout", max(left, FROZEN_CHECK_USEC), self._timed_out)
            return
        call.held = False
        if not self._goes_on(call):
            if not call.entered:
                # Else it would be told that nobody wanted to enter.
                ask_end(call, Asker.TIMEOUT, _late_words(call))
            self._finish(call)
            return
        self._look(call)
        call.state = pb.CALL_STATE_ENDING
        ask_end(call, Asker.TIMEOUT, _late_words(call))
        terminate(call)
        self._set(call, "kill", self._config.term_grace, self._kill)


def _late_words(call: Call) -> str:
    """Say that a timeout had passed when it was set; empty: it had not."""
    late = call.timeout_late_usec
    if not late:
        return ""
    ran = show_usec((call.grant.timeout_usec or 0) + late)
    return f"which it was given when it had run for {ran} already"


def _left_usec(call: Call) -> int | None:
    """What is left of a call's timeout; None: it has none."""
    if call.grant.timeout_usec is None:
        return None
    now = boottime_usec()
    return call.grant.timeout_usec - (now - call.began_boot_usec - frozen_usec(call, now))


def _left_around(call: Call) -> int | None:
    """The least that is left of the timeouts of the calls that a call is in; None: they have
    none."""
    found, outer = list[int](), call.parent
    while outer is not None:
        left = _left_usec(outer)
        found += [] if left is None else [left]
        outer = outer.parent
    return min(found, default=None)
