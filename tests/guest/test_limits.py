"""What needs cgroup v2 controllers: limits that hold, and verdicts that tell them apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from tests.conftest import StartDaemon
from tests.guest.container import adopt, container
from tests.harness import (
    EXEC,
    IN_GUEST,
    SLOW,
    AgentProcess,
    DaemonProcess,
    RemoteRpcError,
    wait_until,
)

pytestmark = pytest.mark.controllers

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB = 1 << 20
START = """
tool = subprocess.Popen([EXEC, *options, "--", LOAD], stdin=subprocess.PIPE, text=True)
tool.stdin.write(schedule)
tool.stdin.close()
"""
RUN = START + "result = tool.wait()"
SH = """
done = subprocess.run([EXEC, *options, "--", "sh", "-c", script], capture_output=True, text=True)
result = (done.returncode, done.stdout, done.stderr)
"""


@pytest.fixture(scope="module")
def daemon(start_module_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with a pool of 512 MiB whose guard is off: what is shown here is the kernel's."""
    daemon = start_module_daemon('[pool]\nmemory_max = "512M"\n[guard]\nenabled = false\n')
    daemon.forks_agents = False
    return daemon


@pytest.fixture(scope="module")
def agent(daemon: DaemonProcess) -> AgentProcess:
    """An agent whose session may use 300 MiB."""
    return daemon.open("alpha", memory_max="300M", pids_max="200")


def load(agent: AgentProcess, schedule: str, *options: str) -> int:
    """Run agentcg-load in a call; its exit status."""
    status: int = agent.run(RUN, schedule=schedule, options=list(options), LOAD=LOAD)
    return status


def last(daemon: DaemonProcess, session: str = "alpha") -> pb.Report:
    """The newest report, once all calls have ended."""
    wait_until(
        "all calls have ended", lambda: not list(daemon.cgroup_dir.glob(f"{session}/call-*"))
    )
    request = pb.ListReportsRequest(session_id=session, limit=1)
    return daemon.admin.ListReports(request).reports[0]


def test_knobs_are_what_the_grant_says(daemon: DaemonProcess, agent: AgentProcess) -> None:
    grant = agent.run(
        """
call = stub.BeginCall(pb.BeginCallRequest(name="x", intent=pb.Intent(
    memory_max="100M", cpu_max="500m", cpu_weight="250", pids_max="50", on_pressure="throttle")))
result = (call.id, call.grant.SerializeToString())
"""
    )
    directory = daemon.cgroup_dir / "alpha" / f"call-{grant[0]}"

    def read(file: str) -> str:
        return (directory / file).read_text().strip()

    assert read("memory.max") == str(100 * MIB)
    assert read("memory.high") == str(100 * MIB - 100 * MIB // 16)
    assert read("memory.oom.group") == "1"
    assert read("cpu.max") == "50000 100000"
    assert read("cpu.weight") == "250"
    assert read("pids.max") == "50"
    assert not pb.Grant.FromString(grant[1]).not_enforced
    agent.run("stub.EndCall(pb.EndCallRequest(call_id=call_id))", call_id=grant[0])


def test_cpus_by_list(daemon: DaemonProcess, agent: AgentProcess) -> None:
    """The tool runs on no others, and a call that asks for none has all of its session. Where the
    kernel has no cpuset controller, the grant says that nothing holds it."""
    controllers = (daemon.cgroup_dir / "cgroup.controllers").read_text().split()
    if "cpuset" not in controllers:
        assert agent.run(SH, options=["--cpuset", "0"], script="true")[0] == 0
        grant = last(daemon).grant
        assert dict(grant.settings) == {"cpuset": "0"} and "cpuset.cpus" in grant.not_enforced
        return
    there = (daemon.cgroup_dir / "alpha/cpuset.cpus.effective").read_text().strip()
    first = there.replace("-", ",").split(",")[0]
    script = "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/cpuset.cpus; nproc"
    status, out, err = agent.run(SH, options=["--cpuset", f"{first},8000"], script=script)
    assert (status, out.split("\n")[:2]) == (0, [first, "1"]), (out, err)
    grant = last(daemon).grant
    assert dict(grant.settings) == {"cpuset": first} and not grant.not_enforced
    assert "asked for" in grant.advice[0]
    status, out, err = agent.run(SH, options=[], script=script)
    assert (status, out.split("\n")[0]) == (0, ""), (out, err)
    status, _, err = agent.run(SH, options=["--cpuset", "8000"], script="true")
    assert status == 125 and f"some of the CPUs of this session: {there}" in err
    wait_until("nothing is left", lambda: not list(daemon.cgroup_dir.glob("alpha/call-*")))


def test_a_call_over_its_limit_dies_alone_and_is_told_why(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    agent.run("sibling = subprocess.Popen([EXEC, '--name', 'sibling', '--', 'sleep', '1000'])")
    # A child of the tool must go with it: memory.oom.group.
    script = f"sleep 1000 & echo '1 {200 * MIB} 0' | {LOAD}"
    status, _, _ = agent.run(SH, options=["--name", "hog", "--memory-max", "60M"], script=script)
    assert status == -9
    wait_until("the hog is gone", lambda: len(daemon.call_dirs()) == 1)
    report = daemon.admin.ListReports(pb.ListReportsRequest(session_id="alpha", limit=1)).reports[0]
    assert report.verdict == pb.VERDICT_OOM_CALL
    assert report.evidence == pb.EVIDENCE_KERNEL and report.term_signal == 9
    assert report.oom_kills >= 1
    assert report.memory_peak_bytes == 60 * MIB
    feedback = report.feedback[0]
    assert feedback.code == pb.FEEDBACK_CODE_OOM
    assert "60 MiB" in feedback.sentence
    assert feedback.numbers["memory_max_bytes"] == 60 * MIB
    assert agent.run("result = sibling.poll()") is None
    assert agent.process.poll() is None
    agent.run("sibling.kill(); sibling.wait()")


def test_sigkill_is_not_out_of_memory(daemon: DaemonProcess, agent: AgentProcess) -> None:
    status, _, _ = agent.run(SH, options=["--memory-max", "60M"], script="kill -9 $$")
    assert status == -9
    report = last(daemon)
    assert report.verdict == pb.VERDICT_SIGNALED and report.term_signal == 9
    assert report.oom_kills == 0
    assert report.feedback[0].code == pb.FEEDBACK_CODE_KILLED
    assert "counts no OOM kill" in report.sentence


def test_exit_137_is_not_out_of_memory(daemon: DaemonProcess, agent: AgentProcess) -> None:
    agent.run(SH, options=["--memory-max", "60M"], script="exit 137")
    report = last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 137)


def test_a_handled_child_oom_in_a_group_is_still_oom(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    """The kernel counts the kill; what the shell would have made of it does not matter."""
    script = f"echo '1 {200 * MIB} 0' | {LOAD}; exit 0"
    agent.run(SH, options=["--memory-max", "60M"], script=script)
    assert last(daemon).verdict == pb.VERDICT_OOM_CALL


def test_at_the_sessions_limit_a_call_goes_and_the_agent_stays(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    start = START + "globals()[name] = tool"
    hold = f"1 {120 * MIB} 0\n10000 {120 * MIB} 0\n"
    agent.run(start, name="first", options=["--name", "120"], LOAD=LOAD, schedule=hold)
    wait_until("it has begun", lambda: bool(daemon.call_dirs()))
    held = daemon.call_dirs()[0] / "memory.current"
    wait_until("it has grown", lambda: int(held.read_text()) > 120 * MIB)
    # It holds its memory for as long as the other one takes, however slow this machine is.
    agent.run("first.send_signal(signal.SIGSTOP)")
    grow = f"1 {180 * MIB} 0\n100 {180 * MIB} 0\n"
    agent.run(start, name="second", options=["--name", "180"], LOAD=LOAD, schedule=grow)
    ended = "second.wait(); first.send_signal(signal.SIGCONT); result = first.wait(), second.wait()"
    assert sorted(agent.run(ended)) == [-9, 0]
    assert agent.process.poll() is None
    last(daemon)
    reports = daemon.admin.ListReports(pb.ListReportsRequest(session_id="alpha", limit=2)).reports
    assert sorted(r.verdict for r in reports) == [pb.VERDICT_OK, pb.VERDICT_OOM_SESSION]
    killed = next(r for r in reports if r.verdict != pb.VERDICT_OK)
    assert "300 MiB" in killed.sentence


@pytest.mark.with_programs
def test_however_much_the_agent_holds_a_call_goes_first(daemon: DaemonProcess) -> None:
    """Even an important one that holds next to nothing, where the agent's own growth did it."""
    big = daemon.open("big", memory_max="200M", priority="important")
    big.run("held = bytearray(100 << 20); globals().update(held=held)")
    schedule = f"1 {8 * MIB} 0\n{int(60_000 * SLOW)} {8 * MIB} 0\n"
    big.run(START, schedule=schedule, options=["--name", "small"], LOAD=LOAD)
    wait_until("it has begun", lambda: bool(daemon.call_dirs()))
    small = daemon.call_dirs()[0] / "memory.current"
    wait_until("it has grown", lambda: int(small.read_text()) > 8 * MIB)
    # Slowly: the memory of a call that has just died comes back late on an emulated CPU.
    grow = """
more = []
globals().update(more=more)
while tool.poll() is None and len(more) < 200:
    more.append(bytearray(1 << 20))
    time.sleep(0.05)
result = tool.wait(60)
"""
    try:
        assert big.run(grow) == -9
        assert big.process.poll() is None
    except EOFError:
        # A guest may free the dead call's memory so late that the kernel goes on to the agent,
        # which is alone by then.
        assert IN_GUEST
    assert last(daemon, "big").verdict == pb.VERDICT_OOM_SESSION
    if _tells_victims(daemon):
        first = next(v for v in _victims(daemon) if v["session"] == "big")
        assert first["call"], "the agent was chosen before the call"


@pytest.mark.with_programs
def test_at_the_pools_limit_the_less_important_call_goes(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    important = daemon.open("vip", priority="important")
    schedule = f"1 {200 * MIB} 0\n{100_000} {200 * MIB} 0\n"
    agent.run(START, schedule=schedule, options=["--name", "batch"], LOAD=LOAD)
    wait_until("it has begun", lambda: bool(daemon.call_dirs()))
    batch = daemon.call_dirs()[0] / "memory.current"
    wait_until("it has grown", lambda: int(batch.read_text()) > 200 * MIB)
    status = load(important, f"1 {300 * MIB} 0\n", "--name", "vip")
    assert agent.run("result = tool.wait()") == -9
    assert last(daemon).verdict == pb.VERDICT_OOM_POOL
    ended = last(daemon, "vip")
    if not IN_GUEST:
        assert (status, ended.verdict) == (0, pb.VERDICT_OK)
    elif status:
        # A guest frees the dead call's memory so late that the kernel, with nobody else left, may
        # choose a second victim before the first one's 200 MiB are given back.
        assert ended.verdict == pb.VERDICT_OOM_POOL
        if _tells_victims(daemon):
            assert [v["session"] for v in _victims(daemon)[-2:]] == ["alpha", "vip"]


def _tells_victims(daemon: DaemonProcess) -> bool:
    """Whether the kernel takes the program that sees whom the OOM killer chooses."""
    return re.search(r"OOM victims[^:\n]*: missing: ", daemon.log.read_text()) is None


def _victims(daemon: DaemonProcess) -> list[dict[str, Any]]:
    """Victims of the OOM killer, in the order in which it chose them."""
    events = map(json.loads, daemon.audit_lines())
    return [event for event in events if event["event"] == "oom_victim"]


def _memory(daemon: DaemonProcess, session: str) -> int:
    return int((daemon.cgroup_dir / session / "memory.current").read_text())


def test_a_fork_bomb_stops_at_pids_max(daemon: DaemonProcess, agent: AgentProcess) -> None:
    bomb = """
import os, time
for _ in range(100):
    try:
        if not os.fork():
            time.sleep(100)
    except BlockingIOError:
        pass
"""
    code = """
argv = [EXEC, "--name", "bomb", "--pids-max", "20", "--", sys.executable, "-c", bomb]
result = subprocess.call(argv)
"""
    assert agent.run(code, bomb=bomb) == 0
    assert len(daemon.call_dirs()) == 1, "its children go on"
    call_id = daemon.call_dirs()[0].name.removeprefix("call-")
    assert int((daemon.call_dirs()[0] / "pids.current").read_text()) <= 20
    report = daemon.admin.EndCall(pb.EndCallRequest(call_id=call_id))
    assert report.pids_peak == 20
    assert report.pids_max_events >= 81
    codes = {f.code for f in report.feedback}
    assert {pb.FEEDBACK_CODE_PIDS_LIMIT, pb.FEEDBACK_CODE_LEFTOVERS} <= codes
    assert agent.process.poll() is None


def test_cpu_max_is_kept_and_told(daemon: DaemonProcess, agent: AgentProcess) -> None:
    seconds = 2
    assert load(agent, f"{seconds * 1000} {MIB} 100\n", "--cpu-max", "300m") == 0
    report = last(daemon)
    share = report.cpu_usage_usec / report.wall_usec
    assert 0.2 < share < 0.4
    assert report.cpu_throttled_usec > 0
    told = {f.code: f for f in report.feedback}
    assert pb.FEEDBACK_CODE_CPU_THROTTLED in told
    # nproc knows nothing of cpu.max.
    seen = agent.run("import os; result = len(os.sched_getaffinity(0))")
    numbers = told[pb.FEEDBACK_CODE_FEWER_CPUS].numbers
    assert numbers == {"cpus_seen": seen, "cpu_max_millicores": 300}


def test_cpu_max_that_was_not_felt_is_not_talked_about(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    code = "import subprocess\nsubprocess.run([EXEC, '--cpu-max=300m', *argv], check=True)"
    agent.run(code, argv=["--", "sleep", str(2 * SLOW)])
    assert pb.FEEDBACK_CODE_FEWER_CPUS not in {f.code for f in last(daemon).feedback}


def test_more_than_the_session_has_is_given_as_less_with_advice(agent: AgentProcess) -> None:
    call = agent.run(
        "call = stub.BeginCall(pb.BeginCallRequest(name='x', intent=pb.Intent(memory_max='64G', "
        "pids_max='5000', cpu_max='64', priority='99')))\n"
        "stub.EndCall(pb.EndCallRequest(call_id=call.id))\n"
        "result = call.SerializeToString()"
    )
    grant = pb.Call.FromString(call).grant
    assert grant.memory_max_bytes < 300 * MIB
    assert (grant.pids_max, grant.priority) == (200, 50)
    advised = [a.split(":")[0] for a in grant.advice]
    assert advised == ["memory_max", "cpu_max", "pids_max", "priority"]
    assert "64 GiB" in grant.advice[0] and "300 MiB" in grant.advice[0]


def test_what_would_never_fit_is_refused(daemon: DaemonProcess, agent: AgentProcess) -> None:
    with pytest.raises(RemoteRpcError) as caught:
        agent.run("stub.BeginCall(pb.BeginCallRequest(name='x', intent=pb.Intent(memory='64G')))")
    assert (caught.value.code, caught.value.error.field) == ("INVALID_ARGUMENT", "memory")
    assert daemon.call_dirs() == []
    for limits, field in (
        ({"memory_max": "64G"}, "memory_max"),
        ({"memory_max": "64M", "memory_low": "65M"}, "memory_low"),
        ({"pids_max": "0"}, "pids_max"),
        ({"priority": "-1"}, "priority"),
    ):
        with pytest.raises(Exception, match=field):
            daemon.open("greedy", **limits)
    assert not (daemon.cgroup_dir / "greedy").exists()


def test_an_update_below_what_the_call_holds_is_refused(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    code = """
call_id = stub.BeginCall(pb.BeginCallRequest(name="x", intent=pb.Intent(memory_max="200M"))).id
tool = subprocess.Popen([EXEC, "--call", call_id, "--", LOAD], stdin=subprocess.PIPE, text=True)
tool.stdin.write(f"1 {100 << 20} 0\\n100000 {100 << 20} 0\\n")
tool.stdin.close()
result = call_id
"""
    call_id = agent.run(code, LOAD=LOAD)
    directory = daemon.cgroup_dir / "alpha" / f"call-{call_id}"
    current = directory / "memory.current"
    wait_until("it has grown", lambda: int(current.read_text()) > 100 * MIB)
    update = "stub.UpdateIntent(pb.UpdateIntentRequest(call_id=call_id, intent=pb.Intent(**new)))"
    with pytest.raises(RemoteRpcError) as caught:
        agent.run(update, call_id=call_id, new={"memory_max": "50M"})
    assert caught.value.error.field == "memory_max"
    assert (directory / "memory.max").read_text().strip() == str(200 * MIB)
    agent.run(update, call_id=call_id, new={"memory_max": "150M", "cpu_max": "1"})
    assert (directory / "memory.max").read_text().strip() == str(150 * MIB)
    assert (directory / "cpu.max").read_text().strip() == "100000 100000"
    agent.run("stub.EndCall(pb.EndCallRequest(call_id=call_id)); tool.wait()", call_id=call_id)


def budget_of(agent: AgentProcess) -> pb.Budget:
    """What is left for an agent's session."""
    code = "result = stub.GetBudget(pb.GetBudgetRequest()).SerializeToString()"
    return pb.Budget.FromString(agent.run(code))


def test_the_budget_is_what_is_left(daemon: DaemonProcess, agent: AgentProcess) -> None:
    budget = budget_of(agent)
    assert budget.memory_limit_bytes == 300 * MIB
    used = _memory(daemon, "alpha")
    assert abs(budget.memory_used_bytes - used) < 8 * MIB
    # Page cache is used, and can be had.
    assert 300 * MIB - used - 8 * MIB <= budget.memory_available_bytes < 300 * MIB
    assert budget.pids_limit == 200 and 0 < budget.pids_available < 200
    assert "MiB" in budget.sentence


def test_a_containers_cgroup_is_split_in_place_and_given_back(daemon: DaemonProcess) -> None:
    with container(daemon, "pass", str(200 * MIB)) as (made, inside):
        session = adopt(daemon, made, "box", memory_max="400M", pids_max="100")
        assert session.adopted
        assert session.memory_max_bytes == 200 * MIB, "never above the runtime's own limit"
        assert (made.path / "memory.max").read_text().strip() == str(200 * MIB)
        assert (made.path / "agent/cgroup.procs").read_text().split() == [str(inside.pid)]
        agent = daemon.enter("box")
        assert load(agent, f"1 {20 * MIB} 0\n", "--name", "t") == 0
        daemon.kill()
        daemon.start()
        assert {s.id for s in daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions} >= {
            "box"
        }
        agent.close()
        daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="box"))
        assert (made.path / "cgroup.procs").read_text().split() == [str(inside.pid)]
        assert not (made.path / "agent").exists()
        assert (made.path / "pids.max").read_text().strip() == "max"
        assert (made.path / "cgroup.subtree_control").read_text().strip() == ""
        assert inside.poll() is None


def test_a_container_that_its_runtime_ends_as_a_whole_loses_a_call(daemon: DaemonProcess) -> None:
    """The kubelet sets memory.oom.group on the cgroup of each container."""
    with container(daemon, "pass", str(200 * MIB)) as (made, inside):
        made.write(knobs.MEMORY_OOM_GROUP, True)
        adopt(daemon, made, "whole")
        agent = daemon.enter("whole")
        start = START + "globals()[name] = tool"
        hold = f"1 {90 * MIB} 0\n100000 {90 * MIB} 0\n"
        agent.run(start, name="first", options=["--name", "90"], LOAD=LOAD, schedule=hold)
        wait_until("it has begun", lambda: bool(list(made.path.glob("call-*"))))
        held = next(made.path.glob("call-*")) / "memory.current"
        wait_until("it has grown", lambda: int(held.read_text()) > 90 * MIB)
        agent.run("first.send_signal(signal.SIGSTOP)")
        grow = f"1 {150 * MIB} 0\n100 {150 * MIB} 0\n"
        agent.run(start, name="second", options=["--name", "150"], LOAD=LOAD, schedule=grow)
        ended = "second.wait(); first.terminate(); first.send_signal(signal.SIGCONT)\n"
        statuses = agent.run(ended + "result = first.wait(), second.wait()")
        assert statuses.count(-9) == 1
        assert inside.poll() is None and agent.process.poll() is None
        agent.close()
        daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="whole"))
        assert made.read(knobs.MEMORY_OOM_GROUP)


def test_what_an_adopted_session_holds_is_the_pools(daemon: DaemonProcess) -> None:
    """The cgroup lies beside the pool's: the pool's numbers and the budgets of others know it."""
    held = 100 * MIB

    def of_pool() -> int:
        return daemon.admin.GetPool(pb.GetPoolRequest()).memory_current_bytes

    agent = daemon.open("beside")
    with container(daemon, f"held = b'x' * {held}") as (made, _):
        wait_until("it holds that", lambda: made.read(knobs.MEMORY_CURRENT) >= held)
        before, free = of_pool(), budget_of(agent).memory_available_bytes
        adopt(daemon, made, "large")
        wait_until("the pool has it", lambda: of_pool() >= before + 0.9 * held)
        wait_until(
            "and holds it",
            lambda: daemon.admin.GetPool(pb.GetPoolRequest()).memory_held_bytes >= 0.9 * held,
        )
        assert budget_of(agent).memory_available_bytes <= free - 0.9 * held
        daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="large"))
        wait_until("the pool has it no more", lambda: of_pool() < before + 0.5 * held)


def test_hundreds_of_calls_leave_nothing(daemon: DaemonProcess, agent: AgentProcess) -> None:
    """On an emulated CPU, scores."""
    count = 60 if SLOW != 1.0 else 200 if IN_GUEST else 500
    before = daemon.admin.GetPool(pb.GetPoolRequest())
    agent.run(
        """
from concurrent.futures import ThreadPoolExecutor
def one(number):
    return subprocess.call([EXEC, "--name", "t", "--memory-max", "32M", "--", "true"])
with ThreadPoolExecutor(16) as pool:
    codes = list(pool.map(one, range(count)))
assert codes == [0] * count, codes
""",
        count=count,
    )
    wait_until("all have ended", lambda: not daemon.call_dirs())
    after = daemon.admin.GetPool(pb.GetPoolRequest())
    assert after.calls_ended - before.calls_ended == count
    assert after.leftovers_removed == before.leftovers_removed
