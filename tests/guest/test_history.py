"""Decisions on a real kernel, as a story tells them afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentcgroup import Admin
from agentcgroup.types import Story
from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import EXEC, SLOW, AgentProcess, DaemonProcess, wait_until

pytestmark = pytest.mark.controllers

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB = 1 << 20
START = """
tool = subprocess.Popen([EXEC, "--name", name, *options, "--", LOAD], stdin=subprocess.PIPE,
                        text=True)
tool.stdin.write(schedule)
tool.stdin.close()
"""


def start(agent: AgentProcess, name: str, schedule: str, *options: str) -> None:
    agent.run(START, name=name, LOAD=LOAD, schedule=schedule, options=list(options))


def stories(daemon: DaemonProcess) -> dict[str, Story]:
    """Stories of all calls, by name, when all have ended and their sessions are closed."""
    wait_until("all have ended", lambda: not daemon.call_dirs(), 60)
    for session in daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions:
        daemon.admin.CloseSession(pb.CloseSessionRequest(session_id=session.id))
    with Admin(str(daemon.run_dir)) as admin:
        return {report.name: admin.story(report.call_id) for report in admin.history()}


def test_pauses_are_told_with_their_reasons_and_times(start_daemon: StartDaemon) -> None:
    daemon = start_daemon('[pool]\nmemory_max = "640M"\n')
    agents = {name: daemon.open(name, priority="batch") for name in ("b1", "b2")}
    agents["vip"] = daemon.open("vip", priority="important")
    for name, agent in agents.items():
        start(agent, name, f"15000 {220 * MIB} 10\n5000 {220 * MIB} 10\n")
    assert {agent.run("result = tool.wait()") for agent in agents.values()} == {0}
    told = stories(daemon)
    paused = max((told["b1"], told["b2"]), key=lambda s: s.report.frozen_usec if s.report else 0)
    steps = [(step.what, step.sentence) for step in paused.steps]
    assert [what for what, _ in steps].count("freeze") >= 1
    freeze = next(sentence for what, sentence in steps if what == "freeze")
    assert freeze.startswith("It was paused: ") and len(freeze) > 30
    assert ("thaw" in dict(steps)) and steps[-1][0] == "ended"
    at = [step.at_unix_usec for step in paused.steps if step.what in ("freeze", "thaw")]
    assert at == sorted(at)
    assert paused.steps[-1].numbers["frozen_usec"] > 100_000
    assert any("paused" in sentence for sentence in paused.advice)


def test_the_queue_is_told_with_the_place_and_the_time(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    (tmp_path / "test.toml").write_text('[admission]\nsmall = "32M"\n')
    daemon = start_daemon(f'[pool]\nmemory_max = "600M"\n[policy]\ndrop_in = "{tmp_path}"\n')
    agent, other = daemon.open("a"), daemon.open("b")
    hold = int(1000 * SLOW)
    start(agent, "first", f"200 {200 * MIB} 0\n{hold} {200 * MIB} 0\n", "--memory", "300M")
    procs = daemon.cgroup_dir / "a"
    wait_until("it runs", lambda: any(f.read_text() for f in procs.glob("call-*/cgroup.procs")))
    # It holds its room for as long as the other takes, however slow this machine is.
    agent.run("tool.send_signal(signal.SIGSTOP)")
    start(other, "second", f"10 {20 * MIB} 0\n", "--memory", "300M")

    def waits() -> list[pb.Call]:
        calls = daemon.admin.ListCalls(pb.ListCallsRequest()).calls
        return [c for c in calls if c.state == pb.CALL_STATE_WAITING]

    wait_until("it waits", lambda: bool(waits()))
    with Admin(str(daemon.run_dir)) as admin:
        story = admin.story(waits()[0].id)
    assert (story.name, story.state.value, story.report) == ("second", "waiting", None)
    assert [step.what for step in story.steps] == ["call_waiting"]
    agent.run("tool.send_signal(signal.SIGCONT)")
    assert other.run("result = tool.wait()") == 0 == agent.run("result = tool.wait()")
    second = stories(daemon)["second"]
    words = [step.what for step in second.steps]
    order = [words.index(w) for w in ("asked", "call_waiting", "call_started", "granted", "ended")]
    assert order == sorted(order)
    started = second.steps[words.index("call_started")]
    assert second.report is not None
    assert started.numbers["waited_usec"] == second.report.waited_usec > 0
    assert "memory 300 MiB" in second.steps[0].sentence


def test_an_oom_kill_is_told_with_its_limit(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("")
    agent = daemon.open("a")
    start(agent, "eater", f"100 {200 * MIB} 0\n1000 {200 * MIB} 0\n", "--memory-max", "64M")
    assert agent.run("result = tool.wait()") == -9
    story = stories(daemon)["eater"]
    end = story.steps[-1]
    assert "64 MiB" in end.sentence and "Verdict: oom_call" in end.sentence
    assert end.numbers["oom_kills"] >= 1
    assert "memory_max 64 MiB" in story.steps[0].sentence
