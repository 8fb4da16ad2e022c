"""Calls of agents that declare none, by the rules without configuration, on this kernel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import AgentProcess, DaemonProcess, wait_until

pytestmark = [pytest.mark.programs, pytest.mark.usefixtures("lifecycle_program")]

OTHERS = "[boundaries]\nenabled = true\n"
"""Without the rules that tests have otherwise."""
RUN = """
done = subprocess.run(argv, capture_output=True, text=True)
result = (done.returncode, done.stdout)
"""
SHELL = """
import pty
rc = globals().pop("rc", "/dev/null")
if terminal:
    pid, fd = pty.fork()
    if not pid:
        os.environ["PS1"] = os.environ["PROMPT_COMMAND"] = ""
        os.execvp("bash", ["bash", "--rcfile", rc, "--noprofile", "-i"])
    said, heard = os.fdopen(fd, "wb", 0), fd
else:
    shell = subprocess.Popen(["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid, said, heard = shell.pid, shell.stdin, shell.stdout.fileno()
result = []
for number, command in enumerate(commands):
    said.write(f"{command}; echo end''-{number}\\n".encode())
    said.flush()
    text = b""
    while f"end-{number}".encode() not in text:
        text += os.read(heard, 65536)
    result.append(text.decode())
said.write(b"exit\\n")
said.flush()
os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def daemon(start_module_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with the rules that hold without configuration."""
    return start_module_daemon(OTHERS)


@pytest.fixture
def agent(daemon: DaemonProcess) -> Iterator[AgentProcess]:
    """An agent in a session of its own."""
    agent = daemon.open("alpha")
    yield agent
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="alpha"))


def calls(daemon: DaemonProcess) -> list[tuple[str, list[str]]]:
    """Names and arguments of all calls of the session, oldest first, when all have ended."""
    wait_until("all calls have ended", lambda: not daemon.call_dirs())
    time.sleep(0.3)  # what ended before it could be moved is reported by its exit event
    request = pb.ListReportsRequest(session_id="alpha", limit=500)
    reports = daemon.admin.ListReports(request).reports
    assert all(report.observed for report in reports)
    return [(report.name, list(report.argv)) for report in reversed(reports)]


def test_a_program_that_a_python_agent_runs_is_a_call(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    code, _ = agent.run(RUN, argv=["sed", "", "/proc/self/cgroup", "/dev/null"])
    assert code == 0
    agent.run(RUN, argv=["sleep", "0.2"])
    assert calls(daemon) == [
        ("sed", ["sed", "", "/proc/self/cgroup", "/dev/null"]),
        ("sleep", ["sleep", "0.2"]),
    ]


def test_probes_and_servers_are_none(daemon: DaemonProcess, agent: AgentProcess) -> None:
    for argv in (
        ["uname", "-a"],
        ["git", "rev-parse", "HEAD"],
        ["bash", "-c", "env"],
        ["bash", "-n", "/dev/null"],
        ["sh", "-c", "nice -n 10 /bin/bash"],
        ["python3", "-c", "import multiprocessing.resource_tracker"],
    ):
        agent.run("subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL)", argv=argv)
    assert calls(daemon) == []


def test_a_servers_tools_are_calls_and_it_is_none(
    daemon: DaemonProcess, agent: AgentProcess, tmp_path: Path
) -> None:
    server = tmp_path / "mcp_demo.py"
    server.write_text(
        "import subprocess\nsubprocess.run(['sleep', '0.1'])\n"
        "subprocess.run('sleep 0.1; true', shell=True)\n"
    )
    agent.run(RUN, argv=["python3", str(server)])
    assert calls(daemon) == [
        ("sleep", ["sleep", "0.1"]),
        ("sleep", ["/bin/sh", "-c", "sleep 0.1; true"]),
    ]


def test_the_report_has_the_command_and_not_what_an_agent_wraps_around_it(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = (
        "source /nonexistent/.claude/shell-snapshots/snapshot-bash-1-a.sh 2>/dev/null || true && "
        + "true && " * 100
        + "eval 'sleep 0.2; pwd' < /dev/null && pwd -P >| /dev/null"
    )
    agent.run(RUN, argv=["/bin/bash", "-c", script])
    assert calls(daemon) == [("sleep", ["/bin/bash", "-c", "sleep 0.2; pwd"])]


@pytest.mark.parametrize("terminal", [True, False])
def test_each_job_of_a_shell_is_a_call(
    daemon: DaemonProcess, agent: AgentProcess, terminal: bool
) -> None:
    commands = [
        "cd /",
        "sleep 0.2",
        "sleep 0.2 | cat | cat",
        "grep 0:: /proc/self/cgroup",
        "python3 -c 'import time; time.sleep(0.2)'",
        "echo builtin",
        "bash -c 'sleep 0.2; true'",
    ]
    agent.run(SHELL, commands=commands, terminal=terminal)
    names = [name for name, _ in calls(daemon)]
    assert len(names) == 5
    assert names[0] == "sleep" and names[2:] == ["grep", "python3", "sleep"]
    assert names[1] in ("sleep", "cat")  # of a pipeline, whichever was executed first


def test_what_a_shells_startup_files_start_is_none(
    daemon: DaemonProcess, agent: AgentProcess, tmp_path: Path
) -> None:
    startup = tmp_path / "bashrc"
    startup.write_text(
        "sleep 0.2\n"
        "x=$(sleep 0.2; sed -n 1p /dev/null)\n"
        'eval "$(python3 -c \'import subprocess as s; s.run(["sleep", "0.2"])\')"\n'
        "eval \"$(bash --norc -c 'sleep 0.1; true')\"\n"
        "sed -n 1p /dev/null | cat\n"
    )
    commands = [
        "sleep 0.3",
        "x=$(sleep 0.4)",
        "x=$(cd /; sleep 0.5; true)",
        "(cd /; sleep 0.6; true)",
        "sleep 0.7 & wait",
    ]
    agent.run(SHELL, commands=commands, terminal=True, rc=str(startup))
    found = calls(daemon)
    assert found == [("sleep", ["sleep", f"0.{number}"]) for number in range(3, 8)]


@pytest.mark.waits
def test_a_shell_whose_job_control_is_switched_off_is_believed_in_time(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    """What it starts looks like what startup files start, for the first ten seconds."""
    commands = ["set +m", "read -t 10.5 < /dev/tty", "sleep 0.3", "x=$(sleep 0.4)"]
    agent.run(SHELL, commands=commands, terminal=True)
    assert calls(daemon) == [("sleep", ["sleep", "0.3"]), ("sleep", ["sleep", "0.4"])]
