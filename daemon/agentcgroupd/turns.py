"""Fair turns on the event loop: whoever asks for much waits for itself, not others for it.

Work is queued by key (a session, or all users outside of sessions together, who share their turns).
The key that has had the least time on the loop is next, so that one with ten thousand things to do
delays another by one thing at a time. After SLICE_S the loop goes round, whatever is left.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from agentcgroupd.errors import AgentcgroupdError

log = logging.getLogger(__name__)

SLICE_S = 0.002
"""How long queued work may keep the loop before everything else on it has a turn."""
LEAST_S = 20e-6
"""What a turn counts at least, so that work too short to measure is not free."""
KEYS_KEPT = 1024
"""Keys whose time is remembered although they may have nothing to make up for."""
KEYS_MOST = 8192
"""More are never remembered: half of them are dropped then."""
WAITED_MOST_S = 0.005
"""What work that was waited for counts at most: other work may have run in between."""

_HANDED_OVER = object()


class _Fair:
    """Queues of work, one for each key. The key that has had the least time is next."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Callable[[], object]]] = {}
        self._next: list[tuple[float, int, str]] = []
        """A heap of the keys that have work: the time they have had, order of arrival, key."""
        self._had: dict[str, float] = {}
        """Time that a key has had, as long as that is more than those who begin now start with."""
        self._now = 0.0
        """The time had by the key whose turn was last: what a newcomer starts with."""
        self._order = 0

    def __bool__(self) -> bool:
        """Whether there is work."""
        return bool(self._next)

    def waiting(self, key: str) -> int:
        """How much work of a key is queued."""
        return len(self._queues.get(key, ()))

    def put(self, key: str, work: Callable[[], object]) -> None:
        """Queue work of a key."""
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = deque()
            self._enter(key)
        queue.append(work)

    def take(self) -> tuple[str, Callable[[], object]]:
        """The work that is next, and its key, which is out of the row until it is `done`."""
        had, _, key = heapq.heappop(self._next)
        self._now = max(self._now, had)
        return key, self._queues[key].popleft()

    def done(self, key: str, seconds: float) -> None:
        """Count what was taken, and take its key in again if it has more."""
        self.spent(key, seconds)
        if self._queues[key]:
            self._enter(key)
        else:
            del self._queues[key]
        if not self._next and len(self._had) > KEYS_KEPT:
            self._forget()

    def spent(self, key: str, seconds: float) -> None:
        """Count time that a key has had."""
        self._had[key] = max(self._had.get(key, 0.0), self._now) + max(seconds, LEAST_S)
        if len(self._had) > KEYS_MOST:
            self._forget()

    def _forget(self) -> None:
        """Drop what has been had by keys that start level with newcomers again, and where there are
        very many others, by those who had least."""
        had = {key: had for key, had in self._had.items() if had > self._now}
        if len(had) > KEYS_MOST // 2:
            had = dict(heapq.nlargest(KEYS_MOST // 2, had.items(), key=lambda item: item[1]))
        self._had = had

    def _enter(self, key: str) -> None:
        self._order += 1
        had = max(self._had.get(key, 0.0), self._now)
        heapq.heappush(self._next, (had, self._order, key))


class Turns:
    """Queues of work, one for each key; used on one event loop.

    A key `group/member` is one of a group: all its members together have the turns of one key, and
    share them among themselves in the same way. So who can make as many keys as it likes gets no
    more by that.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._all = _Fair()
        """By key, or by group; for each work of a member its group has an entry."""
        self._groups: dict[str, _Fair] = {}
        self._is_scheduled = False
        self._is_at_once = False
        """Work runs that was never queued."""
        self._at_once_after = 0.0
        """When work may be done so again (perf_counter)."""

    def waiting(self, key: str) -> int:
        """How much work of a key, or of all members of a group, is queued."""
        group = _group_of(key)
        if not group:
            return self._all.waiting(key)
        return self._groups[group].waiting(key) if group in self._groups else 0

    def submit(self, key: str, work: Callable[[], object]) -> None:
        """Queue `work` for the next turn of `key`. What it raises is logged."""
        group = _group_of(key)
        if group:
            self._groups.setdefault(group, _Fair()).put(key, work)
            self._all.put(group, partial(self._do_next_of, self._groups[group]))
        else:
            self._all.put(key, work)
        self._schedule()

    def submit_or_do(self, key: str, work: Callable[[], object]) -> None:
        """Do `work` at once where that keeps nobody waiting, else queue it.

        At once: nobody waits for a turn, and as much time has passed since work was last done at
        once as that took. What such work submits in the same way is part of it. For callers that
        do not mind whether the work is done when this returns.
        """
        started = time.perf_counter()
        if self._all or not (self._is_at_once or started >= self._at_once_after):
            self.submit(key, work)
            return
        outermost, self._is_at_once = not self._is_at_once, True
        _done(key, work)
        now = time.perf_counter()
        self._count(key, now - started)
        if outermost:
            self._is_at_once = False
            self._at_once_after = now + (now - started)

    async def turn(self, key: str) -> None:
        """Wait for a turn of `key`; the caller then works until it next awaits something, and tells
        `spent` how long that took."""
        future: asyncio.Future[None] = self._loop.create_future()

        def hand_over() -> object:
            if future.done():
                return None  # the caller has been cancelled
            future.set_result(None)
            return _HANDED_OVER

        self.submit(key, hand_over)
        await future

    def spent(self, key: str, seconds: float) -> None:
        """Count time of the loop that a key has had outside the queue."""
        self._count(key, min(max(seconds, LEAST_S), WAITED_MOST_S))

    def _count(self, key: str, seconds: float) -> None:
        group = _group_of(key)
        if group:
            self._groups.setdefault(group, _Fair()).spent(key, seconds)
        self._all.spent(group or key, seconds)

    def _schedule(self) -> None:
        if not self._is_scheduled and self._all:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        started = time.perf_counter()
        end = started + SLICE_S
        while self._all:
            key, work = self._all.take()
            result = _done(key, work)
            now = time.perf_counter()
            self._all.done(key, now - started)
            started = now
            # Who waited in `turn` works when this function has returned, so the others wait for it.
            if result is _HANDED_OVER or now >= end:
                break
        self._schedule()

    @staticmethod
    def _do_next_of(group: _Fair) -> object:
        key, work = group.take()
        started = time.perf_counter()
        result = _done(key, work)
        group.done(key, time.perf_counter() - started)
        return result


def _group_of(key: str) -> str:
    """The group of a key; empty: it is in none."""
    return key.partition("/")[0] if "/" in key else ""


def _done(key: str, work: Callable[[], object]) -> object:
    """Do work; returns what that returned, or None where it failed."""
    try:
        return work()
    # One thing that fails must not take the turns of everybody else with it.
    except (AgentcgroupdError, OSError) as error:
        log.error("what was queued for %s failed: %s", key, error)
    except Exception:
        log.exception("what was queued for %s failed", key)
    return None


class Slices:
    """Keeps a long piece of work from holding the loop: await `breathe` between its steps."""

    def __init__(self, turns: Turns | None = None, key: str = "") -> None:
        """`turns`, `key`: whose turn each slice is; without them the loop goes round in between."""
        self._turns, self._key = turns, key
        self._began = time.perf_counter()

    @property
    def is_used_up(self) -> bool:
        """Whether others are to work now."""
        return time.perf_counter() - self._began >= SLICE_S

    async def breathe(self) -> None:
        """Let others work once the slice is used up."""
        if not self.is_used_up:
            return
        spent = time.perf_counter() - self._began
        if self._turns is None:
            await asyncio.sleep(0)
        else:
            self._turns.spent(self._key, spent)
            await self._turns.turn(self._key)
        self._began = time.perf_counter()


async def in_slices(steps: Iterator[object]) -> float:
    """Run through `steps` to their end, letting the loop go round between slices; returns the
    seconds of CPU time that they took."""
    slices, spent_s, began_s = Slices(), 0.0, time.thread_time()
    for _ in steps:
        if slices.is_used_up:
            spent_s += time.thread_time() - began_s
            await slices.breathe()
            began_s = time.thread_time()
    return spent_s + time.thread_time() - began_s
