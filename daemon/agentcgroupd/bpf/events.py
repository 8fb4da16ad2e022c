"""A ring buffer's events on the asyncio loop: read when there are any, never polled."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.libbpf import SampleCallback, libbpf

AnyEvent = (
    abi.ForkEvent | abi.ExecEvent | abi.ExitEvent | abi.OomEvent
    | abi.MarkEvent | abi.HighEvent | abi.RatesEvent | abi.DeniedEvent | abi.UrgentEvent
    | abi.GpuDeviceEvent | abi.VramEvent
)  # fmt: skip

_TYPES: dict[int, type[AnyEvent]] = {
    abi.EventType.FORK: abi.ForkEvent,
    abi.EventType.EXEC: abi.ExecEvent,
    abi.EventType.EXIT: abi.ExitEvent,
    abi.EventType.OOM_VICTIM: abi.OomEvent,
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


class RingBuffer:
    """One ring buffer. What is there is handed over in order, as a list of at most BATCH_EVENTS;
    the rest in the loop's next turn."""

    def __init__(self, fd: int, handle: Callable[[list[AnyEvent]], None]) -> None:
        """`fd` of the map, which stays the caller's. Raises BpfError."""
        self._handle = handle
        self._batch: list[AnyEvent] = []
        self._callback = SampleCallback(self._sample)
        self._ring = libbpf().pointer(
            "ring buffer", "ring_buffer__new", fd,
            ctypes.cast(self._callback, ctypes.c_void_p), None, None,
        )  # fmt: skip
        self._epoll_fd = libbpf().check("ring buffer", "ring_buffer__epoll_fd", self._ring)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reading = False

    def start(self) -> None:
        """Read on the running loop from now on."""
        self._loop = asyncio.get_running_loop()
        self.read(True)

    def read(self, on: bool) -> None:
        """Read on the loop, or leave events where they are for a while."""
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
        # Libbpf goes on for as long as there are events; a negative value stops it here.
        return 0 if len(self._batch) < BATCH_EVENTS else -1

    def drain(self) -> None:
        """Hand over what is there now, at most BATCH_EVENTS. For use outside the loop's turn too,
        where the order with another file's event matters."""
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
