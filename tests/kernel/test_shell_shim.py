"""`agentcg-sh`: a shell in a call of its own, through which nothing of the command passes."""

from __future__ import annotations

import json
import os
import pty
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.harness import EXEC, AgentProcess, DaemonProcess, wait_until
from tests.hook_inputs import wrapped

NO_PROGRAMS = "[bpf]\nenabled = false\n"
"""What the kernel programs would see besides is not what these tests are about."""
SHIM = str(Path(EXEC).with_name("agentcg-sh"))
RUN = """
done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **more}, input=said)
result = (done.returncode, done.stdout, done.stderr)
"""
LOOK = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getpid(), os.getppid()]))"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that sees only what it is told."""
    running = DaemonProcess(tmp_path_factory.mktemp("d"), NO_PROGRAMS)
    try:
        running.start()
        yield running
    finally:
        running.close()


def run(agent: AgentProcess, *argv: str, said: str = "", **env: str) -> tuple[int, str, str]:
    status, out, error = agent.run(RUN, argv=[SHIM, *argv], more=env, said=said)
    return int(status), str(out), str(error)


def newest(daemon: DaemonProcess, count: int = 1) -> list[pb.Report]:
    wait_until("all calls have ended", lambda: not daemon.call_dirs())
    request = pb.ListReportsRequest(session_id="alpha", limit=count)
    return list(daemon.admin.ListReports(request).reports)


def test_as_a_shell_as_a_prefix_and_for_a_program(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    assert run(agent, "-c", "echo $0 $1; exit 3", "a", "b") == (3, "a b\n", "")
    assert newest(daemon)[0].exit_code == 3
    assert run(agent, "echo 'one  argument'; exit 4") == (4, "one  argument\n", "")
    assert newest(daemon)[0].name == "echo"
    argv = ["", "a  b", "$HOME", "'\"", "é"]
    status, out, error = run(agent, sys.executable, "-c", LOOK, *argv)
    assert (status, json.loads(out)[0], error) == (0, argv, "")
    assert run(agent, "-o", "pipefail", "-c", "false | true") == (1, "", "")
    assert run(agent, "-s", said="echo from stdin; exit 5") == (5, "from stdin\n", "")


def test_it_is_one_process_from_first_to_last(agent: AgentProcess) -> None:
    code = """
process = subprocess.Popen([shim, "-c", "exec sleep 1000"])
while open(f"/proc/{process.pid}/comm").read() != "sleep\\n": time.sleep(0.01)
path = open(f"/proc/{process.pid}/cgroup").read()
process.terminate()
result = (process.wait(), path)
"""
    status, path = agent.run(code, shim=SHIM)
    assert status == -signal.SIGTERM and "/call-" in path


def test_what_claude_code_hands_to_its_prefix_is_named_by_the_command(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = wrapped("claude", "printf '%s' \"it's\"; exit 7")[2]
    assert run(agent, script) == (7, "it's", "")
    (report,) = newest(daemon)
    assert (report.name, report.command) == ("printf", "printf '%s' \"it's\"; exit 7")


def test_inside_its_own_call_it_begins_no_other(daemon: DaemonProcess, agent: AgentProcess) -> None:
    before = daemon.admin.GetPool(pb.GetPoolRequest()).calls_begun
    assert run(agent, "-c", f"{SHIM} -c '{SHIM} -c \"echo deep\"'") == (0, "deep\n", "")
    assert daemon.admin.GetPool(pb.GetPoolRequest()).calls_begun == before + 1


def test_the_variable_alone_does_not_keep_it_from_beginning_one(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    before = daemon.admin.GetPool(pb.GetPoolRequest()).calls_begun
    assert run(agent, "true", AGENTCG_SH="/call-000000000000")[0] == 0
    assert daemon.admin.GetPool(pb.GetPoolRequest()).calls_begun == before + 1


def test_our_own_commands_are_no_calls(daemon: DaemonProcess, agent: AgentProcess) -> None:
    before = daemon.admin.GetPool(pb.GetPoolRequest()).calls_begun
    hook = Path(SHIM).with_name("agentcg")
    assert run(agent, f"{hook} hook claude") == (0, "", "")
    assert daemon.admin.GetPool(pb.GetPoolRequest()).calls_begun == before


def test_a_terminal_stays_one(daemon: DaemonProcess, agent: AgentProcess) -> None:
    master, slave = pty.openpty()
    script = f"import os; fd = os.open({os.ttyname(slave)!r}, os.O_RDWR | os.O_NOCTTY)\n"
    script += "result = subprocess.run([shim, 'test -t 0 -a -t 1 && tty'], stdin=fd, stdout=fd)"
    script += ".returncode\nos.close(fd)"
    try:
        assert agent.run(script, shim=SHIM) == 0
        assert os.read(master, 100).decode().strip() == os.ttyname(slave)
    finally:
        os.close(slave)
        os.close(master)


def test_without_a_call_the_command_runs_all_the_same(
    daemon: DaemonProcess, agent: AgentProcess, tmp_path: Path
) -> None:
    away = {"AGENTCG_RUN_DIR": str(tmp_path)}
    assert run(agent, "echo here", **away) == (0, "here\n", "")
    assert run(agent, "echo here", AGENT_RESOURCE_HINT="nonsense") == (0, "here\n", "")
    outside = subprocess.run(
        [SHIM, "echo outside of any session"],
        capture_output=True,
        text=True,
        env={"AGENTCG_RUN_DIR": str(daemon.run_dir), "PATH": os.environ["PATH"]},
        check=False,
    )
    assert (outside.returncode, outside.stderr) == (0, "")
    status, out, error = run(agent, "echo here", AGENTCG_ON_UNAVAILABLE="refuse", **away)
    assert (status, out) == (125, "") and "command not run" in error


def test_another_shell_and_one_that_is_not_there(agent: AgentProcess) -> None:
    assert run(agent, "echo $0", AGENTCG_SHELL="/bin/sh") == (0, "/bin/sh\n", "")
    status, _, error = run(agent, "true", AGENTCG_SHELL="/nonexistent")
    assert status == 127 and "/nonexistent: No such file or directory" in error
    assert run(agent, "/nonexistent", "argument")[0] == 127


@pytest.mark.full_speed
def test_it_adds_next_to_nothing_of_its_own(agent: AgentProcess, tmp_path: Path) -> None:
    code = """
took, away = {}, {**os.environ, "AGENTCG_RUN_DIR": nowhere}
ways = {"bare": (["/bin/bash", "-c", ":"], None), "alone": ([shim, "-c", ":"], away)}
ways |= {"in a call": ([shim, "-c", ":"], None)}
for _ in range(100):
    for name, (argv, env) in ways.items():
        began = time.monotonic()
        subprocess.run(argv, env=env)
        took.setdefault(name, []).append(time.monotonic() - began)
result = took
"""
    took = agent.run(code, shim=SHIM, nowhere=str(tmp_path))
    for name, values in took.items():
        print(f"{name}: median {statistics.median(values) * 1e3:.2f} ms, least {min(values) * 1e3}")
    # The shortest: what other work on this machine adds is not its own. A call costs what it does.
    assert min(took["alone"]) - min(took["bare"]) < 0.001
    assert min(took["in a call"]) - min(took["bare"]) < 0.004
