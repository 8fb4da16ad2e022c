"""Processes that hold calls open: one pidfd is watched for each, however many calls it has."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from functools import partial

from agentcgroupd.errors import KnobError
from agentcgroupd.state.session import Call
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

IDLE_KEPT = 256
"""Owners without a call that are watched on: most begin another one soon."""


class Owners:
    """Watches the processes that hold calls open, and tells of each call whose owner has ended."""

    def __init__(self, gone: Callable[[Call], None], turns: Turns) -> None:
        """`gone`: called for each call of an owner that has ended, when `call.owner` is None
        already, each in a turn of its own."""
        self._gone = gone
        self._turns = turns
        self._loop = asyncio.get_running_loop()
        self._calls: dict[tuple[int, int], set[Call]] = {}
        self._fds: dict[tuple[int, int], int] = {}
        self._idle: dict[tuple[int, int], None] = {}
        """Owners without a call, the longest first."""

    def add(self, call: Call) -> None:
        """Start to watch `call.owner`, whose pidfd stays the caller's."""
        owner = call.owner
        assert owner is not None
        key = (owner.pid, owner.start_ticks)
        if key not in self._calls:
            self._calls[key] = set()
            self._fds[key] = os.dup(owner.pidfd)
            self._loop.add_reader(self._fds[key], self._ended, key)
        self._idle.pop(key, None)
        self._calls[key].add(call)

    def drop(self, call: Call) -> None:
        """Stop watching for this call; no error if it has no owner."""
        owner, call.owner = call.owner, None
        if owner is None:
            return
        key = (owner.pid, owner.start_ticks)
        calls = self._calls.get(key)
        if calls is None:
            return
        calls.discard(call)
        if not calls:
            self._idle[key] = None
        if len(self._idle) > IDLE_KEPT:
            self._close(next(iter(self._idle)))

    def _close(self, key: tuple[int, int]) -> None:
        self._idle.pop(key, None)
        if self._calls.pop(key, None) is not None:
            fd = self._fds.pop(key)
            self._loop.remove_reader(fd)
            os.close(fd)

    def _ended(self, key: tuple[int, int]) -> None:
        calls = self._calls.get(key, set())
        self._close(key)
        for call in calls:
            call.owner = None
            self._turns.submit(call.session.turns_key, partial(self._let_go, call))

    def _let_go(self, call: Call) -> None:
        try:
            self._gone(call)
        except (KnobError, OSError, ValueError) as error:
            log.error("call %s: its owner ended: %s", call.id, error)
