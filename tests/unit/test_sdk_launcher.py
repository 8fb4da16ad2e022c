"""The SDK with the real launcher and an attach socket that only says yes or no."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup import Agent, AsyncAgent

from .fake_daemon import FakeDaemon, running


class AttachSocket:
    """Answers every request with `reply`; remembers (pid, request)."""

    def __init__(self, path: Path) -> None:
        self.reply = b"OK\0call=c1\0"
        self.requests: list[tuple[int, list[str]]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer:
                credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                words = peer.recv(16384).decode().split("\0")[:-1]
                self.requests.append((struct.unpack("3i", credentials)[0], words))
                peer.send(self.reply)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, programs: Path) -> Iterator[FakeDaemon]:
    for daemon in running(monkeypatch):
        monkeypatch.setenv("AGENTCG_EXEC", str(programs / "agentcg-exec"))
        yield daemon


@pytest.fixture
def attach(daemon: FakeDaemon) -> Iterator[AttachSocket]:
    server = AttachSocket(daemon.run_dir / "agent/attach.sock")
    yield server
    server.close()


def test_the_process_that_enters_is_the_tool(daemon: FakeDaemon, attach: AttachSocket) -> None:
    with Agent() as agent:
        # An empty environment: what the launcher needs comes on its command line.
        result = agent.run(["/bin/sh", "-c", "echo $$; exit 3"], capture_output=True, env={})
    ((pid, words),) = attach.requests
    assert words == ["ACG1", "attach", "call=c1"]
    assert int(result.stdout) == pid
    assert result.returncode == 3
    assert result.stderr == b""


def test_asyncio(daemon: FakeDaemon, attach: AttachSocket) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent:
            result = await agent.run(["sh", "-c", "echo $$"], capture_output=True, text=True)
            assert int(result.stdout) == attach.requests[0][0]

    asyncio.run(main())


def test_refused_to_enter(daemon: FakeDaemon, attach: AttachSocket, tmp_path: Path) -> None:
    attach.reply = b"ERR\0NOT_FOUND\0no call c1 is open\0"
    with Agent() as agent:
        result = agent.run(["touch", str(tmp_path / "made")], stderr=subprocess.PIPE, text=True)
    assert result.returncode == 125
    assert "no call c1 is open" in result.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("policy", "returncode"), [("run", 0), ("refuse", 125)])
def test_daemon_away_between_begin_and_start(
    daemon: FakeDaemon, policy: str, returncode: int
) -> None:
    with Agent(on_unavailable=policy) as agent:
        result = agent.run(["true"], stderr=subprocess.PIPE)
    assert result.returncode == returncode
    assert result.stderr
    assert result.report is not None


def test_programs_that_cannot_run(daemon: FakeDaemon, attach: AttachSocket) -> None:
    with Agent() as agent:
        with pytest.raises(FileNotFoundError):
            agent.run(["no-such-program"], stderr=subprocess.DEVNULL)
        with pytest.raises(PermissionError):
            agent.run(["/etc/passwd"], stderr=subprocess.DEVNULL)
