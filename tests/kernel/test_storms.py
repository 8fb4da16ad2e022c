"""Storms of shells that nobody declares, and ways in which their processes try to get away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import AgentProcess, DaemonProcess, wait_until

pytestmark = [
    pytest.mark.programs,
    pytest.mark.full_speed,
    pytest.mark.usefixtures("lifecycle_program"),
]

SHELLS = 3000
LIMIT = 50
LEFT_AFTER_S = 3.0
"""Longer than calls.leftovers_grace: what is left then is noted."""
STORM = """
stdin, release = os.pipe()
children = [
    subprocess.Popen(["sh", "-c", "read line; true"], stdin=stdin) for _ in range(count)
]
"""
RELEASE = """
os.close(release)
result = sum(bool(child.wait()) for child in children)
os.close(stdin)
"""
ESCAPES = {
    "setsid": "setsid sleep 1000 &",
    "double fork": "(sleep 1000 &) ; exit 0",
    "both, again and again": "(setsid sh -c '(setsid sh -c \"sleep 1000 & exit 0\" &)' &)",
    "a group of its own": "set -m; sleep 1000 & exit 0",
    "at once": "exec setsid -f sleep 1000",
    "nohup": "nohup sleep 1000 > /dev/null 2>&1 &",
}
RUN = "result = subprocess.run(['sh', '-c', script]).returncode"


@pytest.fixture(scope="module")
def daemon(start_module_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with the rules that hold without configuration."""
    return start_module_daemon("[boundaries]\nenabled = true\n[sessions]\nreports_kept = 5000\n")


@pytest.fixture
def agent(daemon: DaemonProcess) -> Iterator[AgentProcess]:
    """An agent in a session of its own, which may have LIMIT calls."""
    agent = daemon.open("alpha", calls_max=str(LIMIT))
    yield agent
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="alpha"))


def ended(daemon: DaemonProcess) -> int:
    """Calls ended so far."""
    return daemon.admin.GetPool(pb.GetPoolRequest()).calls_ended


@pytest.mark.timeout(400)
def test_many_shells_at_once(daemon: DaemonProcess, agent: AgentProcess) -> None:
    """Calls are open up to the limit, the others are told why not, and each has its report."""
    before = ended(daemon)
    agent.run(STORM, count=SHELLS)
    wait_until("as many calls are open as may be", lambda: len(daemon.call_dirs()) == LIMIT, 60)

    def refused() -> int:
        return sum('"call_refused"' in line for line in daemon.audit_lines())

    wait_until("the others were refused", lambda: refused() >= SHELLS - LIMIT, 60, 0.1)
    assert len(daemon.call_dirs()) == LIMIT
    assert agent.run("result = open('/proc/self/cgroup').read()").rstrip().endswith("/alpha/agent")
    assert agent.run(RELEASE) == 0
    wait_until("all have a report", lambda: ended(daemon) >= before + SHELLS, 60, 0.1)
    wait_until("all calls are gone", lambda: not daemon.call_dirs())
    assert ended(daemon) == before + SHELLS


@pytest.mark.waits
@pytest.mark.parametrize("how", ESCAPES)
def test_nothing_that_a_call_leaves_running_gets_out_of_it(
    daemon: DaemonProcess, agent: AgentProcess, how: str
) -> None:
    script = ESCAPES[how]
    assert agent.run(RUN, script=script) == 0
    leaf = daemon.cgroup_dir / "alpha/agent/cgroup.procs"
    wait_until("the agent is alone in its leaf", lambda: len(leaf.read_text().split()) == 1)
    (call,) = daemon.call_dirs()

    def sleeps() -> bool:
        inside = (call / "cgroup.procs").read_text().split()
        return any(Path(f"/proc/{pid}/comm").read_text() == "sleep\n" for pid in inside)

    wait_until("what it left running is in it", sleeps)
    time.sleep(LEFT_AFTER_S)
    report = daemon.admin.EndCall(pb.EndCallRequest(call_id=call.name.removeprefix("call-")))
    assert report.session_id == "alpha"
    (told,) = [fact.what for fact in report.facts if "left running" in fact.what]
    assert "sleep (" in told and ("in a session of its own (setsid)" in told) is (
        "setsid" in script
    )
    assert "its parent has ended" in told
    wait_until("all of it has ended", lambda: not daemon.call_dirs())
