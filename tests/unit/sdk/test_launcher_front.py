"""`agentcg exec`, as people and agents call it: it waits for the command and says how the call
ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.harness import wait_until
from tests.unit.sdk.test_launcher import Daemon, Launcher, daemon, launcher

__all__ = ["launcher"]  # the fixture

OK = b"OK\0call=c1\0"
SAID = b"OK\0say=It was too much.\0say=And more.\0"
PIDS = "import json, os; print(json.dumps([os.getpid(), os.getppid(), os.getpgrp()]))"


@contextmanager
def answering(launcher: Launcher, begun: bytes = OK, ended: bytes = SAID) -> Iterator[Daemon]:
    """A daemon that answers what begins a call, and what asks how it ended."""

    def handle(conn: socket.socket, request: bytes) -> None:
        conn.send(ended if request.split(b"\0")[1] == b"report" else begun)

    with daemon(launcher.agent, handle) as it:
        yield it


def start(launcher: Launcher, *args: str, **options: Any) -> subprocess.Popen[str]:
    """Start `agentcg exec args...`."""
    program = str(launcher.programs / "agentcg")
    more = options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([program, "exec", *args], env=launcher.env(**more), text=True, **pipes)


def front(launcher: Launcher, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    process = start(launcher, *args, env=env)
    out, error = process.communicate(timeout=60)
    return subprocess.CompletedProcess(args, process.returncode, out, error)


def verbs(it: Daemon) -> list[bytes]:
    return [request[1] for request in it.requests]


@pytest.mark.parametrize("status", [1, 3, 126, 127, 255])
def test_the_status_of_the_command_is_passed_on(launcher: Launcher, status: int) -> None:
    with answering(launcher) as it:
        done = front(launcher, "sh", "-c", f"echo out; echo error >&2; exit {status}")
    assert (done.returncode, done.stdout) == (status, "out\n")
    assert done.stderr == (
        "error\nagentcg exec: call c1: It was too much.\nagentcg exec: call c1: And more.\n"
    )
    assert verbs(it) == [b"begin", b"report"]
    assert it.requests[1][2:] == [b"call=c1"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGPIPE])
def test_it_dies_of_what_the_command_dies_of(launcher: Launcher, number: signal.Signals) -> None:
    with answering(launcher):
        done = front(launcher, "sh", "-c", f"kill -{number.value} $$")
    assert done.returncode == -number
    assert "It was too much." in done.stderr


def test_nothing_is_asked_where_the_command_ended_well(launcher: Launcher) -> None:
    with answering(launcher) as it:
        done = front(launcher, "true")
    assert (done.returncode, done.stderr, verbs(it)) == (0, "", [b"begin"])


@pytest.mark.parametrize(
    "ended", [b"OK\0", b"ERR\0NOT_FOUND\0no such call\0", b"OK", b"garbage", b"OK\0say="]
)
def test_nothing_is_said_where_there_is_nothing_to_say(launcher: Launcher, ended: bytes) -> None:
    with answering(launcher, ended=ended):
        done = front(launcher, "sh", "-c", "exit 4")
    assert (done.returncode, done.stderr) == (4, "")


@pytest.mark.waits
def test_it_says_that_it_does_not_know(launcher: Launcher) -> None:
    with answering(launcher, ended=b""):
        done = front(launcher, "sh", "-c", "exit 4")
    assert done.returncode == 4
    assert done.stderr == (
        "agentcg exec: call c1: how it ended is not known, because the daemon hangs up\n"
    )


def test_it_waits_for_the_end_of_the_call(launcher: Launcher) -> None:
    def handle(conn: socket.socket, request: bytes) -> None:
        if request.split(b"\0")[1] == b"report":
            conn.send(b"WAIT\0seconds=3600\0")
            time.sleep(0.2)
            conn.send(SAID)
        else:
            conn.send(OK)

    with daemon(launcher.agent, handle):
        done = front(launcher, "sh", "-c", "exit 4")
    assert (done.returncode, done.stderr.count("It was too much.")) == (4, 1)


def test_what_is_said_is_harmless(launcher: Launcher) -> None:
    with answering(launcher, ended=b"OK\0say=a\x1b[31m\xc2\x9bb\0"):
        done = front(launcher, "false")
    assert done.stderr == "agentcg exec: call c1: a?[31m??b\n"


def test_quiet_becomes_the_command_itself(launcher: Launcher) -> None:
    warned = OK + b"say=memory_max: you asked for more.\0"
    with answering(launcher, begun=warned) as it:
        process = start(launcher, "--quiet", sys.executable, "-c", PIDS + "; exit(3)")
        out, error = process.communicate(timeout=60)
        pid, parent, _ = json.loads(out)
        assert (pid, parent) == (process.pid, os.getpid())
        assert (process.returncode, error, verbs(it)) == (3, "", [b"begin"])
        process = start(launcher, sys.executable, "-c", PIDS)
        out, error = process.communicate(timeout=60)
        pid, parent, group = json.loads(out)
        assert parent == process.pid and group == os.getpgrp()
        assert error == "agentcg exec: warning: --memory-max: you asked for more.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_the_command(launcher: Launcher, number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 9' {number.value}; echo ready; while :; do sleep 0.02; done"
    with answering(launcher, ended=b"OK\0"):
        process = start(launcher, "sh", "-c", script)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=60) == ("got\n", "")
        assert process.returncode == 9


def test_an_ignored_signal_stays_ignored(launcher: Launcher) -> None:
    ignore = "import os, signal, sys; signal.signal(1, signal.SIG_IGN); os.execv(sys.argv[1], "
    ignore += "['agentcg exec', *sys.argv[2:]])"
    program = str(launcher.programs / "agentcg-exec")
    with answering(launcher):
        process = subprocess.Popen(
            [sys.executable, "-c", ignore, program, "sh", "-c", "echo ready; read line; exit 5"],
            env=launcher.env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.communicate("go\n", timeout=60)
        assert process.returncode == 5


def test_the_command_dies_with_it(launcher: Launcher) -> None:
    with answering(launcher):
        process = start(launcher, "sh", "-c", "echo $$; exec sleep 1000")
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        process.wait()
        wait_until("the command is gone", lambda: not Path(f"/proc/{pid}").exists())
        process.communicate()


def test_a_pipe_ends_with_the_command(launcher: Launcher) -> None:
    with answering(launcher):
        read, write = os.pipe()
        script = "exec >&- 2>/dev/null 7>&-; exec sleep 1000"
        process = start(launcher, "sh", "-c", f"exec 7>&{write}; {script}", pass_fds=[write])
        os.close(write)
        # Neither its standard output nor another pipe is held open by the one that waits.
        assert process.stdout is not None and process.stdout.read() == ""
        fds = Path(f"/proc/{process.pid}/fd")
        wait_until("it holds stderr alone", lambda: len(_pipes(fds)) <= 2)
        process.terminate()
        process.wait(timeout=60)
        assert os.read(read, 1) == b""
        os.close(read)
        process.communicate()


def _pipes(fds: Path) -> list[str]:
    """Pipes that a process has open; it may be closing some just now."""
    links = []
    for fd in fds.iterdir():
        with suppress(FileNotFoundError):
            links.append(os.readlink(fd))
    return [link for link in links if link.startswith("pipe:")]


def test_it_is_one_process_where_nobody_could_be_told(launcher: Launcher) -> None:
    script = 'exec -a "agentcg exec" "$0" "$@" 2>&-'
    program = str(launcher.programs / "agentcg-exec")
    with answering(launcher):
        argv = ["bash", "-c", script, program, sys.executable, "-c", PIDS]
        process = subprocess.Popen(argv, env=launcher.env(), stdout=subprocess.PIPE)
        pid, parent, _ = json.loads(process.communicate(timeout=60)[0])
    assert (pid, parent) == (process.pid, os.getpid())


def test_without_a_daemon_the_command_runs_and_ends_as_ever(launcher: Launcher) -> None:
    done = front(launcher, "sh", "-c", "exit 6")
    assert done.returncode == 6
    (line,) = done.stderr.splitlines()
    assert line.startswith("agentcg exec: warning: daemon at ")


# What is wrong, in the words of who typed


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--memmax", "1G", "x"], "there is no option '--memmax'; did you mean '--memory-max'?"),
        (["--timout=5s", "x"], "there is no option '--timout'; did you mean '--timeout'?"),
        (["--frobnicate", "x"], "there is no option '--frobnicate' (see"),
        (["--memory"], "option '--memory' needs a value"),
        ([], "no command given"),
    ],
)
def test_a_mistake_is_answered_with_what_may_have_been_meant(
    launcher: Launcher, args: list[str], said: str
) -> None:
    done = front(launcher, *args)
    assert done.returncode == 125
    assert done.stderr.startswith(f"agentcg exec: {said}")
    assert done.stderr.endswith("(see agentcg exec --help)\n")


def test_a_refusal_names_the_option_or_the_variable(launcher: Launcher) -> None:
    refusal = b"ERR\0INVALID_ARGUMENT\0%s: 'x' cannot be used\0"
    for field, shown, env in (
        (b"memory_max", "--memory-max", {}),
        (b"hint", "--hint", {}),
        (b"hint", "$AGENT_RESOURCE_HINT", {"AGENT_RESOURCE_HINT": "x"}),
        (b"session", "--session", {}),
    ):
        launcher.agent.unlink(missing_ok=True)
        with answering(launcher, begun=refusal % field):
            given = ["--hint=x"] if shown == "--hint" else []
            done = front(launcher, *given, "true", **env)
        assert done.returncode == 125
        assert done.stderr == f"agentcg exec: {shown}: 'x' cannot be used\n"


def test_a_variable_with_a_mistake_is_named(launcher: Launcher) -> None:
    done = front(launcher, "true", AGENTCG_ON_UNAVAILABLE="refus")
    assert "$AGENTCG_ON_UNAVAILABLE 'refus' is neither 'run' nor 'refuse'" in done.stderr
    done = front(launcher, "--on-unavailable", "refus", "true")
    assert "--on-unavailable 'refus' is neither" in done.stderr


def test_a_directory_is_named_as_such(launcher: Launcher, tmp_path: Path) -> None:
    with answering(launcher, ended=b"OK\0"):
        done = front(launcher, str(tmp_path))
    assert done.returncode == 126
    assert done.stderr == f"agentcg exec: {tmp_path}: Is a directory\n"


def test_the_help_explains_values(launcher: Launcher) -> None:
    text = front(launcher, "--help").stdout
    assert text.startswith("usage: agentcg exec ")
    for word in ("512M, 1.5G, 2GiB", "250ms", '"250m"', '"10%" of each device'):
        assert word in text
    assert "%%" not in text
