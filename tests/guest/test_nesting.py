"""Calls inside calls where the kernel has controllers: the outer call's limits hold for both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup
from tests.conftest import StartDaemon
from tests.guest.test_guard import KILL_EARLY
from tests.harness import EXEC, IN_GUEST, SLOW, AgentProcess, DaemonProcess, wait_until

pytestmark = pytest.mark.controllers

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB = 1 << 20
RUN = """
done = subprocess.run([EXEC, *options, "--", "sh", "-c", script], capture_output=True, text=True)
result = done.returncode, done.stdout, done.stderr
"""
HERE = "/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)"


@pytest.fixture(scope="module")
def daemon(start_module_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with a pool of 600 MiB."""
    return start_module_daemon('[pool]\nmemory_max = "600M"\n')


@pytest.fixture(scope="module")
def agent(daemon: DaemonProcess) -> AgentProcess:
    """An agent in its session."""
    return daemon.open("alpha")


def run(agent: AgentProcess, script: str, *options: str) -> tuple[int, str, str]:
    """Run a script as a call named `outer`; returns its exit status and output."""
    words = ["--name", "outer", *options]
    found: tuple[int, str, str] = agent.run(RUN, options=words, script=script)
    return found


def inside(script: str, *options: str) -> str:
    """The words of a shell that run a script as a call named `inner`."""
    return f"{EXEC} --name inner {' '.join(options)} -- sh -c '{script}'"


def hold(size: int, ms: int) -> str:
    """The words of a shell that becomes a program which holds this much memory for so long."""
    schedule = f'"1 {size} 0\\n{ms} {size} 0\\n"'
    return f"printf {schedule} >/tmp/hold$$; exec {LOAD} </tmp/hold$$"


def reports(daemon: DaemonProcess, *names: str) -> list[pb.Report]:
    """The newest report of each name, when all calls have ended."""
    wait_until("all have ended", lambda: not daemon.call_dirs())
    listed = daemon.admin.ListReports(pb.ListReportsRequest(limit=50)).reports
    return [next(report for report in listed if report.name == name) for name in names]


def test_limits_inside_are_set_and_the_outer_ones_stay(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    knobs = "memory.max pids.max cpu.max cpu.weight"
    show = f"cd {HERE}; cat {knobs}"
    around = f"cd {HERE}; cd ..; cat {knobs} cgroup.procs; cat main/cgroup.procs | wc -l"
    limits = ("--memory-max", "64M", "--pids-max", "50", "--cpu-max", "0.5")
    script = f"{inside(show, '--memory-max', '32M', '--pids-max', '9')}; {inside(around)}; true"
    status, out, err = run(agent, script, *limits)
    assert status == 0, err
    lines = out.split("\n")
    assert lines[:4] == [str(32 * MIB), "9", "50000 100000", "100"]
    # No process is in the outer call's own cgroup, and its shell and the cgroup beside are in it.
    assert lines[4:8] == [str(64 * MIB), "50", "50000 100000", "100"]
    assert int(lines[8]) >= 1
    outer, inner = reports(daemon, "outer", "inner")
    assert inner.parent_call_id == outer.call_id and len(outer.inner_call_ids) == 2


def test_what_the_outer_call_holds_is_not_left(daemon: DaemonProcess, agent: AgentProcess) -> None:
    script = (
        f"({hold(40 * MIB, int(100_000 * SLOW))}) & "
        f"while [ $(cat {HERE}/memory.current) -lt {39 * MIB} ]; do sleep 0.1; done; "
        f"{inside('true', '--memory-max', '60M')}; kill $!"
    )
    options = ("--memory-max", "64M", "--timeout", "60")
    assert run(agent, f"{script}; pkill -P $$; true", *options) == (0, "", "")
    outer, inner = reports(daemon, "outer", "inner")
    assert 15 * MIB < inner.grant.memory_max_bytes < 26 * MIB
    (advice,) = [a for a in inner.grant.advice if a.startswith("memory_max")]
    assert f"call {outer.call_id} that this one is in has" in advice and "left of 64 MiB" in advice


def test_both_together_stay_below_the_outer_limit(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    """Both are granted 64 MiB each, and have 64 between them."""
    script = f"{inside(hold(40 * MIB, 100_000))} & sleep {1 * SLOW}; {hold(40 * MIB, 100_000)}"
    status, _, _ = run(agent, script, "--memory-max", "64M", "--timeout", "60")
    assert status == -9
    outer, inner = reports(daemon, "outer", "inner")
    assert outer.verdict == inner.verdict == pb.VERDICT_OOM_CALL
    assert "the call reached its own limit of 64 MiB" in outer.sentence
    assert f"call {outer.call_id}, which this one is in, reached its limit" in inner.sentence
    assert inner.memory_peak_bytes < outer.memory_peak_bytes <= 64 * MIB


def test_at_its_own_limit_a_call_inside_dies_alone(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = f"{inside(hold(60 * MIB, 100), '--memory-max', '24M')}; echo after $?"
    status, out, err = run(agent, script, "--memory-max", "100M")
    assert (status, out) == (0, "after 137\n"), err
    outer, inner = reports(daemon, "outer", "inner")
    assert inner.verdict == pb.VERDICT_OOM_CALL and "24 MiB" in inner.sentence
    assert outer.verdict == pb.VERDICT_OK
    assert f"call {inner.call_id}, which was begun in this one, reached" in outer.sentence


def test_processes_of_both_count_together(daemon: DaemonProcess, agent: AgentProcess) -> None:
    bomb = "for i in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; exit 0"
    script = f"{inside(bomb)}; true"
    run(agent, f"{script}; pkill sleep -P 1; exit 0", "--pids-max", "8", "--timeout", str(3 * SLOW))
    outer, inner = reports(daemon, "outer", "inner")
    assert outer.pids_peak <= 8 and inner.grant.pids_max <= 8
    assert inner.pids_max_events or outer.pids_max_events


def test_a_call_that_forks_all_the_time_is_split(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    """Controllers can be given on only while no process is left in the outer call's cgroup."""
    storm = "for n in 1 2 3; do (while :; do /bin/true; done) & done"
    script = f"{storm}; {inside('cat ' + HERE + '/memory.max', '--memory-max', '32M')}; kill 0"
    code = RUN.replace("text=True)", "text=True, start_new_session=True)")
    words = ["--name", "outer", "--memory-max", "100M", "--timeout", str(30 * SLOW)]
    _, out, err = agent.run(code, options=words, script=script)
    assert out == f"{32 * MIB}\n", err
    assert len(reports(daemon, "outer", "inner")[0].inner_call_ids) == 1


def test_a_split_that_a_killed_daemon_left_half_done_is_finished(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon('[pool]\nmemory_max = "600M"\n')
    agent = daemon.open("alpha")
    code = "result = stub.BeginCall(pb.BeginCallRequest(name='outer')).id"
    call_id = agent.run(code)
    tool, other = daemon.enter("alpha"), daemon.enter("alpha")
    for process in (tool, other):
        process.run("packet('attach', 'call=' + call_id)", call_id=call_id)
    daemon.kill()
    outer = Cgroup.open(daemon.cgroup_dir / f"alpha/call-{call_id}")
    record = json.loads(outer.get_xattr() or b"")
    outer.set_xattr(json.dumps({**record, "split": True}).encode())
    outer.make_child("main").attach(tool.process.pid)
    daemon.start()
    assert tool.run("result = subprocess.call([EXEC, '--name', 'inner', '--', 'true'])") == 0
    assert outer.procs() == () and {tool.process.pid, other.process.pid} <= set(
        outer.child("main").procs()
    )
    outer.close()


def test_cpus_inside_are_some_of_those_around(daemon: DaemonProcess, agent: AgentProcess) -> None:
    if "cpuset" not in (daemon.cgroup_dir / "cgroup.controllers").read_text().split():
        status, _, err = run(agent, inside("true", "--cpuset", "0"), "--cpuset", "0")
        assert status == 0, err
        assert "cpuset.cpus" in reports(daemon, "inner")[0].grant.not_enforced
        return
    there = (daemon.cgroup_dir / "alpha/cpuset.cpus.effective").read_text().strip()
    first, *_, last = there.replace("-", ",").split(",")
    show = f"cat {HERE}/cpuset.cpus"
    script = f"{inside(show, '--cpuset', there)}; {inside(show, '--cpuset', last)}"
    _, out, err = run(agent, script, "--cpuset", first)
    if first != last:
        assert out == f"{first}\n" and f"some of the CPUs of the call around it: {first}" in err
    reports(daemon, "outer")


def test_what_a_call_inside_expects_is_a_part_of_the_outer_ones(daemon: DaemonProcess) -> None:
    """A call inside does not wait for what is kept for the outer one, nor counts besides it."""
    first, second = daemon.open("first"), daemon.open("second")
    code = """
tool = subprocess.Popen([EXEC, "--name", "outer", "--memory", "300M", "--", "sh", "-c", script],
                        stdin=subprocess.PIPE, text=True)
"""
    first.run(code, script=f"{EXEC} --name inner --memory 300M --wait 0 -- sh -c 'read x'; true")

    def names() -> set[str]:
        return {call.name for call in daemon.admin.ListCalls(pb.ListCallsRequest()).calls}

    wait_until("both are open", lambda: {"outer", "inner"} <= names())
    took = "t = time.monotonic(); r = agent.run(['true'], memory='150M', wait='20s'); result = r"
    assert second.run(f"{took}.report.waited_usec") < 2e6 * SLOW
    listed = daemon.admin.ListCalls(pb.ListCallsRequest()).calls
    by_name = {call.name: call for call in listed}
    explain = pb.ExplainCallRequest
    assert daemon.admin.ExplainCall(explain(call_id=by_name["outer"].id)).sentence
    with pytest.raises(Exception, match="the policy acts on the outermost call"):
        daemon.admin.ExplainCall(explain(call_id=by_name["inner"].id))
    first.run("tool.communicate('\\n')")
    reports(daemon, "outer", "inner")


FREEZE = """
[[rulesets]]
name = "freeze"
when = [{ detector = "pool_free", below = "70%", until = "75%" }]
do = { action = "freeze" }
"""


def test_a_pause_holds_for_calls_inside(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Time that calls inside spend in it is that of the outer call."""
    policy = tmp_path / "freeze.toml"
    policy.write_text(FREEZE)
    daemon = start_daemon(f'[pool]\nmemory_max = "600M"\n[policy]\npath = "{policy}"\n')
    vip, batch = daemon.open("vip", priority="important"), daemon.open("batch", priority="batch")
    grow = f"10000 {150 * MIB} 10\n"
    code = """
tool = subprocess.Popen([EXEC, "--name", name, "--", *words], stdin=subprocess.PIPE, text=True)
tool.stdin.write(schedule)
tool.stdin.close()
"""
    inner_words = ["sh", "-c", f"{EXEC} --name inner -- {LOAD}; true"]
    vip.run(code, name="leader", words=[LOAD], schedule=f"12000 {250 * MIB} 10\n")
    batch.run(code, name="outer", words=inner_words, schedule=grow)

    def states() -> dict[str, int]:
        listed = daemon.admin.ListCalls(pb.ListCallsRequest()).calls
        return {call.name: call.state for call in listed}

    frozen = pb.CALL_STATE_FROZEN
    wait_until("both are paused", lambda: states().get("inner") == frozen, 30)
    assert states()["outer"] == frozen
    vip.run("tool.wait()")
    assert batch.run("result = tool.wait()") == 0
    outer, inner = reports(daemon, "outer", "inner")
    assert outer.frozen_usec > 0 and inner.frozen_usec == pytest.approx(outer.frozen_usec, abs=5e5)
    assert outer.verdict == inner.verdict == pb.VERDICT_OK


def test_the_policys_kill_ends_those_inside(start_daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "kill.toml").write_text(KILL_EARLY if IN_GUEST else "")
    daemon = start_daemon(f'[pool]\nmemory_max = "640M"\n[policy]\ndrop_in = "{tmp_path}"\n')
    vip, batch = daemon.open("vip", priority="important"), daemon.open("b", priority="batch")
    code = """
tool = subprocess.Popen([EXEC, "--name", name, "--", *words], stdin=subprocess.PIPE, text=True)
tool.stdin.write(schedule)
tool.stdin.close()
"""
    inner = ["sh", "-c", f"{EXEC} --name inner -- {LOAD}; true"]
    hold_ms = int(200_000 * SLOW)
    schedule = f"500 {350 * MIB} 0\n{hold_ms} {350 * MIB} 0\n"
    batch.run(code, name="outer", words=inner, schedule=schedule)
    memory = daemon.cgroup_dir / "b/memory.current"
    wait_until("the inner call holds its memory", lambda: int(memory.read_text()) > 350 * MIB)
    vip.run(code, name="leader", words=[LOAD], schedule=f"3000 {350 * MIB} 0\n")
    assert vip.run("result = tool.wait()") == 0
    assert batch.run("result = tool.wait()") == -9
    outer, ended = reports(daemon, "outer", "inner")
    assert outer.verdict == pb.VERDICT_STOPPED
    assert ended.verdict == pb.VERDICT_CANCELLED and outer.call_id in ended.sentence
