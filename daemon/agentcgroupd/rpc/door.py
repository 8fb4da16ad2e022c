"""A listening socket that no flood of connections can turn against the others.

The queue of connections is emptied each time the event loop goes round. Where no descriptor is
left, one that is kept for this moment is given up, so that callers are turned away instead of
waiting for an answer that never comes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Callable

from agentcgroupd.host.listening import BACKLOG, Listener
from agentcgroupd.host.syscalls import refuse_descriptors
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.seldom import Seldom

log = logging.getLogger(__name__)

ACCEPTS_A_TURN = 2 * BACKLOG
ACCEPT_SLICE_S = 0.003
"""Long enough to empty the queue, so that whoever finds it full finds room soon after."""
PAUSE_S = 0.05
"""How long nobody is accepted after the kernel had neither descriptor nor memory for one."""
NONE_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Door:
    """Accepts at a listening socket and hands each connection on."""

    def __init__(
        self, listener: Listener, accepted: Callable[[socket.socket], None], metrics: Metrics
    ) -> None:
        """`accepted` takes over a connected, non-blocking socket and raises nothing."""
        self._listener = listener
        self._accepted = accepted
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._spare: int | None = None
        self._is_queue_long = listener.handed_over
        """Whether more may wait than when a daemon serves: who came while none was there."""
        self._complaint = Seldom(log, logging.ERROR, str(listener.path))

    def open(self) -> None:
        """Accept whoever connects from now on."""
        self._socket = self._listener.socket
        refuse_descriptors(self._socket)
        self._spare = _spare_descriptor()
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def close(self) -> None:
        """Stop listening; nothing if the door is closed."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._listener.close()
            self._socket = None
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _readable(self) -> None:
        assert self._socket is not None
        end = time.perf_counter() + ACCEPT_SLICE_S
        for _ in range(ACCEPTS_A_TURN):
            try:
                client, _ = self._socket.accept()
            except BlockingIOError:
                self._shorten_queue()
                return
            except OSError as error:
                self._failed(error)
                return
            client.setblocking(False)
            self._accepted(client)
            if time.perf_counter() >= end:
                return

    def _shorten_queue(self) -> None:
        """Let no more than BACKLOG wait from now on. Before the queue is empty, those in it would
        have the kernel refuse everybody else."""
        if self._is_queue_long:
            assert self._socket is not None
            self._socket.listen(BACKLOG)
            self._is_queue_long = False

    def _failed(self, error: OSError) -> None:
        """Turn callers away with the spare descriptor, and accept no more for a while."""
        assert self._socket is not None
        self._metrics.refused.labels("descriptors").inc()
        self._complaint.say(f"no connection can be accepted: {os.strerror(error.errno or 0)}")
        if error.errno in NONE_LEFT:
            self._turn_away()
        self._loop.remove_reader(self._socket.fileno())
        self._loop.call_later(PAUSE_S, self._listen_again)

    def _turn_away(self) -> None:
        """Accept and close what waits. The caller sees a connection that ends, not one that
        hangs."""
        assert self._socket is not None
        if self._spare is None:
            return
        os.close(self._spare)
        self._spare = None
        for _ in range(ACCEPTS_A_TURN):
            try:
                self._socket.accept()[0].close()
            except OSError:
                break
        self._spare = _spare_descriptor()

    def _listen_again(self) -> None:
        if self._socket is None:
            return
        if self._spare is None:
            self._spare = _spare_descriptor()
        self._loop.add_reader(self._socket.fileno(), self._readable)


def _spare_descriptor() -> int | None:
    """A descriptor of no use, to be closed when one is needed; None: none is left."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
