"""Tool calls that no agent declares, found by the lifecycle program on this kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from agentcgroup import audit
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.features import LIFECYCLE, load
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.harness import EXEC, SLOW, AgentProcess, DaemonProcess, wait_until

pytestmark = pytest.mark.programs

RUN = """
done = subprocess.run(argv, capture_output=True, text=True)
result = (done.returncode, done.stdout)
"""


@pytest.fixture(scope="module", autouse=True)
def _works() -> None:
    """Skip the module where the lifecycle program does not load."""
    bpf, states = load("lifecycle")
    if bpf is None:
        pytest.skip(f"no lifecycle program here: {states[0].reason}")
    bpf.close()
    assert {s.name for s in states if s.works} >= {LIFECYCLE}


def shell(agent: AgentProcess, script: str, *argv: str) -> tuple[int, str]:
    """Run `bash -c` as a child of the agent, undeclared: exit status and output."""
    code, out = agent.run(RUN, argv=["bash", "-c", script, "bash", *argv])
    return code, out


def reports(daemon: DaemonProcess, session: str = "alpha") -> list[pb.Report]:
    """All kept reports of a session, newest first, when all calls have ended."""
    wait_until("all calls have ended", lambda: not daemon.call_dirs())
    request = pb.ListReportsRequest(session_id=session, limit=100_000)
    return list(daemon.admin.ListReports(request).reports)


def ended(daemon: DaemonProcess) -> int:
    """Calls ended so far."""
    return daemon.admin.GetPool(pb.GetPoolRequest()).calls_ended


def cgroup_line(out: str) -> str:
    """The cgroup v2 line of /proc/<pid>/cgroup."""
    return next(line for line in out.splitlines() if line.startswith("0::"))


def test_a_shell_command_gets_a_call_of_its_own(daemon: DaemonProcess, agent: AgentProcess) -> None:
    code, out = shell(agent, "sleep 0.3; cat /proc/self/cgroup; exit 7")
    assert code == 7
    assert "/alpha/call-" in cgroup_line(out)
    report = reports(daemon)[0]
    assert report.observed
    assert report.name == "sleep"
    assert list(report.argv[:2]) == ["bash", "-c"]
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 7)
    assert report.evidence == pb.EVIDENCE_KERNEL
    assert report.wall_usec >= 300_000


def test_a_call_is_named_by_what_its_long_script_is_run_for(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    # Longer than what the program in the kernel sends of the arguments.
    setting = " && ".join(f"export SETTING_{number}={'x' * 20}" for number in range(20))
    code, _ = shell(agent, f"{setting} && eval 'timeout 60 sleep 0.3' && pwd > /dev/null")
    assert code == 0
    report = reports(daemon)[0]
    assert report.name == "sleep"
    assert "timeout 60 sleep" in report.argv[2]


def test_a_program_that_no_rule_names_stays_with_the_agent(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    before = ended(daemon)
    code, out = agent.run(RUN, argv=["cat", "/proc/self/cgroup"])
    assert code == 0 and cgroup_line(out).endswith("/alpha/agent")
    code, out = agent.run(RUN, argv=["bash", "/dev/null"])
    assert (code, ended(daemon)) == (0, before)


def test_nested_shells_stay_in_their_call(daemon: DaemonProcess, agent: AgentProcess) -> None:
    before = ended(daemon)
    script = "sleep 0.2; bash -c 'sh -c \"cat /proc/self/cgroup\"; true'; cat /proc/self/cgroup"
    code, out = shell(agent, script)
    lines = [line for line in out.splitlines() if line.startswith("0::")]
    assert code == 0 and len(lines) == 2
    assert lines[0] == lines[1] and "/call-" in lines[0]
    reports(daemon)
    assert ended(daemon) == before + 1


def test_what_is_forked_before_the_move_follows(
    daemon: DaemonProcess, agent: AgentProcess, tmp_path: Path
) -> None:
    """A shell whose first act is to leave children behind: in a session of its own and forked
    twice, so that neither parent nor process group leads back to it."""
    out = tmp_path / "cgroups"
    inner = f"sleep 1; cat /proc/self/cgroup >> {out}; sleep 1"
    script = f"(setsid sh -c '{inner}' &) ; (sh -c '{inner}' &) ; exit 0"
    for _ in range(3):
        out.unlink(missing_ok=True)
        assert shell(agent, script)[0] == 0
        wait_until("one child speaks", out.exists)
        wait_until("both children speak", lambda: out.read_text().count("0::") == 2)
        lines = {line for line in out.read_text().splitlines() if line.startswith("0::")}
        assert len(lines) == 1, lines
        assert "/alpha/call-" in lines.pop()
    assert reports(daemon)[0].wall_usec >= 1_900_000


def test_a_declared_call_is_not_seen_twice(daemon: DaemonProcess, agent: AgentProcess) -> None:
    before = ended(daemon)
    code, _ = agent.run(RUN, argv=[EXEC, "--name", "mine", "--", "bash", "-c", "sleep 0.1"])
    assert code == 0
    newest = reports(daemon)[0]
    assert (newest.name, newest.observed) == ("mine", False)
    assert ended(daemon) == before + 1


def test_a_shell_that_the_command_runs_is_not_seen_twice(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    front = str(Path(EXEC).with_name("agentcg"))
    before = ended(daemon)
    code, _ = agent.run(RUN, argv=[front, "exec", "--name=mine", "--", "sh", "-c", "sleep 0.1"])
    assert code == 0
    shell(agent, "sleep 0.1")  # what is told late of the first comes before this
    assert [report.name for report in reports(daemon)[:2]] == ["sleep", "mine"]
    assert ended(daemon) == before + 2


def test_a_shell_that_declares_a_call_has_both(daemon: DaemonProcess, agent: AgentProcess) -> None:
    code, out = shell(agent, f"{EXEC} --name inner -- cat /proc/self/cgroup; cat /proc/self/cgroup")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("0::")]
    assert len(set(lines)) == 2 and all("/call-" in line for line in lines)
    names = {report.name: report.observed for report in reports(daemon)[:2]}
    assert names.pop("inner") is False and list(names.values()) == [True]


def test_a_shell_that_becomes_a_declared_call_ends_well(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    code, _ = shell(agent, f"exec {EXEC} --name inner -- sh -c 'sleep 0.2; exit 4'")
    assert code == 4
    found = {report.name: report for report in reports(daemon)[:2]}
    inner = found.pop("inner")
    assert (inner.verdict, inner.exit_code, inner.observed) == (pb.VERDICT_FAILED, 4, False)
    for report in found.values():  # the shell may have been too quick to be moved at all
        if report.observed and report.began_unix_usec >= inner.began_unix_usec - 1_000_000:
            assert report.verdict == pb.VERDICT_OK and inner.call_id in report.sentence


def test_a_shell_without_room_for_a_call_gets_one_when_there_is(daemon: DaemonProcess) -> None:
    agent = daemon.open("narrow", calls_max="1")
    start = "tool = subprocess.Popen(['sh', '-c', 'sleep 60 & wait'])"
    agent.run(f"first = {start.partition('= ')[2]}")
    wait_until("the first has a call", lambda: len(daemon.call_dirs()) == 1)
    agent.run(f"second = {start.partition('= ')[2]}")
    leaf = daemon.cgroup_dir / "narrow/agent/cgroup.procs"
    wait_until("the second and its child are there", lambda: len(leaf.read_text().split()) == 3)
    (first,) = daemon.call_dirs()

    def refusals() -> int:
        lines = daemon.audit_lines()
        return sum(json.loads(line)["event"] == "call_refused" for line in lines)

    wait_until("it is refused", lambda: refusals() == 1)
    (first / "cgroup.kill").write_text("1")
    wait_until("the second has a call", lambda: daemon.call_dirs() not in ([], [first]))
    wait_until("with its child", lambda: len(leaf.read_text().split()) == 1)
    assert refusals() == 1
    for directory in daemon.call_dirs():
        (directory / "cgroup.kill").write_text("1")
    assert agent.run("result = first.wait(), second.wait()") == (-9, -9)


def test_an_agent_that_was_there_before_the_daemon_is_no_call(daemon: DaemonProcess) -> None:
    """The agent of an adopted cgroup is itself a shell's child: a restart changes nothing."""
    root = Cgroup.open(cgroup2_mount())
    container = root.make_child(f"agentcg-test-box-{os.getpid()}")
    script = f"echo $$ > {container.path}/cgroup.procs; sh -c 'sleep 60 & wait'; true"
    process = subprocess.Popen(["sh", "-c", script])
    try:
        wait_until("all are there", lambda: len(container.procs()) == 3)
        path = "/" + container.path.name
        spec = pb.SessionSpec(id="box")
        daemon.admin.AdoptSession(pb.AdoptSessionRequest(cgroup_path=path, spec=spec))
        agent = container.child("agent")
        before = sorted(agent.procs())
        assert len(before) == 3
        time.sleep(1.2)  # the daemon says now and then that it is there
        daemon.kill()
        daemon.start()
        calls = daemon.admin.ListCalls(pb.ListCallsRequest(session_id="box")).calls
        assert (sorted(agent.procs()), list(calls)) == (before, [])
        daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="box"))
    finally:
        container.kill_and_remove()
        process.wait()
        root.close()


def processes_in_calls(daemon: DaemonProcess) -> list[int]:
    """Number of processes in each call leaf."""
    return [len((d / "cgroup.procs").read_text().split()) for d in daemon.call_dirs()]


def test_a_killed_call_says_so(daemon: DaemonProcess, agent: AgentProcess) -> None:
    agent.run("tool = subprocess.Popen(['sh', '-c', 'sleep 60; true'])")
    wait_until("it is in its leaf with its child", lambda: sum(processes_in_calls(daemon)) == 2)
    agent.run("tool.kill(); result = tool.wait()")
    for directory in daemon.call_dirs():
        (directory / "cgroup.kill").write_text("1")
    report = reports(daemon)[0]
    assert (report.verdict, report.term_signal) == (pb.VERDICT_SIGNALED, signal.SIGKILL)


STORM = """
from concurrent.futures import ThreadPoolExecutor
def one(_):
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 3"], {})
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
with ThreadPoolExecutor(16) as pool:
    codes = set(pool.map(one, range(count)))
result = codes
assert codes == {3}, codes
"""


def test_a_storm_loses_no_call(daemon: DaemonProcess, agent: AgentProcess) -> None:
    """Shells that end at once, faster than each could be moved: each has its report."""
    count = 6_000 if SLOW == 1 else 100
    before = ended(daemon)
    started = time.monotonic()
    waits: list[float] = []
    late: list[float] = []
    over = threading.Event()

    def someone_else() -> None:
        pause_s = 0.02 * SLOW
        slept = time.monotonic()
        while not over.wait(pause_s):
            asked = time.monotonic()
            late.append(asked - slept - pause_s)
            daemon.admin.GetPool(pb.GetPoolRequest())
            slept = time.monotonic()
            waits.append(slept - asked)

    other = threading.Thread(target=someone_else)
    other.start()
    agent.run(STORM, count=count)
    took = time.monotonic() - started
    over.set()
    other.join()
    # A busy machine holds up this process as well: by as much as its sleeps end late.
    assert max(waits) < 1.0 * SLOW + 5 * max(late), "others wait for the storm"
    wait_until("all have been seen", lambda: ended(daemon) >= before + count, 60)
    assert ended(daemon) == before + count
    newest = reports(daemon)[: min(count, 200)]
    events = [json.loads(line) for line in daemon.audit_lines()]
    lost = [e["counts"] for e in events if e["event"] == "events_lost"]
    print(f"{count} calls in {took:.1f} s; lost events, repaired: {lost}")
    # Without its exit event a call that never had a cgroup leaves no status.
    unknown = [r for r in newest if (r.verdict, r.exit_code) != (pb.VERDICT_FAILED, 3)]
    assert {r.verdict for r in unknown} <= {pb.VERDICT_UNKNOWN}
    assert len(unknown) <= sum(counts.get("exit", 0) for counts in lost)
    told = [e["report"] for e in events if e["event"] == "call_ended"]
    # A session that writes so much is cut short in the log, and that is told.
    left_out = sum(e["count"] for e in events if e["event"] == audit.LEFT_OUT)
    assert sum(report.get("observed", False) for report in told) + left_out >= count
    assert not daemon.call_dirs()


def test_events_without_room_are_counted_and_made_up_for(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The daemon is stopped, and its ring buffer has 8 KiB: what runs afterwards is in a call."""
    directory = tmp_path_factory.mktemp("o")
    daemon = DaemonProcess(directory, '[bpf]\nevents_size = "8K"\n')
    try:
        daemon.start()
        agent = daemon.open("alpha")
        agent.run("result = 'it has entered'")
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGSTOP)
        agent.run("""
for _ in range(30):
    subprocess.run(["sh", "-c", "exit 3"])
script = "sleep 60 & wait"
tools = [subprocess.Popen(["sh", "-c", script]) for _ in range(3)]
""")
        daemon.process.send_signal(signal.SIGCONT)
        wait_until("what runs is in calls", lambda: len(daemon.call_dirs()) == 3)
        wait_until("with the children", lambda: all(n == 2 for n in processes_in_calls(daemon)))
        leaf = (daemon.cgroup_dir / "alpha/agent/cgroup.procs").read_text().split()
        assert leaf == [str(agent.process.pid)]
        events = [json.loads(line) for line in daemon.audit_lines()]
        lost = [event["counts"] for event in events if event["event"] == "events_lost"]
        assert lost and sum(lost[0].values()) > 20
        assert "lost in the kernel: " in daemon.log.read_text()
        for directory in daemon.call_dirs():
            (directory / "cgroup.kill").write_text("1")
        assert agent.run("result = [tool.wait() for tool in tools]") == [-9, -9, -9]
    finally:
        daemon.close()


def test_a_restarted_daemon_takes_up_what_began_without_it(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    agent.run("result = 'it has entered'")
    daemon.kill()
    agent.run("tool = subprocess.Popen(['sh', '-c', 'sleep 60; true'])")
    time.sleep(0.2)
    daemon.start()
    wait_until("it is in its leaf with its child", lambda: sum(processes_in_calls(daemon)) == 2)
    call = daemon.admin.ListCalls(pb.ListCallsRequest()).calls[0]
    assert call.observed and call.name == "sleep"
    agent.run("tool.kill(); tool.wait()")
    for directory in daemon.call_dirs():
        (directory / "cgroup.kill").write_text("1")
    reports(daemon)
