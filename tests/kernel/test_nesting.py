"""Calls inside calls: what they get, how they end, and that nothing gets a tool out of its call."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup
from tests.conftest import StartDaemon
from tests.harness import EXEC, AgentProcess, DaemonProcess, RemoteRpcError, wait_until

BEGIN = """
request = pb.BeginCallRequest(name=name, intent=pb.Intent(**intent))
result = stub.BeginCall(request).SerializeToString()
"""
SLEEP = "subprocess.Popen([EXEC, '--call', call_id, '--', 'sleep', '1000'])"


def begin(agent: AgentProcess, name: str, **intent: str) -> pb.Call:
    """Begin a call that the process holds open."""
    return pb.Call.FromString(agent.run(BEGIN, name=name, intent=intent))


def tool_in(daemon: DaemonProcess, call: pb.Call) -> AgentProcess:
    """Start a process that runs inside a call."""
    tool = daemon.enter(call.session_id)
    answer = tool.run("result = packet('attach', 'call=' + call_id)", call_id=call.id)
    assert answer[0] == "OK"
    return tool


def end(agent: AgentProcess, call: pb.Call, **fields: bool) -> pb.Report:
    """End a call; returns its report."""
    code = (
        "request = pb.EndCallRequest(call_id=call_id, **fields)\n"
        "result = stub.EndCall(request).SerializeToString()"
    )
    return pb.Report.FromString(agent.run(code, call_id=call.id, fields=fields))


def calls(daemon: DaemonProcess) -> dict[str, pb.Call]:
    """Open calls, by name."""
    listed = daemon.admin.ListCalls(pb.ListCallsRequest()).calls
    return {call.name: call for call in listed}


def report_of(daemon: DaemonProcess, call_id: str) -> pb.Report:
    """Wait for the report of a call."""

    def there() -> bool:
        listed = daemon.admin.ListReports(pb.ListReportsRequest(limit=1000)).reports
        return any(report.call_id == call_id for report in listed)

    wait_until(f"call {call_id} has its report", there)
    return daemon.admin.GetReport(pb.GetReportRequest(call_id=call_id))


def both_reports(daemon: DaemonProcess, *names: str) -> list[pb.Report]:
    """Wait until no call is open, and return the newest report of each name."""
    wait_until(
        "all calls have ended",
        lambda: (
            not {c.name for c in daemon.admin.ListCalls(pb.ListCallsRequest()).calls} & set(names)
        ),
    )
    listed = daemon.admin.ListReports(pb.ListReportsRequest(limit=50)).reports
    return [next(report for report in listed if report.name == name) for name in names]


def nested_feedback(report: pb.Report) -> list[str]:
    """What a report says of calls around its call and inside it."""
    return [f.sentence for f in report.feedback if f.code == pb.FEEDBACK_CODE_NESTED]


@pytest.fixture
def outer(daemon: DaemonProcess, agent: AgentProcess) -> Iterator[pb.Call]:
    """A call with limits, held open by the agent."""
    call = begin(
        agent, "outer", memory_max="64M", pids_max="20", priority="40", timeout="1h", cpu_max="0.5"
    )
    yield call
    if call.id in {open_call.id for open_call in calls(daemon).values()}:
        end(agent, call)


# What a call inside gets


def test_a_call_inside_gets_at_most_what_is_left(daemon: DaemonProcess, outer: pb.Call) -> None:
    tool = tool_in(daemon, outer)
    inner = begin(
        tool,
        "inner",
        memory="1G",
        memory_max="2G",
        pids_max="500",
        priority="80",
        timeout="2h",
        cpu_max="2",
        on_pressure="throttle",
    )
    assert inner.parent_call_id == outer.id
    grant = inner.grant
    assert grant.memory_max_bytes <= 64 << 20 and grant.memory_expected_bytes <= 64 << 20
    assert grant.pids_max <= 20 and grant.priority == 40 and grant.cpu_max_millicores == 500
    assert 3_500_000_000 < grant.timeout_usec <= 3_600_000_000
    assert grant.on_pressure == "freeze"
    cut = {sentence.partition(":")[0] for sentence in grant.advice if outer.id in sentence}
    assert {"memory_max", "pids_max", "priority", "timeout", "cpu_max", "on_pressure"} <= cut
    report = end(tool, inner)
    assert {sentence.partition(":")[0] for sentence in nested_feedback(report)} >= cut
    assert report.parent_call_id == outer.id


def test_who_asks_for_nothing_gets_what_is_left(daemon: DaemonProcess, outer: pb.Call) -> None:
    tool = tool_in(daemon, outer)
    inner = begin(tool, "inner")
    # What the outer call's processes hold is counted where the kernel does so.
    assert 60 << 20 < inner.grant.memory_max_bytes <= 64 << 20 and inner.grant.priority == 40
    assert inner.grant.cpu_max_millicores == 500 and inner.grant.timeout_usec <= 3_600_000_000
    assert not nested_feedback(end(tool, inner))


WAYS = {
    "gRPC": "result = stub.BeginCall(pb.BeginCallRequest(name='way')).id",
    "packet": """
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.connect(str(RUN_DIR / "agent/attach.sock"))
    sock.send(b"ACG1\\0rpc\\0BeginCall\\0" + pb.BeginCallRequest(name="way").SerializeToString())
    result = pb.Call.FromString(sock.recv(65536).partition(b"\\0")[2]).id
""",
    "words": "result = packet('begin', 'name=way')[1].partition('=')[2]",
    "SDK": """
with agent.tool_call("way") as call:
    result = call.id
    call.run(["true"])
""",
    "launcher": """
subprocess.run([EXEC, "--name", "way", "--", "true"], check=True)
while not (found := stub.ListReports(pb.ListReportsRequest()).reports):
    time.sleep(0.01)
result = found[0].call_id
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_leads_out_of_a_call(daemon: DaemonProcess, outer: pb.Call, way: str) -> None:
    """Whichever way a tool asks, and over a connection that was made before it was in its call."""
    tool = daemon.enter("alpha")
    tool.run("stub.GetSession(pb.GetSessionRequest()); agent.budget()")
    tool.run("packet('attach', 'call=' + call_id)", call_id=outer.id)
    call_id = tool.run(WAYS[way])
    found = [call for call in calls(daemon).values() if call.id == call_id]
    parent = found[0].parent_call_id if found else report_of(daemon, call_id).parent_call_id
    assert parent == outer.id
    assert outer.id in tool.run("result = open('/proc/self/cgroup').read()")


def test_calls_are_in_one_another_to_a_depth(daemon: DaemonProcess, outer: pb.Call) -> None:
    second = tool_in(daemon, outer)
    inner = begin(second, "second", pids_max="10")
    third = tool_in_nested(tool_in(daemon, outer), inner)
    innermost = begin(third, "third")
    assert innermost.parent_call_id == inner.id and innermost.grant.pids_max <= 10
    fourth = tool_in_nested(third, innermost)
    with pytest.raises(RemoteRpcError, match="3 calls deep already") as caught:
        begin(fourth, "fourth")
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    # From below nothing around may be touched, and from above all inside may.
    for call in (outer, inner, innermost):
        with pytest.raises(RemoteRpcError, match="from here"):
            end(fourth, call)
    report = end(second, inner)
    assert report.inner_call_ids == [innermost.id]
    assert report_of(daemon, innermost.id).parent_call_id == inner.id


def tool_in_nested(tool: AgentProcess, call: pb.Call) -> AgentProcess:
    """Move a tool on into a call inside the one it is in."""
    answer = tool.run("result = packet('attach', 'call=' + call_id)", call_id=call.id)
    assert answer[0] == "OK"
    return tool


def test_fifty_calls_inside_at_once(daemon: DaemonProcess, agent: AgentProcess) -> None:
    call = begin(agent, "outer", pids_max="1000")
    tool = tool_in(daemon, call)
    code = """
started = [subprocess.Popen([EXEC, "--name", f"i{i}", "--", "sh", "-c", f"exit {i}"])
           for i in range(50)]
result = [child.wait() for child in started]
"""
    assert tool.run(code) == list(range(50))
    wait_until("they are over", lambda: list(calls(daemon)) == ["outer"])
    report = end(agent, call)
    assert len(report.inner_call_ids) == 50
    listed = daemon.admin.ListReports(pb.ListReportsRequest(limit=200)).reports
    mine = {r.name: r.exit_code for r in listed if r.parent_call_id == call.id}
    assert mine == {f"i{i}": i for i in range(50)}


def test_calls_inside_begin_while_the_outer_one_forks(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    call = begin(agent, "outer", pids_max="1000")
    storm = "while :; do /bin/true & /bin/true & wait; done"
    agent.run(
        "storm = subprocess.Popen([EXEC, '--call', call_id, '--', 'sh', '-c', storm_code])",
        call_id=call.id,
        storm_code=storm,
    )
    tool = tool_in(daemon, call)
    for _ in range(10):
        assert tool.run("result = subprocess.call([EXEC, '--name', 'in', '--', 'true'])") == 0
    assert (daemon.cgroup_dir / f"alpha/call-{call.id}/cgroup.procs").read_text() == ""
    end(agent, call)
    agent.run("storm.wait()")


@pytest.mark.full_speed
def test_a_call_of_many_processes_is_not_split(daemon: DaemonProcess, agent: AgentProcess) -> None:
    call = begin(agent, "outer")
    tool = tool_in(daemon, call)
    # Moving thousands of them would keep everybody else waiting.
    tool.run(
        """
import signal
pids = []
for _ in range(300):
    pid = os.fork()
    if not pid:
        signal.pause()
    pids.append(pid)
"""
    )
    with pytest.raises(RemoteRpcError, match="301 processes, which are too many") as caught:
        begin(tool, "inner")
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    leaf = daemon.cgroup_dir / f"alpha/call-{call.id}"
    assert len((leaf / "cgroup.procs").read_text().split()) == 301 and not (leaf / "main").exists()
    tool.run("for pid in pids: os.kill(pid, 9); os.waitpid(pid, 0)")
    end(tool, begin(tool, "inner"))
    end(agent, call)


def test_calls_inside_leave_some_to_the_agent(daemon: DaemonProcess) -> None:
    agent = daemon.open("few", calls_max="5")
    call = begin(agent, "outer")
    tool = tool_in(daemon, call)
    inner = [begin(tool, f"inner{i}") for i in range(3)]
    with pytest.raises(RemoteRpcError, match="open inside others") as caught:
        begin(tool, "one more")
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    end(agent, begin(agent, "of the agent"))
    end(tool, inner[0])
    end(tool, begin(tool, "again"))
    end(agent, call)


def test_the_budget_of_a_tool_is_that_of_its_call(daemon: DaemonProcess, outer: pb.Call) -> None:
    tool = tool_in(daemon, outer)
    code = "result = stub.GetBudget(pb.GetBudgetRequest()).SerializeToString()"
    budget = pb.Budget.FromString(tool.run(code))
    assert budget.cpu_limit_millicores == 500
    assert budget.memory_limit_bytes == 64 << 20


def test_cgroups_of_the_tools_own_keep_calls_out(daemon: DaemonProcess, outer: pb.Call) -> None:
    tool = tool_in(daemon, outer)
    own = daemon.cgroup_dir / f"alpha/call-{outer.id}" / "of-the-tool"
    own.mkdir()
    with pytest.raises(RemoteRpcError, match="'of-the-tool' among them") as caught:
        begin(tool, "inner")
    assert caught.value.code == "FAILED_PRECONDITION"
    own.rmdir()
    end(tool, begin(tool, "inner"))


def test_what_the_agent_changes_of_a_call_inside_stays_within_the_outer_one(
    daemon: DaemonProcess, agent: AgentProcess, outer: pb.Call
) -> None:
    tool = tool_in(daemon, outer)
    inner = begin(tool, "inner", pids_max="5", timeout="1m")
    code = (
        "request = pb.UpdateIntentRequest(call_id=call_id, intent=pb.Intent(**intent))\n"
        "result = stub.UpdateIntent(request).SerializeToString()"
    )
    more = {"pids_max": "5000", "memory_max": "8G", "priority": "50", "timeout": "1d"}
    raised = pb.Call.FromString(agent.run(code, call_id=inner.id, intent=more)).grant
    assert 5 < raised.pids_max <= 20 and 60 << 20 < raised.memory_max_bytes <= 64 << 20
    assert raised.priority == 40 and raised.timeout_usec <= 3_600_000_000
    with pytest.raises(RemoteRpcError) as caught:
        tool.run(code, call_id=inner.id, intent={"pids_max": "5000"})
    assert caught.value.code == "PERMISSION_DENIED"
    fewer = pb.Call.FromString(tool.run(code, call_id=inner.id, intent={"pids_max": "3"}))
    assert fewer.grant.pids_max == 3


# How calls inside end


def test_the_end_of_a_call_is_that_of_those_inside(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    call = begin(agent, "outer")
    tool = tool_in(daemon, call)
    running, held = begin(tool, "running"), begin(tool, "held")
    tool.run(SLEEP, call_id=running.id)
    wait_until("it runs", lambda: calls(daemon)["running"].state == pb.CALL_STATE_RUNNING)
    report = end(agent, call)
    assert report.verdict == pb.VERDICT_CANCELLED
    assert sorted(report.inner_call_ids) == sorted((running.id, held.id))
    (said,) = nested_feedback(report)
    assert said.startswith("2 calls inside were ended with it") and running.id in said
    why = f"t ended with call {call.id} that it was begun in."
    ended = report_of(daemon, running.id)
    assert ended.verdict == pb.VERDICT_CANCELLED and ended.sentence.endswith(why)
    assert nested_feedback(ended) == [f"I{why}"]
    never_entered = report_of(daemon, held.id)
    assert never_entered.verdict == pb.VERDICT_ABANDONED
    assert nested_feedback(never_entered) == [f"I{why}"]
    assert not (daemon.cgroup_dir / f"alpha/call-{call.id}").exists()


def test_the_timeout_of_a_call_holds_for_those_inside(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    inside = f"{EXEC} --name inside --timeout 1h -- sleep 1000; sleep 1000"
    code = """
result = subprocess.call([EXEC, "--name", "around", "--timeout", "1", "--", "sh", "-c", inside])
"""
    assert agent.run(code, inside=inside) == -15
    around, inner = both_reports(daemon, "around", "inside")
    assert around.verdict == pb.VERDICT_TIMEOUT and around.inner_call_ids == [inner.call_id]
    assert inner.verdict == pb.VERDICT_CANCELLED and around.call_id in inner.sentence
    assert inner.grant.timeout_usec <= 1_000_000


def test_a_timeout_inside_ends_the_inner_call_alone(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    inside = f"{EXEC} --name inside --timeout 0.3 -- sleep 1000; echo $?"
    code = """
done = subprocess.run([EXEC, "--name", "around", "--", "sh", "-c", inside],
                      capture_output=True, text=True)
result = done.returncode, done.stdout
"""
    assert agent.run(code, inside=inside) == (0, "143\n")
    around, inner = both_reports(daemon, "around", "inside")
    assert (around.verdict, inner.verdict) == (pb.VERDICT_OK, pb.VERDICT_TIMEOUT)


def test_a_call_inside_that_outlives_the_tool_is_left_over(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    """A call inside keeps the outer one open, whose limits hold on, and ends with it."""
    inside = f"{EXEC} --name server -- sleep 1000 >/dev/null 2>&1 & sleep 0.3"
    code = "result = subprocess.call([EXEC, '--name', 'around', '--', 'sh', '-c', inside])"
    assert agent.run(code, inside=inside) == 0
    found = calls(daemon)
    assert found["server"].parent_call_id == found["around"].id
    report = end(agent, found["around"])
    assert report.verdict == pb.VERDICT_OK
    assert pb.FEEDBACK_CODE_LEFTOVERS in [feedback.code for feedback in report.feedback]
    server = report_of(daemon, found["server"].id)
    assert server.verdict == pb.VERDICT_CANCELLED and report.call_id in server.sentence


def test_the_end_of_a_session_is_that_of_calls_inside_calls(daemon: DaemonProcess) -> None:
    agent = daemon.open("gone")
    call = begin(agent, "outer")
    tool = tool_in(daemon, call)
    inner = begin(tool, "inner")
    tool.run(SLEEP, call_id=inner.id)
    wait_until("it runs", lambda: calls(daemon)["inner"].state == pb.CALL_STATE_RUNNING)
    closed = daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="gone"))
    assert closed.calls_ended == 2
    assert not (daemon.cgroup_dir / "gone").exists()


@pytest.mark.parametrize("how", ["exit 4", "kill -SEGV $$"])
def test_a_tool_that_ends_in_another_call_goes_on_as_that(
    daemon: DaemonProcess, agent: AgentProcess, how: str
) -> None:
    code = """
done = subprocess.run([EXEC, "--name", "first", "--", EXEC, "--name", "second", "--",
                       "sh", "-c", how])
result = done.returncode
"""
    status = agent.run(code, how=how)
    first, second = both_reports(daemon, "first", "second")
    assert first.verdict == pb.VERDICT_OK and first.went_on_as == second.call_id
    assert first.sentence.startswith(f"It went on as call {second.call_id}. Of that: ")
    assert second.parent_call_id == first.call_id and second.sentence in first.sentence
    if status > 0:
        assert status == first.exit_code == second.exit_code == 4
    else:
        assert -status == first.term_signal == second.term_signal


def test_going_on_as_another_call_lifts_no_limit(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    """Nor does it outlive the timeout, and the daemon's word for that is its own."""
    code = """
done = subprocess.run([EXEC, "--name", "first", "--timeout", "1", "--pids-max", "9", "--",
                       EXEC, "--name", "second", "--timeout", "1h", "--pids-max", "900", "--",
                       "sleep", "1000"])
result = done.returncode
"""
    assert agent.run(code) == -15
    first, second = both_reports(daemon, "first", "second")
    assert first.verdict == pb.VERDICT_TIMEOUT and first.went_on_as == second.call_id
    assert second.grant.pids_max <= 9 and second.verdict == pb.VERDICT_CANCELLED


def test_a_held_call_whose_command_goes_on_as_another(agent: AgentProcess) -> None:
    code = """
r = agent.run(["sh", "-c", f"exec {EXEC} --name inside -- sh -c 'exit 4'"])
result = r.returncode, str(r.report.verdict), r.report.sentence
"""
    returncode, verdict, sentence = agent.run(code)
    assert (returncode, verdict) == (4, "ok") and sentence.startswith("It went on as call")


def test_a_later_command_of_a_held_call_is_judged_by_itself(agent: AgentProcess) -> None:
    code = """
with agent.tool_call("held") as call:
    call.run(["sh", "-c", f"exec {EXEC} --name inside -- sh -c 'exit 4'"])
    call.run(["sh", "-c", "exit 5"])
result = str(call.report.verdict), call.report.exit_code, call.report.to_dict().get("went_on_as")
"""
    verdict, exit_code, went_on_as = agent.run(code)
    assert (verdict, exit_code) == ("failed", 5) and not went_on_as


@pytest.mark.programs
def test_a_call_that_was_only_observed_is_no_bound(start_daemon: StartDaemon) -> None:
    """A shell in it may declare what its agent may."""
    daemon = start_daemon("[boundaries]\nrules = [{ program = ['sh'], shell_command = true }]\n")
    agent = daemon.open("alpha")
    inside = f"sleep 0.2; {EXEC} --name declared --pids-max 9000 --priority 50 -- true; true"
    agent.run("subprocess.run(['sh', '-c', inside])", inside=inside)
    found: list[pb.Report] = []

    def both_ended() -> bool:
        found[:] = daemon.admin.ListReports(pb.ListReportsRequest(limit=9)).reports
        return len(found) == 2

    wait_until("both have ended", both_ended)
    declared, observed = sorted(found, key=lambda report: report.observed)
    assert declared.grant.pids_max == 9000 and not declared.parent_call_id
    assert observed.observed and not nested_feedback(declared)


# The daemon's own end, and other people's cgroups


@pytest.fixture
def fresh(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon that a test may kill."""
    return start_daemon("")


def test_calls_inside_calls_survive_a_killed_daemon(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    call = begin(agent, "outer", pids_max="50")
    tool = tool_in(fresh, call)
    stays, goes = begin(tool, "stays"), begin(tool, "goes")
    tool.run("tools = []")
    for inner in (stays, goes):
        tool.run(f"tools.append({SLEEP})", call_id=inner.id)
    wait_until(
        "both run",
        lambda: all(calls(fresh)[n].state == pb.CALL_STATE_RUNNING for n in ("stays", "goes")),
    )
    tool.run("subprocess.Popen([EXEC, '--name', 'deep', '--', 'sleep', '1000'])")
    wait_until("it runs", lambda: "deep" in calls(fresh))
    fresh.kill()
    tool.run("tools[1].kill(); tools[1].wait()")
    leftover = fresh.cgroup_dir / f"alpha/call-{call.id}/call-leftover"
    leftover.mkdir()
    fresh.start()
    found = calls(fresh)
    parents = {name: open_call.parent_call_id for name, open_call in found.items()}
    inside = dict.fromkeys(("stays", "goes", "deep"), call.id)
    assert parents == {"outer": "", **inside}
    assert not leftover.exists()
    # It is a bound as before, and begins calls as before.
    with pytest.raises(RemoteRpcError, match="from here"):
        end(tool, call)
    again = begin(tool, "again", pids_max="500")
    assert again.parent_call_id == call.id and again.grant.pids_max <= 50
    report = end(agent, call)
    assert {stays.id, goes.id, again.id, found["deep"].id} <= set(report.inner_call_ids)
    assert "inside were ended with it" in nested_feedback(report)[0]
    assert report_of(fresh, stays.id).verdict == pb.VERDICT_CANCELLED
    assert not fresh.call_dirs()


def test_a_call_whose_main_process_went_on_survives_too(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    code = """
tool = subprocess.Popen([EXEC, "--name", "first", "--", EXEC, "--name", "second", "--",
                         "sh", "-c", "read line; exit 3"], stdin=subprocess.PIPE)
"""
    agent.run(code)
    wait_until("it went on", lambda: "second" in calls(fresh))
    first = calls(fresh)["first"].id
    fresh.kill()
    fresh.start()
    assert set(calls(fresh)) == {"first", "second"}
    agent.run("tool.stdin.close(); tool.wait()")
    report = report_of(fresh, first)
    assert report.went_on_as and report.sentence.startswith("It went on as call")


def test_calls_inside_calls_of_an_adopted_cgroup(fresh: DaemonProcess) -> None:
    container = Cgroup.open(fresh.cgroup_dir.parent).make_child(f"nested-{os.getpid()}")
    path = f"/{container.path.name}"
    shell = subprocess.Popen(["sleep", "1000"])
    worker = None
    try:
        container.attach(shell.pid)
        spec = pb.SessionSpec(id="adopted")
        fresh.admin.AdoptSession(pb.AdoptSessionRequest(cgroup_path=path, spec=spec))
        agent = worker = fresh.enter("adopted")
        call = begin(agent, "outer")
        tool = tool_in(fresh, call)
        inner = begin(tool, "inner")
        tool.run(SLEEP, call_id=inner.id)
        wait_until("it runs", lambda: calls(fresh)["inner"].state == pb.CALL_STATE_RUNNING)
        assert calls(fresh)["inner"].cgroup_path == f"{path}/call-{call.id}/call-{inner.id}"
        fresh.admin.CloseSession(pb.CloseSessionRequest(session_id="adopted"))
        assert shell.pid in container.procs() and list(container.children()) == []
    finally:
        shell.kill()
        shell.wait()
        if worker is not None:
            worker.close()
        container.kill_and_remove()


def test_a_cgroup_inside_that_was_removed_by_someone_else(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    call = begin(agent, "outer")
    tool = tool_in(daemon, call)
    inner = begin(tool, "inner")
    Path(daemon.cgroup_dir / f"alpha/call-{call.id}/call-{inner.id}").rmdir()
    report = end(tool, inner)
    assert report.call_id == inner.id
    end(agent, call)
