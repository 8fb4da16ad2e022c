"""Requests in one packet each way, on an event loop (packets.py)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from agentcgroup.packets import REPLY_BYTES_MAX, asks_to_wait, away, new_socket, parse


async def ask(path: str, method: str, data: bytes, timeout: float) -> Any:
    """Do what `packets.ask` does, on the running event loop."""
    loop = asyncio.get_running_loop()
    try:
        with new_socket() as sock:
            sock.setblocking(False)
            for pause in _attempts(timeout):
                try:
                    # asyncio's own would take a full queue for a connection on its way.
                    sock.connect(path)
                    break
                except BlockingIOError:
                    await asyncio.sleep(pause)
            await loop.sock_sendall(sock, data)
            reply = await asyncio.wait_for(loop.sock_recv(sock, REPLY_BYTES_MAX), timeout)
            while (more := asks_to_wait(reply)) is not None:
                receive = loop.sock_recv(sock, REPLY_BYTES_MAX)
                reply = await asyncio.wait_for(receive, timeout + more)
    except asyncio.TimeoutError:  # not the built-in one before Python 3.11
        raise away(TimeoutError(), path) from None
    except OSError as error:
        raise away(error, path) from None
    return parse(method, reply, path)


def _attempts(timeout: float) -> Iterator[float]:
    """Yield pauses between attempts to connect, in seconds. Without blocking, connect(2) fails at
    once where the listener's queue is full, as when others flood it.

    Raises:
        TimeoutError: `timeout` seconds have passed.
    """
    end, pause = time.monotonic() + timeout, 0.0005
    while time.monotonic() < end:
        yield pause
        pause = min(2 * pause, 0.002)
    raise TimeoutError("the queue of connections stays full")
