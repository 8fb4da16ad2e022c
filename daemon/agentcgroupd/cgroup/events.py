"""Changes of interface files, as callbacks on the event loop.

The kernel notifies cgroup.events and memory.events through inotify as well as through poll(2); one
inotify descriptor serves any number of cgroups, where poll would need an open file for each.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable

from agentcgroupd.cgroup.knobs import Knob, T
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.host.syscalls import (
    IN_IGNORED,
    IN_MODIFY,
    IN_Q_OVERFLOW,
    inotify_add_watch,
    inotify_init,
    inotify_rm_watch,
)

_EVENT = struct.Struct("iIII")
_BUFFER_BYTES = 262_144


class FileEvents:
    """Callbacks for changes of watched interface files, on the running loop until close()."""

    def __init__(self) -> None:
        """Open the inotify descriptor. Raises OSError."""
        self._fd = inotify_init()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._drain)
        self.overflows = 0

    def close(self) -> None:
        """Stop all watches."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._callbacks.clear()

    def watch(self, cgroup: Cgroup, knob: Knob[T], callback: Callable[[], None]) -> int:
        """Call `callback` after each change of `knob`; several changes may come as one.

        Returns a handle for `unwatch`. Raises OSError if the cgroup is gone.
        """
        path = f"{cgroup.proc_path()}{knob.file}"
        watch = inotify_add_watch(self._fd, path, IN_MODIFY)
        self._callbacks[watch] = callback
        return watch

    def unwatch(self, watch: int) -> None:
        """End a watch; no error if the cgroup was removed."""
        if self._callbacks.pop(watch, None) is not None:
            inotify_rm_watch(self._fd, watch)

    def forget(self, watch: int) -> None:
        """Drop the callback of a watch whose cgroup was removed. The kernel has ended that watch;
        `unwatch` would ask it to once more, and wait for a grace period."""
        self._callbacks.pop(watch, None)

    def _drain(self) -> None:
        try:
            data = os.read(self._fd, _BUFFER_BYTES)
        except BlockingIOError:
            return
        offset = 0
        changed: dict[int, None] = {}
        while offset < len(data):
            watch, mask, _cookie, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size + length
            if mask & IN_Q_OVERFLOW:
                # Events were lost: every watched file may have changed.
                self.overflows += 1
                changed.update(dict.fromkeys(self._callbacks))
            elif mask & IN_IGNORED:
                self._callbacks.pop(watch, None)
            else:
                changed[watch] = None
        for watch in changed:
            callback = self._callbacks.get(watch)
            if callback is not None:
                callback()
