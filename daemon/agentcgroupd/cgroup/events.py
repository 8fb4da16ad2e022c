"""Changes of interface files, as callbacks on the event loop.

The kernel notifies cgroup.events and memory.events through inotify as well as through poll(2); one
inotify descriptor serves any number of cgroups, where poll would need an open file for each. Its
watches are counted for each user, so others may have used them up: a file that cannot be watched is
then read at intervals until it can be.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentcgroupd.cgroup.knobs import Knob, T
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import CgroupGone, KnobError
from agentcgroupd.host.syscalls import (
    IN_IGNORED,
    IN_MODIFY,
    IN_Q_OVERFLOW,
    inotify_add_watch,
    inotify_init,
    inotify_rm_watch,
)
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

_EVENT = struct.Struct("iIII")
_BUFFER_BYTES = 262_144
_USED_UP = (errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""What the kernel answers where watches, instances or descriptors are used up (inotify(7))."""
_EMPTY = {"populated": 0, "frozen": 0}
"""cgroup.events of a cgroup without processes."""
POLL_S = 0.02
"""Between two rounds of reading."""
POLLED_A_ROUND = 50
"""Files that are read in a round at most, so that reading takes a bounded part of the loop."""
RETRY_S = 2.0
"""Between two attempts to watch what is read."""


@dataclass(slots=True, eq=False)
class _Watch:
    """A file that is watched or read."""

    cgroup: Cgroup
    knob: Knob[Any]
    callback: Callable[[], None]
    key: str
    number: int | None = None
    """Of the kernel's watch; None: the file is read."""
    seen: object = None
    """What was read last."""
    is_due: bool = False
    """Whether its callback is queued."""


class FileEvents:
    """Callbacks for changes of interface files, on the running loop until close()."""

    def __init__(self, turns: Turns) -> None:
        """Open the inotify descriptor; where there is none to be had, files are read. `turns`:
        where callbacks are queued. Raises OSError."""
        self._turns = turns
        self._loop = asyncio.get_running_loop()
        self._fd: int | None = None
        self._handles = 0
        self._watches: dict[int, _Watch] = {}
        """By handle."""
        self._by_number: dict[int, _Watch] = {}
        self._polled: dict[_Watch, None] = {}
        """Files that are read, the one whose turn is next first."""
        self._timer: asyncio.TimerHandle | None = None
        self._retry_at = 0.0
        self._is_short = False
        """Whether some file has been read because it could not be watched."""
        self.overflows = 0
        self._open()

    @property
    def polled(self) -> int:
        """How many files are read because they cannot be watched."""
        return len(self._polled)

    def close(self) -> None:
        """Stop all watches."""
        if self._timer is not None:
            self._timer.cancel()
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None
        self._watches.clear()
        self._by_number.clear()
        self._polled.clear()

    def watch(
        self, cgroup: Cgroup, knob: Knob[T], callback: Callable[[], None], key: str = ""
    ) -> int:
        """Call `callback` after each change of `knob`; several changes may come as one. `key`:
        whose turn on the loop that takes.

        Returns a handle for `unwatch`. Raises OSError or KnobError if the cgroup is gone.
        """
        watch = _Watch(cgroup, knob, callback, key)
        if not self._add(watch):
            self._poll(watch)
        self._handles += 1
        self._watches[self._handles] = watch
        return self._handles

    def unwatch(self, handle: int) -> None:
        """End a watch; no error if the cgroup was removed."""
        number = self._drop(handle)
        if number is not None and self._fd is not None:
            inotify_rm_watch(self._fd, number)

    def forget(self, handle: int) -> None:
        """Drop the callback of a watch whose cgroup was removed. The kernel has ended that watch;
        `unwatch` would ask it to once more, and wait for a grace period."""
        self._drop(handle)

    def _drop(self, handle: int) -> int | None:
        watch = self._watches.pop(handle, None)
        if watch is None:
            return None
        self._polled.pop(watch, None)
        number, watch.number = watch.number, None
        watch.callback = _nothing
        if number is None or self._by_number.pop(number, None) is None:
            return None
        return number

    # Watching

    def _open(self) -> bool:
        """Get the inotify descriptor; False: there is none to be had now. Raises OSError."""
        if self._fd is None:
            try:
                self._fd = inotify_init()
            except OSError as error:
                if error.errno not in _USED_UP:
                    raise
                return False
            self._loop.add_reader(self._fd, self._drain)
        return True

    def _add(self, watch: _Watch) -> bool:
        """Have the kernel watch a file; False: it cannot now. Raises OSError."""
        if not self._open() or self._fd is None:
            return False
        path = f"{watch.cgroup.proc_path()}{watch.knob.file}"
        try:
            watch.number = inotify_add_watch(self._fd, path, IN_MODIFY)
        except OSError as error:
            if error.errno not in _USED_UP:
                raise
            return False
        self._by_number[watch.number] = watch
        if not self._polled:
            self._note_enough()
        return True

    def _note_enough(self) -> None:
        if self._is_short:
            self._is_short = False
            log.info("all cgroups are watched by inotify again")

    def _drain(self) -> None:
        assert self._fd is not None
        try:
            data = os.read(self._fd, _BUFFER_BYTES)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(data):
            number, mask, _cookie, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size + length
            if mask & IN_Q_OVERFLOW:
                # Events were lost: every watched file may have changed.
                self.overflows += 1
                for watch in self._by_number.values():
                    self._changed(watch)
            elif mask & IN_IGNORED:
                self._by_number.pop(number, None)
            elif (found := self._by_number.get(number)) is not None:
                self._changed(found)

    def _changed(self, watch: _Watch) -> None:
        """Queue a callback, unless it is queued already."""
        if not watch.is_due:
            watch.is_due = True
            self._turns.submit(watch.key, lambda: self._call(watch))

    @staticmethod
    def _call(watch: _Watch) -> None:
        watch.is_due = False
        watch.callback()

    # Reading instead

    def _poll(self, watch: _Watch) -> None:
        """Read a file at intervals. Raises KnobError."""
        if not self._is_short:
            self._is_short = True
            log.warning(
                "no inotify watch is left (fs.inotify.max_user_watches, max_user_instances): "
                "cgroups are read every %g s instead, until there is one; see `agentcg doctor`",
                POLL_S,
            )
            self._retry_at = self._loop.time() + RETRY_S
        watch.seen = watch.cgroup.read(watch.knob)
        self._polled[watch] = None
        if self._timer is None:
            self._timer = self._loop.call_later(POLL_S, self._round)

    def _round(self) -> None:
        self._timer = None
        if self._loop.time() >= self._retry_at:
            self._retry()
        for watch in list(self._polled)[:POLLED_A_ROUND]:
            # To the end of the line.
            del self._polled[watch]
            self._polled[watch] = None
            try:
                seen = watch.cgroup.read(watch.knob)
            except CgroupGone:
                seen = None
            except KnobError as error:
                log.error("%s", error)
                continue
            # A process may have come and gone between two rounds, and populated be 0 in both.
            if seen != watch.seen or seen == _EMPTY:
                watch.seen = seen
                self._changed(watch)
        if self._polled:
            self._timer = self._loop.call_later(POLL_S, self._round)

    def _retry(self) -> None:
        """Watch again what is read, as far as the kernel lets that be."""
        self._retry_at = self._loop.time() + RETRY_S
        for watch in list(self._polled)[:POLLED_A_ROUND]:
            try:
                if not self._add(watch):
                    return
            except OSError:
                continue  # its cgroup is gone, which the next round tells
            del self._polled[watch]
            # What changed since it was read last has no event.
            self._changed(watch)
        if self._polled:
            self._retry_at = 0.0
        else:
            self._note_enough()


def _nothing() -> None:
    """Stand for the callback of a watch that has ended."""
