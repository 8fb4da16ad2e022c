"""Connections whose caller cannot be told are closed, and nothing of them is kept."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from agentcgroupd.config import LimitsConfig
from agentcgroupd.errors import PermissionDenied
from agentcgroupd.host.listening import listen
from agentcgroupd.rpc.budgets import Budgets
from agentcgroupd.rpc.peers import SessionFinder
from agentcgroupd.rpc.relay import Relay
from agentcgroupd.state.session import Session
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.turns import Turns


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def refused(metrics: Metrics) -> float:
    name, labels = "agentcg_peers_refused_total", {"reason": "identity"}
    return metrics.registry.get_sample_value(name, labels) or 0.0


async def connections(path: Path, find: SessionFinder, count: int, metrics: Metrics) -> int:
    """How many of `count` connections were closed at once; one session may have one open."""
    backend = path.with_name("backend.sock")
    server = await asyncio.start_unix_server(lambda reader, writer: None, str(backend))
    listener = listen(path, socket.SOCK_STREAM, 0o600, "test", {})
    budgets = Budgets(LimitsConfig(), 1, metrics)
    relay = Relay(listener, lambda: str(backend), metrics, find, budgets, Turns())
    await relay.start()
    loop = asyncio.get_running_loop()
    before, closed = open_files(), 0
    try:
        for _ in range(count):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, str(path))
                try:
                    closed += await asyncio.wait_for(loop.sock_recv(sock, 1), 10) == b""
                except ConnectionResetError:
                    closed += 1
        await asyncio.sleep(0)
        assert open_files() == before, "descriptors of refused callers stayed open"
        return closed
    finally:
        await relay.stop()
        server.close()


def in_no_session(path: str) -> Session | None:
    return None


def broken(path: str) -> Session | None:
    raise RuntimeError("the books are broken")


def forbidden(path: str) -> Session | None:
    raise PermissionDenied("not you")


def unknown(pid: int) -> str:
    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


@pytest.mark.parametrize("find", [broken, forbidden])
def test_who_cannot_be_found_is_refused_again_and_again(
    tmp_path: Path, find: SessionFinder
) -> None:
    metrics = Metrics()
    assert asyncio.run(connections(tmp_path / "s", find, 5, metrics)) == 5
    assert refused(metrics) == 5


def test_whose_cgroup_cannot_be_read_is_refused_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentcgroupd.rpc.peers.cgroup_of", unknown)
    metrics = Metrics()
    assert asyncio.run(connections(tmp_path / "s", in_no_session, 5, metrics)) == 5
    assert refused(metrics) == 5
