"""Events of a ring buffer on the asyncio loop: read when there are any, never polled."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.libbpf import SampleCallback, libbpf

LifecycleEvent = abi.ForkEvent | abi.ExecEvent | abi.ExitEvent | abi.OomEvent | abi.LeftEvent
MemoryEvent = abi.MarkEvent | abi.HighEvent | abi.RatesEvent | abi.DeniedEvent | abi.UrgentEvent
AnyEvent = LifecycleEvent | MemoryEvent | abi.GpuDeviceEvent | abi.VramEvent

_TYPES: dict[int, type[AnyEvent]] = {
    abi.EventType.FORK: abi.ForkEvent,
    abi.EventType.EXEC: abi.ExecEvent,
    abi.EventType.EXIT: abi.ExitEvent,
    abi.EventType.OOM_VICTIM: abi.OomEvent,
    abi.EventType.LEFT: abi.LeftEvent,
    abi.EventType.MARK: abi.MarkEvent,
    abi.EventType.HIGH: abi.HighEvent,
    abi.EventType.RATES: abi.RatesEvent,
    abi.EventType.DENIED: abi.DeniedEvent,
    abi.EventType.URGENT: abi.UrgentEvent,
    abi.GpuEventType.OPENED: abi.GpuDeviceEvent,
    abi.GpuEventType.CLOSED: abi.GpuDeviceEvent,
    abi.GpuEventType.MEMORY: abi.VramEvent,
    abi.GpuEventType.ACTIVE: abi.VramEvent,
}

BATCH_EVENTS = 256
"""Most that are handed over at a time, so that the loop's other work is not held up."""


class RingBuffer:
    """A ring buffer's reader. Events are handed over in order, in lists of at most BATCH_EVENTS,
    one list in each turn of the loop."""

    def __init__(self, fd: int, handle: Callable[[list[AnyEvent]], None]) -> None:
        """Open the map with descriptor `fd`, which stays the caller's. Raises BpfError."""
        self._handle = handle
        self._batch: list[AnyEvent] = []
        self._callback = SampleCallback(self._sample)
        sample = ctypes.cast(self._callback, ctypes.c_void_p)
        self._ring = libbpf().pointer("ring buffer", "ring_buffer__new", fd, sample, None, None)
        self._epoll_fd = libbpf().check("ring buffer", "ring_buffer__epoll_fd", self._ring)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reading = False

    def start(self) -> None:
        """Read on the running loop from now on."""
        self._loop = asyncio.get_running_loop()
        self.read(True)

    def read(self, on: bool) -> None:
        """Read on the loop, or leave events where they are for the time being."""
        if self._loop is None or on == self._reading:
            return
        self._reading = on
        if on:
            self._loop.add_reader(self._epoll_fd, self.drain)
        else:
            self._loop.remove_reader(self._epoll_fd)

    def _sample(self, _context: int, data: int, size: int) -> int:
        kind = _TYPES.get(ctypes.c_uint32.from_address(data).value)
        if kind is not None and ctypes.sizeof(kind) <= size:
            self._batch.append(kind.from_buffer_copy(ctypes.string_at(data, ctypes.sizeof(kind))))
        # Libbpf goes on for as long as there are events; a negative value stops it.
        return 0 if len(self._batch) < BATCH_EVENTS else -1

    def drain(self) -> None:
        """Hand over the events that are there now, at most BATCH_EVENTS. A caller may do so before
        the loop does, where these have to come before an event of another file."""
        libbpf().call("ring_buffer__consume", self._ring)
        batch, self._batch = self._batch, []
        if batch:
            self._handle(batch)

    def close(self) -> None:
        """Stop reading; no error if that was done."""
        if self._loop is not None:
            self.read(False)
            self._loop = None
        if self._ring:
            libbpf().call("ring_buffer__free", self._ring)
            self._ring = 0
