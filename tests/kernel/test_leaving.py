"""Processes that are moved out of their calls, as systemd does it for a scope: each is told, with
who moved it and where to, on this kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.features import LEAVING, load
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.harness import EXEC, AgentProcess, DaemonProcess, wait_until

pytestmark = pytest.mark.programs
MOUNT = cgroup2_mount()
RUN = """
done = subprocess.run([EXEC, "--name", name, "--", "bash", "-c", script])
result = done.returncode
"""
START = """
tool = subprocess.Popen([EXEC, "--name", name, "--", "bash", "-c", script])
"""


@pytest.fixture(scope="module", autouse=True)
def _works() -> None:
    """Skip the module where the kernel does not tell."""
    bpf, states = load("lifecycle")
    if bpf is not None:
        bpf.close()
    state = next(state for state in states if state.name == LEAVING)
    if not state.works:
        pytest.skip(state.reason)


@pytest.fixture
def other() -> Iterator[Path]:
    """A cgroup that is none of the daemon's, which is empty in the end."""
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-else-{os.getpid()}")
    yield made.path
    (made.path / "cgroup.kill").write_text("1")
    wait_until("it is empty", lambda: not made.procs())
    made.path.rmdir()


def report_of(daemon: DaemonProcess, name: str) -> pb.Report:
    """The report of the call of that name, when it has ended."""

    def found() -> list[pb.Report]:
        request = pb.ListReportsRequest(session_id="alpha", limit=100)
        return [r for r in daemon.admin.ListReports(request).reports if r.name == name]

    wait_until("it is reported", lambda: bool(found()))
    return found()[0]


def told(daemon: DaemonProcess, *names: str) -> list[dict[str, object]]:
    """What the audit log has of processes that left calls of these names."""
    entries = [json.loads(line) for line in daemon.audit_lines()]
    begun = [entry for entry in entries if entry["event"] == "call_begun"]
    calls = {entry["call"] for entry in begun if entry["name"] in names}
    assert len(calls) == len(names)
    return [e for e in entries if e["event"] == "process_left" and e["call"] in calls]


def test_a_child_that_goes_by_itself_is_told_after_its_call_has_ended_well(
    daemon: DaemonProcess, agent: AgentProcess, other: Path
) -> None:
    script = f"(echo $BASHPID > {other}/cgroup.procs; exec sleep 100) & sleep 0.3; exit 5"
    assert agent.run(RUN, name="child", script=script) == 5
    report = report_of(daemon, "child")
    (pid,) = (other / "cgroup.procs").read_text().split()
    moved = f"bash ({pid}) moved itself to /{other.name}"
    assert moved in report.sentence and "1 process left the call's cgroup" in report.sentence
    assert [fact.what for fact in report.facts if fact.source == "cgroup_attach_task"] == [moved]
    codes = [feedback.code for feedback in report.feedback]
    assert codes.count(pb.FEEDBACK_CODE_LEFT_CALL) == 1
    (entry,) = told(daemon, "child")
    assert (entry["pid"], entry["to"], entry["main"]) == (int(pid), f"/{other.name}", False)


def test_an_orphan_that_somebody_else_moves_is_told_with_who_it_was(
    daemon: DaemonProcess, agent: AgentProcess, other: Path, tmp_path: Path
) -> None:
    """Forked twice, in a session of its own, so that nothing leads back to its call."""
    pid_file = tmp_path / "pid"
    orphan = f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 100"
    script = f"(setsid bash -c '{orphan}' &); sleep 100; true"
    agent.run(START, name="orphan", script=script)
    wait_until("it runs", pid_file.exists)
    pid = pid_file.read_text().strip()
    mover = subprocess.Popen(
        ["bash", "-c", f"echo {pid} > {other}/cgroup.procs; exec sleep 100"],
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_until("the log has it", lambda: bool(told(daemon, "orphan")))
        (entry,) = told(daemon, "orphan")
        assert (entry["pid"], entry["mover_pid"]) == (int(pid), mover.pid)
    finally:
        mover.kill()
        mover.wait()
    agent.run("tool.terminate(); tool.wait()")
    sentence = report_of(daemon, "orphan").sentence
    assert f"sleep ({pid}) was moved by bash ({mover.pid}) to /{other.name}" in sentence


def test_of_many_four_are_named_and_the_rest_is_counted(
    daemon: DaemonProcess, agent: AgentProcess, other: Path
) -> None:
    one = f"(echo $BASHPID > {other}/cgroup.procs; exec sleep 100) &"
    script = f"for n in $(seq 30); do {one} done; sleep 1; exit 0"
    agent.run(RUN, name="many", script=script)
    sentence = report_of(daemon, "many").sentence
    assert "30 processes left the call's cgroup" in sentence and "; and 26 more." in sentence
    assert sentence.count("moved itself") == 4
    assert len(told(daemon, "many")) == 4
    assert sum('"more_left"' in line for line in daemon.audit_lines()) == 1


def test_what_stays_or_goes_to_another_call_has_not_left(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = f"(setsid sh -c '(sleep 0.3 &)' &); {EXEC} --name inner -- sleep 0.1; sleep 0.5; true"
    agent.run(RUN, name="stays", script=script)
    assert "left" not in report_of(daemon, "stays").sentence
    assert "left" not in report_of(daemon, "inner").sentence
    assert told(daemon, "stays", "inner") == []


def test_who_moved_the_main_process_is_a_fact(
    daemon: DaemonProcess, agent: AgentProcess, other: Path
) -> None:
    script = f"echo $$ > {other}/cgroup.procs; exit 3"
    assert agent.run(RUN, name="main", script=script) == 3
    report = report_of(daemon, "main")
    facts = [fact.what for fact in report.facts if fact.source == "cgroup_attach_task"]
    assert len(facts) == 1 and facts[0].endswith(f"moved itself to /{other.name}")
    assert "processes left" not in report.sentence
    (entry,) = told(daemon, "main")
    assert entry["main"] is True


@pytest.mark.parametrize("depth", [7, 8, 9, 15])
def test_a_cgroup_far_below_its_call_is_inside_it(
    daemon: DaemonProcess, agent: AgentProcess, other: Path, depth: int
) -> None:
    """The way down is not told, nor what is forked there; leaving is."""
    name = f"deep-{depth}"
    script = f"""
        here=$(awk -F: '$1 == 0 {{print $3}}' /proc/self/cgroup); below={MOUNT}$here
        for n in $(seq {depth}); do below=$below/d; mkdir $below || exit 9; done
        echo $BASHPID > $below/cgroup.procs || exit 8
        bash -c 'sleep 0.1; (echo $BASHPID > {other}/cgroup.procs; sleep 0.3) & wait'
        exit 0
    """
    assert agent.run(RUN, name=name, script=script) == 0
    sentence = report_of(daemon, name).sentence
    (entry,) = told(daemon, name)
    assert (entry["name"], entry["to"], entry["main"]) == ("bash", f"/{other.name}", False)
    assert "1 process left the call's cgroup" in sentence


INTO = """
import ctypes, os, struct, sys, threading
directory = os.open(sys.argv[1], os.O_PATH)
libc = ctypes.CDLL(None, use_errno=True)
arguments = struct.pack("11Q", 0x200000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, directory)
def make():
    pid = libc.syscall(435, arguments, len(arguments))
    if pid == 0:
        os.execvp("sleep", ["sleep", "100"])
    if pid < 0:
        os._exit(7)
if sys.argv[2] == "thread":
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
else:
    make()
"""


@pytest.mark.parametrize("by", ["process", "thread"])
def test_a_child_that_is_made_in_another_cgroup_has_left(
    daemon: DaemonProcess, agent: AgentProcess, other: Path, tmp_path: Path, by: str
) -> None:
    program, name = tmp_path / "into.py", f"into-by-{by}"
    program.write_text(INTO)
    script = f"{sys.executable} {program} {other} {by}"
    assert agent.run(RUN, name=name, script=f"{script}; exit $?") == 0
    (entry,) = told(daemon, name)
    (pid,) = (other / "cgroup.procs").read_text().split()
    assert (entry["pid"], entry["to"]) == (int(pid), f"/{other.name}")
    assert "1 process left the call's cgroup" in report_of(daemon, name).sentence


def test_what_moves_from_an_inner_call_to_the_outer_one_has_left_the_inner(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    outer = "$(awk -F: '$1 == 0 {print $3}' /proc/self/cgroup)"
    inner = "(echo $BASHPID > $OUTER/cgroup.procs; exec sleep 0.3) & wait"
    script = f"export OUTER={MOUNT}{outer}; {EXEC} --name within -- bash -c '{inner}'; true"
    agent.run(RUN, name="around", script=script)
    (entry,) = told(daemon, "within")
    assert entry["name"] == "bash"
    assert told(daemon, "around") == []
    assert "left" not in report_of(daemon, "around").sentence


DEAD_LEADER = """
import ctypes, os, sys, threading, time
def others():
    time.sleep(0.3)
    pid = os.getpid()
    with open(sys.argv[1] + "/cgroup.procs", "w") as file:
        file.write(str(pid))
    time.sleep(0.3)
    os._exit(0)
threading.Thread(target=others).start()
ctypes.CDLL(None).syscall(NR_EXIT, 0)
"""


def test_threads_whose_first_one_has_ended_have_left(
    daemon: DaemonProcess, agent: AgentProcess, other: Path, tmp_path: Path
) -> None:
    program = tmp_path / "dead_leader.py"
    number = {"x86_64": "60", "aarch64": "93"}[os.uname().machine]
    program.write_text(DEAD_LEADER.replace("NR_EXIT", number))
    script = f"{sys.executable} {program} {other} & sleep 1; exit 0"
    assert agent.run(RUN, name="threads", script=script) == 0
    (entry,) = told(daemon, "threads")
    assert entry["to"] == f"/{other.name}"


def test_a_long_path_is_told_by_its_end(
    daemon: DaemonProcess, agent: AgentProcess, other: Path
) -> None:
    below = other / ("a" * 200) / ("b" * 200) / "end"
    below.mkdir(parents=True)
    script = f"(echo $BASHPID > {below}/cgroup.procs; exec sleep 0.3) & wait"
    agent.run(RUN, name="long", script=script)
    wait_until("it is empty", lambda: not (below / "cgroup.procs").read_text())
    for directory in (below, below.parent, below.parent.parent):
        directory.rmdir()
    (entry,) = told(daemon, "long")
    assert str(entry["to"]).endswith("b/end")


def test_a_new_daemon_tells_of_what_ran_before(
    daemon: DaemonProcess, agent: AgentProcess, other: Path, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    orphan = f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 100"
    script = f"(setsid bash -c '{orphan}' &); sleep 100; true"
    agent.run(START, name="before", script=script)
    wait_until("it runs", pid_file.exists)
    pid = pid_file.read_text().strip()
    daemon.kill()
    daemon.start()
    (other / "cgroup.procs").write_text(pid)
    wait_until("the log has it", lambda: bool(told(daemon, "before")))
    (entry,) = told(daemon, "before")
    assert (entry["pid"], entry["mover_pid"]) == (int(pid), os.getpid())
    agent.run("tool.terminate(); tool.wait()")
    assert f"sleep ({pid}) was moved by" in report_of(daemon, "before").sentence


def test_of_a_flood_the_number_is_told_as_the_least_that_it_is(
    daemon: DaemonProcess, agent: AgentProcess, other: Path, tmp_path: Path
) -> None:
    program = tmp_path / "flood.py"
    head = INTO.partition("def make")[0]
    one = "pid = libc.syscall(435, arguments, len(arguments))"
    again = f"for n in range(400):\n    {one}\n    if pid <= 0:\n        os._exit(0)\n"
    program.write_text(head + again)
    assert agent.run(RUN, name="flood", script=f"{sys.executable} {program} {other}; true") == 0
    report = report_of(daemon, "flood")
    told_of = [f for f in report.feedback if f.code == pb.FEEDBACK_CODE_LEFT_CALL]
    assert f"At least {told_of[-1].numbers['processes']:.0f} processes left" in report.sentence
    assert 64 <= told_of[-1].numbers["processes"] < 400
    assert len(told(daemon, "flood")) == 4


def test_a_new_daemon_reports_what_had_left_before(
    daemon: DaemonProcess, agent: AgentProcess, other: Path
) -> None:
    script = f"(echo $BASHPID > {other}/cgroup.procs; exec sleep 100) & sleep 100; true"
    agent.run(START, name="kept", script=script)
    wait_until("it is there", lambda: bool((other / "cgroup.procs").read_text()))
    wait_until("the log has it", lambda: bool(told(daemon, "kept")))
    (entry,) = told(daemon, "kept")
    daemon.kill()
    daemon.start()
    agent.run("tool.terminate(); tool.wait()")
    report = report_of(daemon, "kept")
    assert f"bash ({entry['pid']}) moved itself to /{other.name}" in report.sentence
