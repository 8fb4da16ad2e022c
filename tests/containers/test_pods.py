"""Real pods of containerd are sessions before their first instruction, by NRI."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.containers.host import Host, is_none, is_session, sessions
from tests.containers.pods import Containerd
from tests.containers.runtimes import since
from tests.harness import DaemonProcess, wait_until

TRUE = {"agentcgroup.session": "true"}
SHOW = ("sh", "-c", "cat /proc/self/cgroup; ls /run/agentcgroup/agent; exec sleep 100000")
STARTS = int(os.environ.get("AGENTCG_STARTS") or 12)
MIB = 1 << 20


@pytest.fixture
def containerd(host: Host) -> Containerd:
    """The containerd that has NRI."""
    return host.nri


@pytest.fixture
def follower(daemon: DaemonProcess) -> DaemonProcess:
    """The daemon, which is a plugin of it."""
    return daemon


def _where(containerd: Containerd, name: str) -> str:
    """The cgroup that a container has seen itself in when it began."""
    wait_until(f"{name} has spoken", lambda: "0::" in containerd.said(name), 60, every_s=0.05)
    (line,) = (line for line in containerd.said(name).splitlines() if "0::" in line)
    return line.rpartition(" ")[2]


def test_the_first_instruction_is_in_the_agent_leaf(
    follower: DaemonProcess, containerd: Containerd
) -> None:
    pod, container = containerd.run("web", SHOW, TRUE, 64 * MIB)
    assert _where(containerd, "web") == "0::/agent"
    is_session(follower, "team-web-main")
    session = sessions(follower)["team-web-main"]
    assert session.container == f"nri:{container}"
    assert session.memory_max_bytes == 64 * MIB
    code, output = containerd.execute(container, "cat", "/proc/self/cgroup")
    assert (code, output.strip()[-6:]) == (0, "/agent")
    containerd.remove(pod)
    is_none(follower, "team-web-main")


def test_calls_and_their_limits(follower: DaemonProcess, containerd: Containerd) -> None:
    """The sockets are there by themselves; a call that is killed at its limit ends alone."""
    pod, container = containerd.run("calls", ("sleep", "100000"), TRUE, 64 * MIB)
    is_session(follower, "team-calls-main")
    for number in range(6):
        hog = f"dd if=/dev/zero of=/dev/null bs={24 if number % 2 else 2}M count=1"
        limit = ("agentcg-exec", "--memory-max", "12M", "--")
        code, output = containerd.execute(container, *limit, "sh", "-c", hog)
        assert (code == 0) is (number % 2 == 0), output
    name = "team-calls-main"
    wait_until("all have ended", lambda: sessions(follower)[name].calls_ended == 6)
    request = pb.ListReportsRequest(session_id="team-calls-main")
    verdicts = [report.verdict for report in follower.admin.ListReports(request).reports]
    assert verdicts.count(pb.VERDICT_OOM_CALL) == 3 and verdicts.count(pb.VERDICT_OK) == 3
    status = containerd.stub.ContainerStatus(containerd.pb.Id(id=container)).status
    assert status.state == 1
    update = containerd.pb.UpdateRequest(
        id=container, linux=containerd.pb.Resources(memory_limit=96 * MIB)
    )
    containerd.stub.UpdateContainerResources(update)
    wait_until("the daemon knows", lambda: sessions(follower)[name].memory_max_bytes == 96 * MIB)
    containerd.remove(pod)
    is_none(follower, "team-calls-main")


def test_starts_mixed_with_restarts(follower: DaemonProcess, containerd: Containerd) -> None:
    started, live = time.monotonic(), list[tuple[str, str]]()
    for number in range(STARTS):
        name = f"p{number}"
        match number % 6:
            case 2:
                containerd.stop(signal.SIGKILL if number % 4 else signal.SIGTERM)
                containerd.start()
                _joined(follower)
            case 4:
                follower.kill()
                follower.start()
                _joined(follower)
        pod, _ = containerd.run(name, SHOW, TRUE)
        assert _where(containerd, name) == "0::/agent", name
        live.append((pod, f"team-{name}-main"))
        if len(live) > 3:
            pod, session = live.pop(0)
            containerd.remove(pod)
            is_none(follower, session)
    for pod, session in live:
        is_session(follower, session)
        containerd.remove(pod)
        is_none(follower, session)
    entries = [json.loads(line) for line in follower.audit_lines()]
    opened = {e["session"] for e in entries if e["event"] == "session_opened"}
    assert {f"team-p{number}-main" for number in range(STARTS)} <= opened
    assert [e for e in entries if e["event"] == "container_refused"] == []
    print(f"containerd: {STARTS} starts in {since(started)}")


def _joined(follower: DaemonProcess) -> None:
    """Wait until the daemon has joined since the last time that containerd or it was started."""
    before = follower.log.read_text().count("nri containerd")
    wait_until(
        "it is a plugin again",
        lambda: (
            follower.log.read_text().count("nri containerd") > before or _is_plugin_now(follower)
        ),
        60,
    )


def _is_plugin_now(follower: DaemonProcess) -> bool:
    text = follower.log.read_text()
    return text.rfind("nri containerd") > max(text.rfind("nri: "), text.rfind("is enforced"))
