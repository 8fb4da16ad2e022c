"""The end of a command is the end of `run` and `communicate`, whoever holds its pipes by then."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agentcgroup import Agent, AgentcgWarning, AsyncAgent
from agentcgroup.pipes import LINGER_S, read_away
from agentcgroup.results import CallPopen
from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.unit.fake_daemon import FakeDaemon, running

BOUND_S = 5.0
"""Far below the minute for which children hold the pipes here; machines may be slow."""


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    yield from running(monkeypatch)


@pytest.fixture
def child_pid(tmp_path: Path) -> Iterator[Path]:
    """A file for the pid of a child that the test leaves running; it is ended afterwards."""
    file = tmp_path / "child"
    yield file
    if file.exists():
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def leaving(child_pid: Path, then: str = "echo done") -> list[str]:
    """A command that leaves a child behind which holds its pipes."""
    return ["sh", "-c", f"sleep 60 & echo $! > {child_pid}; {then}"]


@pytest.mark.parametrize("timeout", [None, 30])
def test_run_does_not_wait_for_a_child_that_holds_the_pipes(
    daemon: FakeDaemon, child_pid: Path, timeout: float | None
) -> None:
    began = time.monotonic()
    with Agent() as agent:
        argv = leaving(child_pid, "echo done; echo oops >&2; exit 3")
        done = agent.run(argv, capture_output=True, text=True, timeout=timeout)
    assert time.monotonic() - began < BOUND_S
    assert (done.returncode, done.stdout, done.stderr) == (3, "done\n", "oops\n")
    assert daemon.ended[0].reason == pb.END_REASON_DONE
    assert daemon.ended[0].wait_status == 3 << 8


def test_a_command_that_ended_before_the_timeout_did_not_time_out(child_pid: Path) -> None:
    with CallPopen(leaving(child_pid), "x", stdout=subprocess.PIPE) as process:
        time.sleep(0.3)
        assert process.communicate(timeout=0.1) == (b"done\n", None)


def test_nothing_that_the_command_wrote_is_lost(child_pid: Path) -> None:
    code = "import sys; sys.stdout.write('x' * 1_000_000); sys.stdout.flush()"
    script = f'sleep 60 & echo $! > {child_pid}; exec {sys.executable} -c "{code}"'
    options = {"stdout": subprocess.PIPE, "pipesize": 1 << 20}
    with CallPopen(["sh", "-c", script], "x", **options) as process:
        process.wait()  # all of it stands in the pipe now
        assert len(process.communicate()[0]) == 1_000_000


def test_a_child_that_never_stops_writing_does_not_hold_it_up(child_pid: Path) -> None:
    script = f"yes & echo $! > {child_pid}; sleep 0.1"
    began = time.monotonic()
    with CallPopen(["sh", "-c", script], "x", stdout=subprocess.PIPE) as process:
        assert process.communicate()[0].startswith(b"y\ny\n")
    assert time.monotonic() - began < BOUND_S
    # Its pipe is still read: it would have died of SIGPIPE else.
    time.sleep(0.2)
    os.kill(int(child_pid.read_text()), 0)


def test_the_last_lines_of_a_substituted_process_come(tmp_path: Path) -> None:
    script = f"echo last > >(sleep {LINGER_S / 4}; cat)"
    with CallPopen(["bash", "-c", script], "x", stdout=subprocess.PIPE) as process:
        assert process.communicate()[0] == b"last\n"


def test_communicate_goes_on_after_a_timeout() -> None:
    script = "read a; echo $a; sleep 0.5; echo second"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with CallPopen(["sh", "-c", script], "x", text=True, **pipes) as process:
        with pytest.raises(subprocess.TimeoutExpired) as late:
            process.communicate("first\n", timeout=0.2)
        assert late.value.output == b"first\n"  # bytes, as subprocess has it
        with pytest.raises(ValueError, match="after starting"):
            process.communicate("more")
        assert process.communicate() == ("first\nsecond\n", None)
        assert process.communicate() == ("first\nsecond\n", None)


def test_large_input_and_output_at_once() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    data = os.urandom(3_000_000)
    with CallPopen(["cat"], "x", **pipes) as process:
        assert process.communicate(data) == (data, b"")
    with CallPopen(["true"], "x", stdin=subprocess.PIPE) as process:
        assert process.communicate(data) == (None, None)  # nobody reads it


@pytest.mark.parametrize("text", [True, False])
def test_what_a_readline_has_read_ahead_is_not_lost(text: bool) -> None:
    script = "printf 'ready\\nonë\\n'; read x; echo two"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    options = {"text": True, "encoding": "utf-8"} if text else {}
    with CallPopen(["sh", "-c", script], "x", **pipes, **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == ("ready\n" if text else b"ready\n")
        rest = process.communicate("go\n" if text else b"go\n")[0]
    assert rest == ("onë\ntwo\n" if text else "onë\ntwo\n".encode())


def test_universal_newlines() -> None:
    with CallPopen(["printf", r"a\r\nb\rc"], "x", stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0] == "a\nb\nc"


@pytest.mark.parametrize("flavour", ["run", "communicate"])
def test_asyncio_does_not_wait_for_it_either(
    daemon: FakeDaemon, child_pid: Path, flavour: str
) -> None:
    argv = leaving(child_pid, "cat; echo oops >&2; exit 3")

    async def by_run(agent: AsyncAgent) -> tuple[int, bytes, bytes]:
        done = await agent.run(argv, input=b"in\n", capture_output=True)
        return done.returncode, done.stdout, done.stderr

    async def by_communicate(agent: AsyncAgent) -> tuple[int, bytes, bytes]:
        pipe = subprocess.PIPE
        async with agent.tool_call("x") as call:
            process = await call.popen(argv, stdin=pipe, stdout=pipe, stderr=pipe)
            out, err = await process.communicate(b"in\n")
            return await process.wait(), out, err

    async def main() -> tuple[int, bytes, bytes]:
        async with AsyncAgent() as agent:
            return await (by_run if flavour == "run" else by_communicate)(agent)

    began = time.monotonic()
    assert asyncio.run(main()) == (3, b"in\n", b"oops\n")
    assert time.monotonic() - began < BOUND_S
    assert daemon.ended[0].reason == pb.END_REASON_DONE


def test_what_comes_later_is_read_until_the_end() -> None:
    ours, its = os.pipe()
    read_away([ours])
    os.set_blocking(its, True)
    assert os.write(its, bytes(1 << 20)) == 1 << 20  # more than a pipe holds
    os.close(its)
    deadline = time.monotonic() + BOUND_S
    while time.monotonic() < deadline:
        try:
            os.fstat(ours)
        except OSError:
            return
        time.sleep(0.01)
    raise AssertionError("it was not closed")


@pytest.mark.parametrize(
    ("leave", "reason"),
    [
        ("call.run(['true'])", pb.END_REASON_DONE),
        ("call.run(['false'], check=True)", pb.END_REASON_DONE),
        ("call.popen(['sleep', '60'])", pb.END_REASON_UNSPECIFIED),
        ("call.run(['sleep', '60'], timeout=0.1)", pb.END_REASON_TIMEOUT),
        ("call.run(['true']); 1 / 0", pb.END_REASON_CANCELLED),
        ("call.popen(['sleep', '60']); 1 / 0", pb.END_REASON_CANCELLED),
        # Whose signal it died of: its own, or the caller's.
        ("call.run(['sh', '-c', 'kill -9 $$']); 1 / 0", pb.END_REASON_DONE),
        ("p = call.popen(['sleep', '60']); p.kill(); p.wait(); 1 / 0", pb.END_REASON_CANCELLED),
        ("call.popen(['sleep', '60']).wait(timeout=0.1)", pb.END_REASON_TIMEOUT),
        ("raise KeyboardInterrupt", pb.END_REASON_CANCELLED),
    ],
)
def test_the_daemon_is_told_why_a_call_ends(
    daemon: FakeDaemon, leave: str, reason: pb.EndReason.ValueType
) -> None:
    with Agent() as agent, suppress(Exception, KeyboardInterrupt):
        with agent.tool_call("x") as call:
            exec(leave, {"call": call})
    assert [end.reason for end in daemon.ended] == [reason]
    given_up = [reason] if ".run(" in leave and "timeout" in leave else []
    assert [end.reason for end in daemon.given_up] == given_up


def test_an_interrupted_run_is_ended_by_the_daemon(daemon: FakeDaemon) -> None:
    def interrupt() -> None:
        while not daemon.entered("c1"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with Agent() as agent, pytest.raises(KeyboardInterrupt):
        thread.start()
        agent.run(["sleep", "60"], capture_output=True)
    thread.join()
    assert [end.reason for end in daemon.ended] == [pb.END_REASON_CANCELLED]
    with pytest.raises(ProcessLookupError):
        os.kill(daemon.entered("c1")[0], 0)


def test_a_call_that_keeps_its_servers_ends_as_done(daemon: FakeDaemon) -> None:
    with Agent() as agent, agent.tool_call("x", leftovers="keep") as call:
        process = call.popen(["sleep", "60"])
        assert process.poll() is None
    process.kill()
    process.wait()
    assert daemon.ended[0].reason == pb.END_REASON_DONE


def test_the_daemon_ends_a_command_whose_time_has_passed(daemon: FakeDaemon) -> None:
    alive: list[bool] = []

    def look(request: pb.EndCallRequest) -> None:
        status = Path(f"/proc/{daemon.entered(request.call_id)[0]}/stat").read_text()
        alive.append(status.rsplit(")", 1)[1].split()[0] != "Z")

    daemon.before["EndCall"] = look
    with Agent() as agent, pytest.raises(subprocess.TimeoutExpired):
        agent.run(["sleep", "60"], timeout=0.2)

    async def main() -> None:
        async with AsyncAgent() as agent:
            await agent.run(["sleep", "60"], timeout=0.2)

    daemon.before["EndCall"] = look
    with pytest.raises(subprocess.TimeoutExpired):
        asyncio.run(main())
    assert alive == [True, True]


@pytest.mark.waits
def test_a_command_does_not_outlive_its_timeout_where_the_daemon_is_away(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentcgroup.flow.END_TIMEOUT_S", 3.0)
    with Agent() as agent, agent.tool_call("x") as call:
        call._single = True  # as Agent.run has it
        daemon.stop()
        process = call.popen(["sleep", "60"])
        with pytest.warns(AgentcgWarning, match="report of call c1"):
            call._give_up(process, subprocess.TimeoutExpired("x", 1))
        assert process.wait() == -signal.SIGKILL
