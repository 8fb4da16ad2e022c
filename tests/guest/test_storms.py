"""Storms of processes where the kernel limits their number: 3,000 attempts, of which each tries to
get away, beside an agent that has to live."""

from __future__ import annotations

import pytest

from tests.conftest import StartDaemon
from tests.harness import AgentProcess, DaemonProcess, wait_until

pytestmark = pytest.mark.controllers

ATTEMPTS, LIMIT, PAST_MOST = 1000, 120, 64
PROGRAM = f"""
import os, signal
refused = 0
for way in ("fork", "setsid", "double fork"):
    for _ in range({ATTEMPTS}):
        try:
            pid = os.fork()
        except BlockingIOError:
            refused += 1
            continue
        if pid:
            if way == "double fork":
                os.waitpid(pid, 0)
            continue
        try:
            if way != "fork":
                os.setsid()
            if way == "double fork" and os.fork():
                os._exit(0)
            for fd in (0, 1, 2):
                os.close(fd)
            signal.pause()
        finally:
            os._exit(1)
raise SystemExit(refused < 2 * {ATTEMPTS})
"""
AS_IT_IS = """
import sys
result = subprocess.run([sys.executable, "-c", program]).returncode
"""
IN_A_CALL = """
import sys
ended = subprocess.run([EXEC, "--leftovers", "keep", "--", sys.executable, "-c", program])
result = ended.returncode
"""


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon of its own."""
    return start_daemon("")


def peak(daemon: DaemonProcess, session: str) -> int:
    """The most processes that a session has had at a time."""
    return int((daemon.cgroup_dir / session / "pids.peak").read_text())


def check_contained(daemon: DaemonProcess, agent: AgentProcess) -> None:
    """The session stayed within its limit, its agent answers, and a session beside it is free."""
    assert LIMIT - PAST_MOST <= peak(daemon, "alpha") <= LIMIT + PAST_MOST
    assert agent.run("result = 1 + 1") == 2
    other = daemon.open("beta")
    assert other.run("result = subprocess.run([EXEC, '--', 'true']).returncode") == 0


def test_a_storm_in_the_agent_leaf_is_contained(daemon: DaemonProcess) -> None:
    agent = daemon.open("alpha", pids_max=str(LIMIT))
    assert agent.run(AS_IT_IS, program=PROGRAM) == 0
    check_contained(daemon, agent)


def test_a_storm_in_a_call_is_contained_and_ends_with_it(daemon: DaemonProcess) -> None:
    agent = daemon.open("alpha", pids_max=str(LIMIT))
    assert agent.run(IN_A_CALL, program=PROGRAM) == 0
    check_contained(daemon, agent)
    (call,) = daemon.cgroup_dir.glob("alpha/call-*")
    agent.run("agent.end_call(call_id)", call_id=call.name.removeprefix("call-"))
    wait_until("all of it has ended", lambda: not list(daemon.cgroup_dir.glob("alpha/call-*")))
    current = daemon.cgroup_dir / "alpha/pids.current"
    wait_until("the agent is alone", lambda: int(current.read_text()) < 20)
