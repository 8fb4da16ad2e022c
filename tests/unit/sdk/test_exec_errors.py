"""A program that cannot be executed: `run` raises what subprocess raises, and the call is told."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentcgroup import Agent, AsyncAgent
from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.unit.fake_daemon import FakeDaemon, running


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, programs: Path) -> Iterator[FakeDaemon]:
    for daemon in running(monkeypatch):
        monkeypatch.setenv("AGENTCG_EXEC", str(programs / "agentcg-exec"))
        yield daemon


def _file(path: Path, content: str, mode: int = 0o755) -> str:
    path.write_text(content)
    path.chmod(mode)
    return str(path)


def _loop(path: Path) -> str:
    path.symlink_to(path)
    return str(path)


Case = Callable[[Path], tuple[list[str], dict[str, Any]]]
CASES: dict[str, Case] = {
    "no such program": lambda d: (["no-such-program"], {}),
    "no such path": lambda d: ([f"{d}/none"], {}),
    "through a file": lambda d: ([_file(d / "f", "") + "/x"], {}),
    "an argument too long": lambda d: (["sh", "-c", "#" * 200_000], {}),
    "interpreter missing": lambda d: ([_file(d / "s", "#!/no/such/interpreter\n")], {}),
    "interpreter not executable": lambda d: (
        [_file(d / "s", f"#!{_file(d / 'i', '', 0o644)}\n")],
        {},
    ),
    "not executable": lambda d: ([_file(d / "s", "#!/bin/sh\n", 0o644)], {}),
    "no format": lambda d: ([_file(d / "s", "echo\n")], {}),
    "directory": lambda d: ([str(d)], {}),
    "links in a circle": lambda d: ([_loop(d / "l")], {}),
    "no such working directory": lambda d: (["true"], {"cwd": str(d / "none")}),
    "working directory is a file": lambda d: (["true"], {"cwd": _file(d / "f", "")}),
    "in PATH of env": lambda d: (["true"], {"env": {"PATH": str(d)}}),
    "not executable in PATH": lambda d: (
        [os.path.basename(_file(d / "tool-x", "", 0o644))],
        {"env": {"PATH": f"{d}:/usr/bin"}},
    ),
}


def _error(run: Callable[[], object]) -> tuple[type, int | None, object]:
    with pytest.raises(OSError) as caught:
        run()
    return type(caught.value), caught.value.errno, caught.value.filename


@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_subprocess(daemon: FakeDaemon, tmp_path: Path, case: str) -> None:
    argv, options = CASES[case](tmp_path)
    expected = _error(lambda: subprocess.run(argv, **options))
    with Agent() as agent:
        assert _error(lambda: agent.run(argv, capture_output=True, **options)) == expected
        assert _error(lambda: agent.run(argv, close_fds=False, **options)) == expected

    async def main() -> None:
        async with AsyncAgent() as agent:
            await agent.run(argv, **options)

    assert _error(lambda: asyncio.run(main())) == expected
    status = {os.waitstatus_to_exitcode(end.wait_status) for end in daemon.ended}
    assert status <= {126, 127}, "the daemon is told that it could not be executed"
    assert {end.reason for end in daemon.ended} == {pb.END_REASON_DONE}


def test_a_program_that_is_being_written(daemon: FakeDaemon, tmp_path: Path) -> None:
    program = tmp_path / "busy"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(0o755)
    with program.open("ab"), Agent() as agent:
        assert _error(lambda: agent.run([str(program)]))[:2] == (OSError, errno.ETXTBSY)


@pytest.mark.parametrize("status", [126, 127])
def test_a_tool_may_end_so_itself(daemon: FakeDaemon, status: int) -> None:
    with Agent() as agent:
        assert agent.run(["sh", "-c", f"exit {status}"]).returncode == status
        done = agent.run("no-such-command", shell=True, stderr=subprocess.DEVNULL)  # noqa: S604
        assert done.returncode == 127


def test_descriptors_of_the_callers_are_passed_on(daemon: FakeDaemon) -> None:
    read, write = os.pipe()
    with Agent() as agent:
        agent.run(["bash", "-c", f"echo hi >&{write}"], pass_fds=[write])
    os.close(write)
    assert os.read(read, 16) == b"hi\n"
    os.close(read)


def test_a_name_from_argv_is_made_printable(daemon: FakeDaemon, tmp_path: Path) -> None:
    for raw in (b"we\nird\ttool", b"a\xc2\x9bb", b"a\xe2\x80\xaeb", b"\xff\xfe"):
        path = os.fsencode(tmp_path) + b"/" + raw
        fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o755)
        os.write(fd, b"#!/bin/sh\nexit 3\n")
        os.close(fd)
        with Agent() as agent:
            assert agent.run([path]).returncode == 3
    names = [begun.name for begun in daemon.begun]
    assert names == ["we?ird?tool", "a?b", "a?b", "\ufffd\ufffd"]
