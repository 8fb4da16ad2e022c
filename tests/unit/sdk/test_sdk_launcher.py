"""The SDK with the real launcher and an attach socket that only says yes or no."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup import Agent, AsyncAgent
from tests.unit.fake_daemon import AttachSocket, FakeDaemon, running


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, programs: Path) -> Iterator[FakeDaemon]:
    for daemon in running(monkeypatch):
        monkeypatch.setenv("AGENTCG_EXEC", str(programs / "agentcg-exec"))
        yield daemon


@pytest.fixture
def attach(daemon: FakeDaemon) -> AttachSocket:
    assert daemon.attach is not None
    return daemon.attach


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


@pytest.mark.waits
@pytest.mark.parametrize("policy", ["run", "refuse"])
def test_daemon_that_hangs_up_between_begin_and_start(
    daemon: FakeDaemon, attach: AttachSocket, policy: str
) -> None:
    attach.reply = b""
    with Agent(on_unavailable=policy) as agent:
        result = agent.run(["true"], stderr=subprocess.PIPE)
    assert result.returncode == 125, "who listens is not away"
    assert result.stderr
    assert result.report is not None


def test_programs_that_cannot_run(daemon: FakeDaemon, attach: AttachSocket) -> None:
    with Agent() as agent:
        with pytest.raises(FileNotFoundError):
            agent.run(["no-such-program"], stderr=subprocess.DEVNULL)
        with pytest.raises(PermissionError):
            agent.run(["/etc/passwd"], stderr=subprocess.DEVNULL)
