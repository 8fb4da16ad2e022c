"""Calls declared in sandboxes that refuse sockets, on this kernel."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import EXEC, AgentProcess, DaemonProcess, wait_until
from tests.sandbox import KINDS, compile_filter, sandbox

pytestmark = [pytest.mark.programs, pytest.mark.usefixtures("lifecycle_program")]

FRONT = str(Path(EXEC).with_name("agentcg"))
RUN = """
done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **env})
result = (done.returncode, done.stdout, done.stderr)
"""
PATIENT = {"AGENTCG_ON_UNAVAILABLE": "refuse"}
"""So that a machine that is busy moves it before it runs."""


@pytest.fixture(scope="module")
def refuse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that installs a filter."""
    return compile_filter(tmp_path_factory.mktemp("f"))


def run(agent: AgentProcess, argv: list[str], **env: str) -> tuple[int, str, str]:
    """Run a command as a child of the agent: exit status, output, and what it says on stderr."""
    answer: tuple[int, str, str] = agent.run(RUN, argv=argv, env=PATIENT | env)
    return answer


def newest(daemon: DaemonProcess) -> pb.Report:
    """The report of the call that ended last, when all have ended."""
    wait_until("all calls have ended", lambda: not daemon.call_dirs())
    request = pb.ListReportsRequest(session_id="alpha", limit=1)
    return next(iter(daemon.admin.ListReports(request).reports))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("front", [[EXEC], [FRONT, "exec"]], ids=["launcher", "command"])
def test_the_intent_is_honoured(
    daemon: DaemonProcess, agent: AgentProcess, refuse: Path, kind: str, front: list[str]
) -> None:
    declared = [*front, "--name=mine", "--memory-max", "64M", "--timeout=1h", "--priority=30"]
    code, out, err = run(
        agent,
        [*sandbox(kind, refuse), *declared, "--", "sh", "-c", "cat /proc/self/cgroup; exit 3"],
    )
    # Where the socket can be reached, the command says what this host does not enforce.
    assert code == 3 and (err == "" or kind == "namespaces")
    path = next(line for line in out.split("\n") if line.startswith("0::"))
    report = newest(daemon)
    assert path.endswith(f"/call-{report.call_id}")
    assert (report.name, report.observed) == ("mine", False)
    assert list(report.argv) == ["sh", "-c", "cat /proc/self/cgroup; exit 3"]
    assert (report.exit_code, report.verdict) == (3, pb.VERDICT_FAILED)
    assert report.grant.memory_max_bytes == 64 << 20
    assert report.grant.timeout_usec == 3_600_000_000
    assert report.grant.priority == 30


@pytest.mark.parametrize("kind", ["socket", "connect", "all"])
def test_what_cannot_be_granted_does_not_run(
    daemon: DaemonProcess, agent: AgentProcess, refuse: Path, tmp_path: Path, kind: str
) -> None:
    told = tmp_path / "ran"
    argv = [*sandbox(kind, refuse), EXEC, "--memory-max=much", "--", "touch", str(told)]
    code, _, err = run(agent, argv)
    assert code == 125
    assert err == "agentcg-exec: refused by the daemon: --memory-max 'much': cannot be used\n"
    assert not told.exists()
    entry = next(line for line in reversed(daemon.audit_lines()) if '"call_refused"' in line)
    assert "memory_max: 'much' cannot be used" in entry


def test_a_declared_call_in_a_declared_call_lies_inside_it(
    daemon: DaemonProcess, agent: AgentProcess, refuse: Path
) -> None:
    inner = f"{EXEC} --name inner -- cat /proc/self/cgroup"
    argv = [*sandbox("all", refuse), EXEC, "--name=outer", "--", "sh", "-c", f"{inner}; true"]
    code, out, err = run(agent, argv)
    assert (code, err) == (0, "")
    path = next(line for line in out.split("\n") if line.startswith("0::"))
    assert path.count("/call-") >= 1
    newest(daemon)
    reports = daemon.admin.ListReports(pb.ListReportsRequest(session_id="alpha", limit=2)).reports
    found = {report.name: report for report in reports}
    assert found["inner"].parent_call_id == found["outer"].call_id
    assert path.endswith(f"/call-{found['inner'].call_id}")


def test_a_long_command_line_is_declared_whole(
    daemon: DaemonProcess, agent: AgentProcess, refuse: Path
) -> None:
    words = [f"argument-{number}" for number in range(200)]
    argv = [*sandbox("connect", refuse), EXEC, "--memory-max=32M", "--", "echo", *words, "--", "x"]
    code, out, _ = run(agent, argv)
    assert (code, out.split()) == (0, [*words, "--", "x"])
    report = newest(daemon)
    assert list(report.argv) == ["echo", *words, "--", "x"]
    assert report.grant.memory_max_bytes == 32 << 20


def test_the_signal_of_the_answer_is_as_it_was(agent: AgentProcess, refuse: Path) -> None:
    show = ["grep", "Sig[BI]", "/proc/self/status"]
    _, plain, _ = run(agent, show)
    _, declared, _ = run(agent, [*sandbox("socket", refuse), EXEC, "--", *show])
    assert declared == plain
    blocked = "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG]); "
    code = blocked + f"os.execvp({EXEC!r}, [{EXEC!r}, '--', *{show!r}])"
    _, kept, _ = run(agent, [*sandbox("socket", refuse), sys.executable, "-c", code])
    mask = next(line for line in kept.split("\n") if line.startswith("SigBlk"))
    assert int(mask.split()[1], 16) == 1 << 22


@pytest.mark.waits
@pytest.mark.parametrize("kind", ["socket", "connect"])
def test_it_runs_where_nobody_moves_it_and_says_so(refuse: Path, kind: str) -> None:
    argv = [*sandbox(kind, refuse), EXEC, "--memory-max=64M", "--", "sh", "-c", "exit 4"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 4
    assert "the sandbox refuses sockets, and nobody moved this process within 100 ms" in done.stderr
    assert done.stderr.endswith("; running without limits\n")
    done = subprocess.run(
        [*argv[:-4], "--on-unavailable=refuse", *argv[-4:]], capture_output=True, text=True
    )
    assert done.returncode == 125
    assert done.stderr.endswith("; command not run\n")


def test_a_full_session_has_no_further_call(start_daemon: StartDaemon, refuse: Path) -> None:
    daemon = start_daemon("")
    agent = daemon.open("alpha", calls_max="1")
    hold = "held = subprocess.Popen([EXEC, '--', 'sleep', '1000'], start_new_session=True)"
    agent.run(hold)
    wait_until("it is in its call", lambda: len(daemon.call_dirs()) == 1)
    argv = [*sandbox("socket", refuse), EXEC, "--", "true"]
    code, _, err = run(agent, argv)
    assert (code, err) == (125, "agentcg-exec: refused by the daemon: there is no room\n")
    agent.run("os.killpg(held.pid, 9); held.wait()")
    wait_until("it has ended", lambda: not daemon.call_dirs())
    assert run(agent, argv)[0] == 0


SDK = """
import agentcgroup
with agentcgroup.Agent() as agent:
    argv = ["cat", "/proc/self/cgroup"]
    done = agent.run(argv, name="from the sdk", memory_max="48M", capture_output=True, text=True)
    print(done.returncode, done.report, done.stdout)
    with agent.tool_call("two", memory_max="24M") as call:
        assert call.sealed and not call.confined
        for _ in range(2):
            print(call.run(argv, capture_output=True, text=True).stdout)
    try:
        agent.run(["/nonexistent/program"])
    except FileNotFoundError as error:
        print(error.filename)
"""


@pytest.mark.parametrize("kind", ["socket", "connect"])
def test_the_sdk_has_its_launcher_declare(
    daemon: DaemonProcess, agent: AgentProcess, refuse: Path, kind: str
) -> None:
    argv = [*sandbox(kind, refuse), sys.executable, "-c", textwrap.dedent(SDK)]
    code, out, err = run(agent, argv)
    assert (code, err) == (0, "")
    assert out.startswith("0 None ")
    assert out.rstrip().endswith("/nonexistent/program")
    paths = {line for line in out.split("\n") if "0::" in line}
    assert len(paths) == 3 and all("/call-" in path for path in paths)
    newest(daemon)
    request = pb.ListReportsRequest(session_id="alpha", limit=4)
    reports = daemon.admin.ListReports(request).reports
    found = sorted((report.name, report.grant.memory_max_bytes) for report in reports)
    assert found == [
        ("from the sdk", 48 << 20),
        ("program", 0),
        ("two", 24 << 20),
        ("two", 24 << 20),
    ]


MANY = """
from concurrent.futures import ThreadPoolExecutor
def one(number):
    argv = [*before, EXEC, f"--name=n{number}", "--memory-max", f"{number + 1}M", "--", *command]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **env})
    return done.returncode, done.stdout, done.stderr
with ThreadPoolExecutor(8) as pool:
    result = list(pool.map(one, range(count)))
"""


@pytest.mark.full_speed
def test_a_daemon_that_stands_still_for_moments_loses_none(
    daemon: DaemonProcess, agent: AgentProcess, refuse: Path
) -> None:
    count, over, process = 48, threading.Event(), daemon.process
    assert process is not None

    def hold_up() -> None:
        while not over.wait(0.1):
            process.send_signal(signal.SIGSTOP)
            over.wait(0.5)
            process.send_signal(signal.SIGCONT)

    values: dict[str, Any] = {"before": sandbox("all", refuse), "count": count, "env": PATIENT}
    thread = threading.Thread(target=hold_up)
    thread.start()
    try:
        found = agent.run(MANY, command=["cat", "/proc/self/cgroup"], **values)
    finally:
        over.set()
        thread.join()
    assert {(code, err) for code, _, err in found} == {(0, "")}
    newest(daemon)
    request = pb.ListReportsRequest(session_id="alpha", limit=count)
    reports = daemon.admin.ListReports(request).reports
    granted = {report.name: report.grant.memory_max_bytes for report in reports}
    assert granted == {f"n{number}": (number + 1) << 20 for number in range(count)}


@pytest.mark.parametrize("kind", ["socket", "connect", "all", "all, connect"])
def test_many_at_a_time_have_each_their_own(
    daemon: DaemonProcess, agent: AgentProcess, refuse: Path, kind: str
) -> None:
    count = 64
    values: dict[str, Any] = {"before": sandbox(kind, refuse), "count": count, "env": PATIENT}
    found = agent.run(MANY, command=["cat", "/proc/self/cgroup"], **values)
    paths = {line for code, out, _ in found for line in out.split("\n") if line.startswith("0::")}
    assert {(code, err) for code, _, err in found} == {(0, "")}
    assert len(paths) == count and all("/call-" in path for path in paths)
    newest(daemon)
    request = pb.ListReportsRequest(session_id="alpha", limit=count)
    reports = daemon.admin.ListReports(request).reports
    granted = {report.name: report.grant.memory_max_bytes for report in reports}
    assert granted == {f"n{number}": (number + 1) << 20 for number in range(count)}
