"""The queue for room on a real kernel: who waits, how long, and what is left of who gives up."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import EXEC, IN_GUEST, SLOW, AgentProcess, DaemonProcess, wait_until

pytestmark = pytest.mark.controllers

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB = 1 << 20
START = """
global tools
tools = globals().get("tools", {})
tools[name] = subprocess.Popen([EXEC, "--name", name, *options, "--", LOAD],
                               stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
tools[name].stdin.write(schedule)
tools[name].stdin.close()
"""


@pytest.fixture
def daemon(start_daemon: StartDaemon, tmp_path: Path) -> DaemonProcess:
    """With a pool of 600 MiB and a queue for whoever expects more than 32 MiB."""
    return start_daemon(config_with(tmp_path, 'small = "32M"'))


def config_with(directory: Path, admission: str) -> str:
    """A pool of 600 MiB, and a policy that differs from the default in this."""
    (directory / "test.toml").write_text(f"[admission]\n{admission}\n")
    return f'[pool]\nmemory_max = "600M"\n[policy]\ndrop_in = "{directory}"\n'


def start(agent: AgentProcess, name: str, held_bytes: int, ms: int, *options: str) -> None:
    """A tool that holds this much for this long, begun through the launcher."""
    schedule = f"200 {held_bytes} 0\n{ms} {held_bytes} 0\n"
    agent.run(START, name=name, LOAD=LOAD, options=list(options), schedule=schedule)


def waiting(daemon: DaemonProcess) -> list[pb.Call]:
    """Calls in the queue."""
    calls = daemon.admin.ListCalls(pb.ListCallsRequest()).calls
    return [c for c in calls if c.state == pb.CALL_STATE_WAITING]


def audit(daemon: DaemonProcess, event: str) -> list[dict[str, Any]]:
    """Entries of one kind."""
    lines = map(json.loads, daemon.audit_lines())
    return [line for line in lines if line["event"] == event]


def report_of(daemon: DaemonProcess, name: str) -> pb.Report:
    """Wait for the end of the newest call of a name, and return its report."""
    found: list[pb.Report] = []

    def there() -> bool:
        reports = daemon.admin.ListReports(pb.ListReportsRequest(limit=1000)).reports
        found[:] = [r for r in reports if r.name == name]
        return bool(found)

    wait_until(f"{name} has its report", there)
    return found[0]


def test_a_call_waits_for_room_and_small_ones_pass_it(daemon: DaemonProcess) -> None:
    agent = daemon.open("a")
    start(agent, "first", 200 * MIB, int(1500 * SLOW), "--memory", "300M")
    wait_until("it runs", lambda: len(daemon.call_dirs()) == 1)
    procs = daemon.call_dirs()[0] / "cgroup.procs"
    wait_until("its tool is in it", lambda: procs.read_text() != "")
    # It holds its room for as long as the others take, however slow this machine is.
    agent.run("tools['first'].send_signal(signal.SIGSTOP)")
    start(agent, "second", 20 * MIB, 10, "--memory", "300M")
    wait_until("it waits", lambda: len(waiting(daemon)) == 1)
    (call,) = waiting(daemon)
    assert (call.name, call.session_id) == ("second", "a")
    assert (call.place.position, call.place.waiting) == (1, 1)
    assert call.place.expected_bytes == 300 * MIB > call.place.room_bytes
    assert 0 < call.place.deadline_usec <= 60_000_000
    for options in ((), ("--memory", "30M")):
        start(agent, "small", MIB, 10, *options)
        assert agent.run("result = tools['small'].wait()") == 0
    assert [c.name for c in waiting(daemon)] == ["second"], "others did not wait for it"
    agent.run("tools['first'].send_signal(signal.SIGCONT)")
    assert agent.run("result = tools['first'].wait(), tools['second'].wait()") == (0, 0)
    report = report_of(daemon, "second")
    assert report.verdict == pb.VERDICT_OK
    assert report.waited_usec > 500_000 > 0
    assert report_of(daemon, "small").waited_usec == 0
    assert len(audit(daemon, "call_waiting")) == len(audit(daemon, "call_started")) == 1


def test_who_says_how_long_is_refused_then(daemon: DaemonProcess) -> None:
    agent = daemon.open("a")
    start(agent, "first", 200 * MIB, int(30_000 * SLOW), "--memory", "300M")
    wait_until("it runs", lambda: len(daemon.call_dirs()) == 1)
    for wait, said in (("0", "try again later"), ("1s", "of waiting")):
        start(agent, "impatient", MIB, 10, "--memory", "300M", "--wait", wait)
        code, text = agent.run(
            "result = tools['impatient'].wait(), tools['impatient'].stderr.read()"
        )
        assert code == 125 and said in text and "300 MiB" in text, text
    assert waiting(daemon) == [] and len(daemon.call_dirs()) == 1
    agent.run("tools['first'].kill(); tools['first'].wait()")


def test_at_its_deadline_a_call_starts_all_the_same(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(config_with(tmp_path, 'small = "32M"\nwait = "2s"'))
    agent = daemon.open("a")
    start(agent, "first", 200 * MIB, int(30_000 * SLOW), "--memory", "300M")
    wait_until("it runs", lambda: len(daemon.call_dirs()) == 1)
    start(agent, "second", MIB, 10, "--memory", "300M")
    assert agent.run("result = tools['second'].wait()") == 0
    assert report_of(daemon, "second").waited_usec >= 2_000_000
    agent.run("tools['first'].kill(); tools['first'].wait()")


def test_who_goes_away_leaves_nothing_behind(daemon: DaemonProcess) -> None:
    """Killed while it waits, ended by its agent, its session closed."""
    agent, other = daemon.open("a"), daemon.open("b")
    start(agent, "first", 200 * MIB, int(60_000 * SLOW), "--memory", "300M")
    wait_until("it runs", lambda: len(daemon.call_dirs()) == 1)
    for name in ("killed", "ended"):
        start(agent, name, MIB, 10, "--memory", "300M")
    start(other, "closed", MIB, 10, "--memory", "300M")
    wait_until("all wait", lambda: len(waiting(daemon)) == 3)
    agent.run("tools['killed'].kill(); tools['killed'].wait()")
    wait_until("one is gone", lambda: len(waiting(daemon)) == 2)
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="b"))
    wait_until("its session's is gone", lambda: [c.name for c in waiting(daemon)] == ["ended"])
    (left,) = waiting(daemon)
    report = daemon.admin.EndCall(pb.EndCallRequest(call_id=left.id))
    assert report.verdict == pb.VERDICT_CANCELLED
    assert agent.run("result = tools['ended'].wait()") == 125
    assert waiting(daemon) == [] and len(daemon.call_dirs()) == 1
    agent.run("tools['first'].kill(); tools['first'].wait()")


def test_hundreds_at_once_all_get_their_turn(daemon: DaemonProcess) -> None:
    """A crowd as large as can be started, each expecting a quarter of the pool; and the daemon
    answers others."""
    # More than the reports that are kept of a session. A guest's CPU needs seconds to start a
    # hundred, and a launcher waits ten for its answer.
    waves, at_once = (1, 30) if SLOW != 1.0 else (3, 90) if IN_GUEST else (1, 500)
    count = waves * at_once
    agent = daemon.open("a", calls_max="1000")
    run_all = """
crowd, result = [EXEC, "--name", "crowd", "--memory", "120M", "--", "/bin/true"], []
for _ in range(waves):
    running = [subprocess.Popen(crowd) for _ in range(at_once)]
    result += [p.wait() for p in running]
"""
    codes = agent.run(run_all, waves=waves, at_once=at_once)
    assert codes == [0] * count
    wait_until("all have ended", lambda: not daemon.call_dirs() and not waiting(daemon), 30)
    request = pb.ListReportsRequest(session_id="a", limit=1000)
    reports = daemon.admin.ListReports(request).reports
    verdicts = Counter(pb.Verdict.Name(r.verdict) for r in reports if r.name == "crowd")
    assert verdicts == {"VERDICT_OK": min(count, 256)}
    assert daemon.admin.GetPool(pb.GetPoolRequest()).calls_ended == count


def test_a_guarantee_is_not_queued_for_and_not_given_twice(daemon: DaemonProcess) -> None:
    holder, owner = daemon.open("holder"), daemon.open("owner", memory_low="250M")
    start(holder, "first", 200 * MIB, int(30_000 * SLOW), "--memory", "300M")
    wait_until("it runs", lambda: len(daemon.call_dirs()) == 1)
    start(owner, "mine", MIB, 10, "--memory", "150M")
    assert owner.run("result = tools['mine'].wait()") == 0
    assert report_of(daemon, "mine").waited_usec == 0
    with pytest.raises(Exception, match="at most 350 MiB") as refused:
        daemon.open("greedy", memory_low="400M")
    assert "250 MiB are guaranteed to other sessions" in str(refused.value)
    with pytest.raises(Exception, match="more than the whole pool"):
        daemon.open("greedier", memory_low="700M")
    holder.run("tools['first'].kill(); tools['first'].wait()")


BEGIN_MANY = """
import threading
def begin(number):
    request = pb.BeginCallRequest(name=f"held{number}", intent=pb.Intent(memory=memory))
    try:
        pb_grpc.AgentStub(channel).BeginCall(request, timeout=600)
    except grpc.RpcError as error:
        refused.append(error.code().name)
channel = grpc.insecure_channel(f"unix:{RUN_DIR}/agent/grpc.sock")
refused = []
threads = [threading.Thread(target=begin, args=(i,), daemon=True) for i in range(count)]
for thread in threads:
    thread.start()
"""


@pytest.mark.parametrize("sessions", [1, 4])
def test_calls_that_are_held_empty_keep_no_room(daemon: DaemonProcess, sessions: int) -> None:
    """Each expects the whole pool, and they fill the places that their sessions may have."""
    for i in range(sessions):
        greedy = daemon.open(f"greedy{i}")
        greedy.run(BEGIN_MANY, memory="500M", count=30)
    wait_until("the greedy wait", lambda: len(waiting(daemon)) >= 20 * sessions)
    victim = daemon.open("victim")
    for _ in range(3):
        took = victim.run(
            "t = time.monotonic(); agent.run(['true'], memory='200M');result = time.monotonic() - t"
        )
        # One second of kept room for each greedy session that came first, on a machine that has
        # other work; without turns and with room kept it would be a minute.
        assert took < (3 + 1.5 * sessions) * SLOW
    assert len(waiting(daemon)) >= 10 * sessions


def test_room_counts_again_when_a_process_enters(daemon: DaemonProcess) -> None:
    agent = daemon.open("a")
    code = (
        "result = stub.BeginCall(pb.BeginCallRequest(name='held', intent=pb.Intent(memory=m))).id"
    )
    call_id = agent.run(code, m="500M")
    start(agent, "second", MIB, 10, "--memory", "300M", "--wait", "20s")
    report = report_of(daemon, "second")
    assert report.verdict == pb.VERDICT_OK and report.waited_usec < 5e6 * SLOW
    agent.run(
        "held = subprocess.Popen([EXEC, '--call', call_id, '--', 'sleep', '1000'])",
        call_id=call_id,
    )
    procs = daemon.cgroup_dir / f"a/call-{call_id}" / "cgroup.procs"
    wait_until("it is in its call", lambda: procs.read_text() != "")
    start(agent, "third", MIB, 10, "--memory", "300M", "--wait", "1s")
    wait_until(
        "it is refused", lambda: any(e["name"] == "third" for e in audit(daemon, "call_refused"))
    )
    agent.run("held.kill(); held.wait()")
    start(agent, "fourth", MIB, 10, "--memory", "300M", "--wait", "20s")
    assert report_of(daemon, "fourth").verdict == pb.VERDICT_OK
