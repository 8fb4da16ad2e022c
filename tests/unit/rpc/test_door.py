"""A listening socket of systemd's: who came while no daemon was there, and who comes then."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agentcgroupd.host.listening import BACKLOG, Listener
from agentcgroupd.rpc.door import Door
from agentcgroupd.telemetry.metrics import Metrics

CAME_BEFORE = 3 * BACKLOG


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    sock.bind(str(tmp_path / "grpc.sock"))
    sock.listen(512)
    yield Listener(sock, tmp_path / "grpc.sock", handed_over=True)
    sock.close()


def test_who_waited_for_the_daemon_has_nobody_refused(listener: Listener) -> None:
    accepted: list[socket.socket] = []

    async def main(stack: ExitStack) -> None:
        all_are_in = asyncio.Event()

        def take_in(sock: socket.socket) -> None:
            accepted.append(sock)
            if len(accepted) == CAME_BEFORE + 1:
                all_are_in.set()

        def connect() -> None:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect(str(listener.path))

        for _ in range(CAME_BEFORE):
            connect()
        door = Door(listener, take_in, Metrics())
        door.open()
        connect()
        await all_are_in.wait()
        await asyncio.sleep(0.01)
        # Nobody accepts while this goes on: the queue is as short as a flood's may be.
        with pytest.raises(BlockingIOError):
            for _ in range(2 * BACKLOG):
                connect()
        door.close()

    with ExitStack() as stack:
        asyncio.run(main(stack))
        for sock in accepted:
            sock.close()
