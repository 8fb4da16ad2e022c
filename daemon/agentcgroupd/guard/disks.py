"""Guards disks: a call is held to what it may write, and no call fills a file system.

A call that has written more than its intent allows (`disk_max`) is ended. While a file system has
less room than `guard.disk_free` and loses more, the call that has written most lately is paused,
one after the other; important calls only where no other call writes. What is paused goes on when
there is room again, and is ended when there is none for `guard.disk_grace`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from agentcgroup.text import printable
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.writes import FILLED, WROTE_TOO_MUCH, Written, written
from agentcgroupd.config import GuardConfig
from agentcgroupd.config_values import free_least
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import KnobError
from agentcgroupd.host.file_systems import Space, spaces, swapped_to
from agentcgroupd.state.session import Call, boottime_usec
from agentcgroupd.units import IMPORTANT_PRIORITY, show_bytes, show_usec

log = logging.getLogger(__name__)

LIMITS_EVERY_S = 0.5
LIMITS_LEAST_S = 0.05
"""Between looks at calls that may write so much: sooner where one may soon have done so."""
REST = 20
"""Looks take at most one part in so many of the loop's time."""
CALM_S = 2.0
NEAR_S = 0.25
"""Between looks at file systems, and where one of them may be short of room soon."""
NEAR = 2.0
"""A file system is near its mark when it has less than this many times as much room."""
AGAIN = 1.5
"""Paused calls go on when there is this many times as much room as the mark."""
WINDOW_USEC = 2_000_000
"""Time over which it is compared how much calls have written."""
APART_USEC = 200_000
"""Least time between two looks that are compared."""
FALLS_BYTES_PER_S = 1 << 20
"""A file system that loses less room than this, or a call that writes less, is left alone."""
PATH_CHARS_MAX = 100


@dataclass(slots=True)
class Watched:
    """A file system, and what was seen of it in the last moment."""

    space: Space
    least_bytes: int
    """The mark: less room than this is too little."""
    seen: deque[tuple[int, int]] = field(default_factory=deque)
    """Times in usec since boot, and bytes that were free then; the oldest first."""

    def see(self, now_usec: int, space: Space) -> None:
        """Take down how much room there is now."""
        self.space = space
        self.seen.append((now_usec, space.free_bytes))
        while now_usec - self.seen[0][0] > WINDOW_USEC and len(self.seen) > 2:
            self.seen.popleft()

    @property
    def is_low(self) -> bool:
        """Whether there is too little room."""
        return self.space.free_bytes < self.least_bytes

    @property
    def lost_bytes_per_s(self) -> float:
        """By how much the room has fallen lately; 0: it has not, or that is not known yet."""
        (then, before), (now, free) = self.seen[0], self.seen[-1]
        return 0.0 if now - then < APART_USEC else max(0.0, (before - free) * 1e6 / (now - then))

    def interval_s(self) -> float:
        """Give the time until the next look."""
        above = self.space.free_bytes - NEAR * self.least_bytes
        if above <= 0:
            return NEAR_S
        lost = self.lost_bytes_per_s
        return max(NEAR_S, min(CALM_S, above / lost / 2)) if lost else CALM_S

    def words(self) -> str:
        """Say which file system that is, and how much of it is left."""
        where = printable(self.space.path)[:PATH_CHARS_MAX]
        left, total = show_bytes(self.space.free_bytes), show_bytes(self.space.total_bytes)
        return f"{left} of {total} are left of the file system at {where}"


def heaviest(came: Mapping[str, int], calls: Iterable[Call]) -> Call | None:
    """Choose the call that wrote most lately, an important one only where no other wrote; None:
    none wrote. `came`: bytes by the call's id."""
    wrote = [call for call in calls if came.get(call.id, 0) > 0]
    key = lambda call: (call.priority >= IMPORTANT_PRIORITY, -came[call.id], call.id)  # noqa: E731
    return min(wrote, key=key, default=None)


class DiskGuard:
    """Looks at file systems and at what calls write. `limits_forever` and `rooms_forever` are to
    run side by side, so that a file system that does not answer keeps no limit from being held."""

    def __init__(
        self,
        config: GuardConfig,
        open_calls: Mapping[str, Call],
        limited: Mapping[str, Call],
        actions: Actions,
        look: Callable[[tuple[str, ...]], list[Space]] = spaces,
    ) -> None:
        """`limited`: those of the open calls that may write only so much. `look`: asks for the room
        of all file systems and of those of the given paths; it is called in a thread."""
        self._config = config
        self._open, self._limited = open_calls, limited
        self._actions = actions
        self._look = look
        self._paths = tuple(map(str, config.disk_paths))
        self._swapped: frozenset[str] = frozenset()
        self._watched: dict[str, Watched] = {}
        self._wrote: dict[str, deque[tuple[int, Written]]] = {}
        """What calls had written at the last looks, by their ids; the oldest first."""
        self._looked_usec = 0
        self._held: dict[str, str] = {}
        """Paths of the file systems for which calls are paused, by the ids of these."""

    # Limits of calls

    async def limits_forever(self) -> None:
        """End calls that have written more than they may, until this is cancelled."""
        wait_s = LIMITS_EVERY_S
        while True:
            await asyncio.sleep(wait_s)
            wait_s = await self.hold_limits()

    async def hold_limits(self) -> float:
        """Look once at each call that has such a limit. Returns the seconds until the next look."""
        wait_s, spent_s = LIMITS_EVERY_S, 0.0
        for call in list(self._limited.values()):
            began_s = time.monotonic()
            if call.state != pb.CALL_STATE_ENDING and call.id in self._limited:
                wait_s = min(wait_s, self._hold_limit(call))
            spent_s += time.monotonic() - began_s
            await asyncio.sleep(0)  # others have their turn
        return max(LIMITS_LEAST_S, wait_s, REST * spent_s)

    def _hold_limit(self, call: Call) -> float:
        """End a call that has written more than it may. Returns the seconds until it may have."""
        most = call.grant.disk_max_bytes
        if most is None:
            return LIMITS_EVERY_S
        try:
            now, wrote = boottime_usec(), written(call, self._swapped)
            if wrote.total > most:
                why = (
                    f"{WROTE_TOO_MUCH}: {show_bytes(wrote.total)} had gone to disks, of at most "
                    f"{show_bytes(most)} (disk_max). What it has written is still there."
                )
                self._actions.kill(call, why, "disk_kill")
                return LIMITS_EVERY_S
        except KnobError as error:
            log.debug("call %s: %s", call.id, error)
            return LIMITS_EVERY_S
        before = call.disk_seen
        call.disk_seen = now, wrote.total
        came = wrote.total - before[1]
        left_s = (most - wrote.total) * (now - before[0]) / max(1, came) / 1e6
        return min(LIMITS_EVERY_S, left_s / 2)

    # Room of file systems

    async def rooms_forever(self) -> None:
        """Keep file systems from being filled, until this is cancelled; where that is switched off,
        only find out where is swapped to."""
        loop = asyncio.get_running_loop()
        wait_s = NEAR_S
        while True:
            await asyncio.sleep(wait_s)
            self._swapped = await loop.run_in_executor(None, swapped_to)
            wait_s = CALM_S
            if self._config.enabled and self._config.disk_free != "off":
                found = await loop.run_in_executor(None, self._look, self._paths)
                wait_s = self.judge(boottime_usec(), found)

    def judge(self, now_usec: int, found: Iterable[Space]) -> float:
        """Do what file systems ask for that have just been looked at. Returns the seconds until the
        next look."""
        self._see(now_usec, found)
        low = [each for each in self._watched.values() if each.is_low]
        self._actions.notices.metrics.file_systems_low.set(len(low))
        self._go_on_or_end(now_usec)
        near = [e for e in self._watched.values() if e.space.free_bytes < NEAR * e.least_bytes]
        if near:
            self._read_calls(now_usec)
        else:
            self._wrote.clear()
        for each in low:
            if each.lost_bytes_per_s >= FALLS_BYTES_PER_S:
                self._hold_one(each)
        self._looked_usec = now_usec
        waits = [each.interval_s() for each in self._watched.values()]
        return NEAR_S if self._held else min(waits, default=CALM_S)

    def _see(self, now_usec: int, found: Iterable[Space]) -> None:
        spaces_now = {space.path: space for space in found}
        for gone in self._watched.keys() - spaces_now.keys():
            del self._watched[gone]
        for path, space in spaces_now.items():
            least = free_least(self._config.disk_free, space.total_bytes)
            watched = self._watched.setdefault(path, Watched(space, least))
            watched.least_bytes = least
            watched.see(now_usec, space)

    def _outermost(self) -> list[Call]:
        """List the calls that may be paused; what is inside one is paused with it."""
        return [
            call
            for call in self._open.values()
            if call.parent is None
            and call.disk_since_usec is None
            and call.state != pb.CALL_STATE_ENDING
        ]

    def _read_calls(self, now_usec: int) -> None:
        """Take down what each call has written so far."""
        readings = {}
        for call in self._outermost():
            try:
                wrote = written(call, self._swapped)
            except KnobError:
                continue  # it has just ended
            seen = self._wrote.get(call.id)
            if seen is None:
                # What a call has written that began since the last look came since then.
                is_new = call.began_boot_usec > self._looked_usec > 0
                seen = deque([(self._looked_usec, Written())] if is_new else [])
            seen.append((now_usec, wrote))
            while now_usec - seen[0][0] > WINDOW_USEC and len(seen) > 2:
                seen.popleft()
            readings[call.id] = seen
        self._wrote = readings

    def _came(self, disk: str) -> dict[str, int]:
        """Give what each call has written lately, by its id, where that is worth a pause."""
        came = {}
        for id, seen in self._wrote.items():
            (then, before), (now, wrote) = seen[0], seen[-1]
            count = wrote.since(before, disk)
            if now - then >= APART_USEC and count * 1e6 / (now - then) >= FALLS_BYTES_PER_S:
                came[id] = count
        return came

    def _hold_one(self, watched: Watched) -> None:
        """Pause the call that has written most to a file system lately."""
        came = self._came(watched.space.device)
        call = heaviest(came, self._outermost())
        if call is None:
            return
        seen = self._wrote[call.id]
        lately = show_usec(seen[-1][0] - seen[0][0])
        grace = show_usec(self._config.disk_grace)
        enough = show_bytes(AGAIN * watched.least_bytes)
        why = (
            f"Paused: {watched.words()}, and this call wrote {show_bytes(came[call.id])} in the "
            f"last {lately}, more than any other that may be paused. It goes on when {enough} are "
            f"free, and is ended if that takes more than {grace}."
        )
        try:
            self._actions.disk_hold(call, why)
        except KnobError as error:
            log.debug("call %s: %s", call.id, error)
            return
        self._held[call.id] = watched.space.path
        # Whether the others go on to fill it is seen from now on.
        watched.seen = deque([watched.seen[-1]])
        del self._wrote[call.id]

    def _go_on_or_end(self, now_usec: int) -> None:
        """Let calls go on for which there is room again, and end those that had none for too
        long."""
        for id, path in list(self._held.items()):
            call, watched = self._open.get(id), self._watched.get(path)
            since = None if call is None else call.disk_since_usec
            if call is None or since is None or call.state == pb.CALL_STATE_ENDING:
                del self._held[id]
                continue
            try:
                if watched is None:
                    self._actions.disk_unhold(call, "It goes on: the file system is gone.")
                elif watched.space.free_bytes >= AGAIN * watched.least_bytes:
                    self._actions.disk_unhold(call, f"It goes on: {watched.words()}.")
                elif now_usec - since >= self._config.disk_grace:
                    self._actions.kill(call, self._ended_words(watched), "disk_kill")
            except KnobError as error:
                log.debug("call %s: %s", call.id, error)

    def _ended_words(self, watched: Watched) -> str:
        paused = show_usec(self._config.disk_grace)
        return (
            f"{FILLED}: {watched.words()}, this call had written most when that began, and in the "
            f"{paused} for which it was paused no room was made. What it has written is still "
            "there: remove what is not needed."
        )
