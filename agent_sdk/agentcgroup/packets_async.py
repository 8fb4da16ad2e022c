"""Requests in one packet each way, on an event loop (packets.py)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from agentcgroup.errors import ConnectionLost
from agentcgroup.packets import REPLY_BYTES_MAX, Line, asks_to_wait, away, parse


async def ask(path: str, method: str, data: bytes, timeout: float) -> Any:
    """Do what `packets.ask` does, on the running event loop."""
    with Line(path) as line:
        await send(line, data, timeout)
        return await answer(line, method, timeout)


async def send(line: Line, data: bytes, timeout: float) -> None:
    """Do what `Line.send` does, on the running event loop."""
    sock = line.socket
    try:
        sock.setblocking(False)
        for pause in _attempts(timeout):
            try:
                # asyncio's own would take a full queue for a connection on its way.
                sock.connect(line.path)
                break
            except BlockingIOError:
                await asyncio.sleep(pause)
        await asyncio.get_running_loop().sock_sendall(sock, data)
    except OSError as error:
        raise away(error, line.path) from None


async def answer(line: Line, method: str, timeout: float) -> Any:
    """Do what `Line.answer` does, on the running event loop."""
    loop = asyncio.get_running_loop()
    try:
        reply = await asyncio.wait_for(loop.sock_recv(line.socket, REPLY_BYTES_MAX), timeout)
        while (more := asks_to_wait(reply)) is not None:
            receive = loop.sock_recv(line.socket, REPLY_BYTES_MAX)
            reply = await asyncio.wait_for(receive, timeout + more)
    except asyncio.TimeoutError:  # not the built-in one before Python 3.11
        raise away(TimeoutError(), line.path) from None
    except OSError as error:
        raise away(error, line.path) from None
    return parse(method, reply, line.path)


async def end(line: Line, data: bytes, timeout: float) -> Any:
    """Do what `Line.end` does, on the running event loop."""
    reply = line.report_or_ask(data)
    if reply is not None:
        return parse("EndCall", reply, line.path)
    try:
        return await answer(line, "EndCall", timeout)
    except ConnectionLost:
        return await answer(line, "EndCall", timeout)


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
