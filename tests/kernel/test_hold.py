"""A call that the operator pauses, and lets go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentcgroup import Admin, CallNotFound, Refused
from agentcgroup.types import CallInfo, CallState, Verdict
from tests.conftest import StartDaemon
from tests.harness import AgentProcess, DaemonProcess, wait_until

COUNTS = "import time\nwhile True:\n    print(1, flush=True)\n    time.sleep(0.01)\n"
BEGIN = "call = agent.tool_call('count', **intent); call.begin(); result = call.id"
START = "call.popen(['python3', '-c', program], stdout=open(path, 'w'))"


@pytest.fixture
def fresh(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon that a test may end."""
    return start_daemon("")


def counting(agent: AgentProcess, path: Path, **intent: str) -> str:
    """Begin a call whose process writes a line every 10 ms; returns its id."""
    call_id: str = agent.run(BEGIN, intent=intent)
    agent.run(START, program=COUNTS, path=str(path))
    wait_until("it counts", lambda: path.stat().st_size > 0)
    return call_id


def goes_on(path: Path) -> Callable[[], bool]:
    before = path.stat().st_size
    return lambda: path.stat().st_size > before


def only(admin: Admin) -> CallInfo:
    (call,) = admin.calls()
    return call


def test_a_held_call_stands_still_until_the_operator_lets_it(
    fresh: DaemonProcess, tmp_path: Path
) -> None:
    agent, path = fresh.open("alpha"), tmp_path / "count"
    call_id = counting(agent, path)
    with Admin(str(fresh.run_dir)) as admin:
        held = admin.pause_call(call_id, "lunch\x1b[31m")
        assert (held.state, held.held) == (CallState.FROZEN, True)
        assert held.paused_why == "The operator paused it: lunch?[31m"
        assert admin.pool().calls_paused == 1
        time.sleep(0.1)  # what was being written is there
        before = path.stat().st_size
        time.sleep(0.5)
        assert path.stat().st_size == before
        assert only(admin).frozen_usec > 500_000
        admin.pause_call(call_id)  # no error, and nothing changes
        moves = goes_on(path)
        assert admin.resume_call(call_id).state is CallState.RUNNING
        wait_until("it goes on", moves)
        with pytest.raises(Refused, match="is not paused"):
            admin.resume_call(call_id)
        report = admin.end_call(call_id)
        with pytest.raises(CallNotFound):
            admin.pause_call(call_id)
    assert report.frozen_usec > 500_000
    (told,) = [f for f in report.feedback if f.code == "frozen"]
    assert "by the operator" in told.sentence
    assert any("held it paused" in fact.what for fact in report.facts)


@pytest.mark.waits
def test_time_that_it_is_held_does_not_count_against_its_timeout(
    fresh: DaemonProcess, tmp_path: Path
) -> None:
    agent, path = fresh.open("alpha"), tmp_path / "count"
    call_id = counting(agent, path, timeout="2s")
    with Admin(str(fresh.run_dir)) as admin:
        admin.pause_call(call_id)
        time.sleep(3)
        assert only(admin).state is CallState.FROZEN
        admin.resume_call(call_id)
        wait_until("its time is over", lambda: not admin.calls())
        assert admin.report(call_id).verdict is Verdict.TIMEOUT


def test_a_held_call_can_be_ended(fresh: DaemonProcess, tmp_path: Path) -> None:
    agent = fresh.open("alpha")
    call_id = counting(agent, tmp_path / "count")
    with Admin(str(fresh.run_dir)) as admin:
        admin.pause_call(call_id)
        assert admin.end_call(call_id).verdict is Verdict.CANCELLED


@pytest.mark.parametrize("killed", [False, True])
def test_nothing_stays_held_without_the_daemon(
    fresh: DaemonProcess, tmp_path: Path, killed: bool
) -> None:
    agent, path = fresh.open("alpha"), tmp_path / "count"
    call_id = counting(agent, path)
    with Admin(str(fresh.run_dir)) as admin:
        admin.pause_call(call_id)
    time.sleep(0.1)
    moves = goes_on(path)
    fresh.kill() if killed else fresh.stop()
    fresh.start()
    wait_until("it goes on", moves)
    with Admin(str(fresh.run_dir)) as admin:
        assert only(admin).state is CallState.RUNNING
