"""The asyncio client against a fake daemon, with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup import (
    AgentcgWarning,
    AsyncAgent,
    CheckFailed,
    InvalidIntent,
    ReportNotReady,
    Unavailable,
    Verdict,
)
from agentcgroup import flow as flow_module
from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.unit.fake_daemon import MIB, FakeDaemon, later, running


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    yield from running(monkeypatch)


def test_run_has_a_report(daemon: FakeDaemon) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent:
            result = await agent.run(["echo", "hi"], capture_output=True, text=True, memory="512M")
            assert isinstance(result, subprocess.CompletedProcess)
            assert (result.args, result.stdout, result.stderr) == (["echo", "hi"], "hi\n", "")
            assert result.report is not None and result.report.verdict is Verdict.OK
            assert len(result.feedback) == 1

    asyncio.run(main())
    assert daemon.begun[0].intent.memory == "512M"


def test_call_block(daemon: FakeDaemon) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent:
            async with agent.tool_call("x", memory_max="512M") as call:
                result = await call.run(["sh", "-c", "kill -TERM $$"])
                with pytest.raises(ReportNotReady):
                    _ = result.report
                grant = await call.update(memory_max="1G")
                assert grant is not None and grant.memory_max_bytes == 1024 * MIB
                assert [c.id for c in await agent.calls()] == [call.id]
            assert result.returncode == -signal.SIGTERM
            assert call.report is not None
            assert call.report.term_signal == signal.SIGTERM
            with pytest.raises(KeyError):
                async with agent.tool_call("y") as other:
                    raise KeyError("body")
            assert other.report is not None

    asyncio.run(main())
    assert not daemon.calls


def test_text_input_and_streams(daemon: FakeDaemon, tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent, agent.tool_call("x") as call:
            text = await call.run(  # noqa: S604
                "cat; printf 'a\\r\\nb\\n' >&2; pwd",
                shell=True,
                input="wörd\n",
                text=True,
                encoding="utf-8",
                capture_output=True,
                cwd=tmp_path,
            )
            assert text.stdout == f"wörd\n{tmp_path}\n"
            assert text.stderr == "a\nb\n"
            raw = await call.run(["cat"], input=b"\xff" * 300_000, stdout=subprocess.PIPE)
            assert raw.stdout == b"\xff" * 300_000
            assert raw.stderr is None
            with open(tmp_path / "out", "wb") as file:  # noqa: ASYNC230
                await call.run(["echo", "file"], stdout=file, stdin=subprocess.DEVNULL)
            assert (tmp_path / "out").read_bytes() == b"file\n"
            # A tool that does not read its input.
            assert (await call.run(["true"], input=b"x" * 300_000)).returncode == 0

    asyncio.run(main())


def test_timeout_check_and_missing(daemon: FakeDaemon) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent:
            began = time.monotonic()
            with pytest.raises(subprocess.TimeoutExpired) as late:
                await agent.run(  # noqa: S604
                    "sleep 60 & echo early; sleep 60",
                    shell=True,
                    capture_output=True,
                    timeout=0.3,
                )
            assert time.monotonic() - began < 10
            assert late.value.stdout == b"early\n"
            with pytest.raises(CheckFailed) as failed:
                await agent.run(["false"], check=True)
            assert failed.value.result.report is not None
            with pytest.raises(FileNotFoundError):
                await agent.run(["no-such-program"], stderr=subprocess.DEVNULL)
            with pytest.raises(InvalidIntent):
                await agent.run(["true"], memory_max="lots")

    asyncio.run(main())
    assert daemon.ended[0].reason == pb.END_REASON_TIMEOUT


def test_cancelling_kills_and_ends(daemon: FakeDaemon) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent:
            task = asyncio.ensure_future(agent.run(["sleep", "60"]))
            while not daemon.entered("c1"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert not daemon.calls
    assert daemon.ended[0].reason == pb.END_REASON_CANCELLED
    with pytest.raises(ProcessLookupError):
        os.kill(daemon.entered("c1")[0], 0)


@pytest.mark.parametrize(
    ("argv", "kill", "reason"),
    [
        (["sh", "-c", "kill -9 $$"], "", pb.END_REASON_DONE),
        (["sleep", "60"], "kill", pb.END_REASON_CANCELLED),
        (["sleep", "60"], "terminate", pb.END_REASON_CANCELLED),
    ],
)
def test_an_error_is_the_reason_only_of_what_it_ended(
    daemon: FakeDaemon, argv: list[str], kill: str, reason: pb.EndReason.ValueType
) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent, agent.tool_call("x") as call:
            process = await call.popen(argv)
            if kill:
                getattr(process, kill)()
            await process.wait()
            raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(main())
    assert [end.reason for end in daemon.ended] == [reason]


def test_popen(daemon: FakeDaemon) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent:
            async with agent.tool_call("x") as call:
                process = await call.popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(b"hello\n")
                assert await process.stdout.readline() == b"hello\n"
            assert await process.wait() == -signal.SIGKILL

    asyncio.run(main())


def test_many_at_once(daemon: FakeDaemon) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent:
            results = await asyncio.gather(
                *(agent.run(["echo", str(n)], capture_output=True) for n in range(32))
            )
        assert [int(result.stdout) for result in results] == list(range(32))
        assert all(result.report is not None for result in results)

    asyncio.run(main())
    assert not daemon.calls


def test_daemon_away(daemon: FakeDaemon) -> None:
    daemon.stop()

    async def main() -> None:
        async with AsyncAgent() as agent:
            with pytest.warns(AgentcgWarning) as caught:
                result = await agent.run(["echo", "bare"], capture_output=True)
            assert len(caught) == 1
            assert (result.stdout, result.report, result.call_id) == (b"bare\n", None, "")
            with pytest.warns(AgentcgWarning):
                async with agent.tool_call("x") as call:
                    left = await call.popen(["sleep", "60"])
            assert await left.wait() == -signal.SIGKILL
        async with AsyncAgent(on_unavailable="refuse") as strict:
            with pytest.raises(Unavailable):
                await strict.run(["true"])

    asyncio.run(main())


def test_restart_in_the_middle(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent:
            async with agent.tool_call("x") as call:
                await asyncio.to_thread(daemon.stop)
                result = await call.run(["false"])
                later(0.5, daemon.start)
            assert result.report is not None and result.report.exit_code == 1
            monkeypatch.setattr(flow_module, "END_TIMEOUT_S", 0.3)
            with pytest.warns(AgentcgWarning, match="lost"):
                async with agent.tool_call("y") as other:
                    await asyncio.to_thread(daemon.stop)
            assert other.report is None

    asyncio.run(main())


def test_feedback(daemon: FakeDaemon) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent:
            daemon.say("one")
            stream = agent.feedback()
            assert (await stream.__anext__()).sentence == "one"
            await asyncio.to_thread(daemon.stop)
            daemon.start()
            daemon.say("two")
            async for item in stream:
                assert item.sentence == "two"
                break
            waiting = asyncio.ensure_future(stream.__anext__())
            await asyncio.sleep(0.1)
            stream.close()
            with pytest.raises(StopAsyncIteration):
                await waiting
            await asyncio.to_thread(daemon.stop)
            with pytest.raises(Unavailable):
                await agent.feedback().__anext__()

    asyncio.run(main())


def test_one_agent_in_two_event_loops(daemon: FakeDaemon) -> None:
    agent = AsyncAgent()

    async def main() -> None:
        assert (await agent.run(["true"])).report is not None
        assert (await agent.session()).id == "s1"
        assert (await agent.budget()).calls_max == 64
        assert (await agent.report()).name == "true"
        assert (await agent.reports())[0].name == "true"

    asyncio.run(main())
    asyncio.run(main())


def test_end_call_of_another(daemon: FakeDaemon) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent, agent.tool_call("x") as call:
            report = await agent.end_call(call.id)
            assert report.verdict is Verdict.CANCELLED
        assert call.report == report

    asyncio.run(main())
