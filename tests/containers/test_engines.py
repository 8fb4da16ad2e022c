"""Real containers of Docker and podman are sessions, whatever is restarted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.containers.host import is_none, is_session, sessions
from tests.containers.runtimes import IMAGE, Service, since
from tests.harness import DaemonProcess, wait_until

SLEEP = ("sleep", "100000")
LABELS = {"agentcgroup.session": "true"}
STARTS = int(os.environ.get("AGENTCG_STARTS") or 12)
MIB = 1 << 20


def cgroup_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().rpartition("0::")[2].strip()


def pid_of(service: Service, name: str) -> int:
    return int(service.client.containers.get(name).attrs["State"]["Pid"])


def _has_said(container: Any, times: int) -> bool:
    """Whether a container has told so often where it is."""
    return bool(container.logs().count(b"0::") == times)


def execute(service: Service, name: str, *command: str) -> tuple[int, str]:
    done = service.client.containers.get(name).exec_run(list(command))
    return int(done.exit_code), done.output.decode(errors="replace")


def test_what_a_runtime_does_to_a_container_goes_on_working(
    daemon: DaemonProcess, service: Service
) -> None:
    name = f"all-{service.name}"
    container = service.run(name, SLEEP, LABELS, mem_limit="64m")
    is_session(daemon, name)
    session = sessions(daemon)[name]
    assert session.container == f"{service.name}:{container.id}"
    assert session.memory_max_bytes == 64 * MIB
    pid = pid_of(service, name)
    assert cgroup_of(pid) == f"{session.cgroup_path}/agent"
    code, output = execute(service, name, "cat", "/proc/self/cgroup")
    assert (code, output.strip()[-6:]) == (0, "/agent")
    container.pause()
    container.unpause()
    assert container.stats(stream=False)["memory_stats"]["usage"] > 0
    container.update(mem_limit="96m", memswap_limit="192m")
    at = Path(f"/sys/fs/cgroup{session.cgroup_path}/memory.max")
    assert at.read_text() == f"{96 * MIB}\n"
    if service.name == "docker":  # podman tells nothing of an update
        wait_until("the daemon knows", lambda: sessions(daemon)[name].memory_max_bytes == 96 * MIB)
    container.restart(timeout=1)
    wait_until("it is one again", lambda: _is_another(daemon, name, session.cgroup_id), 60)
    assert cgroup_of(pid_of(service, name)).endswith("/agent")
    service.remove(name)
    is_none(daemon, name)


def _is_another(daemon: DaemonProcess, name: str, before: int) -> bool:
    found = sessions(daemon).get(name)
    return found is not None and found.cgroup_id != before


def test_a_call_of_a_container(daemon: DaemonProcess, service: Service) -> None:
    name = f"call-{service.name}"
    mount = {str(daemon.run_dir / "agent"): {"bind": "/run/agentcgroup/agent", "mode": "rw"}}
    service.run(name, SLEEP, LABELS, mem_limit="128m", volumes=mount)
    is_session(daemon, name)
    before = sessions(daemon)[name].calls_ended
    for number in range(5):
        hog = f"dd if=/dev/zero of=/dev/null bs={(24 if number % 2 else 2)}M count=1 2>&1"
        code, output = execute(
            service, name, "agentcg-exec", "--memory-max", "12M", "--", "sh", "-c", hog
        )
        assert (code == 0) is (number % 2 == 0), output
    request = pb.ListReportsRequest(session_id=name)
    wait_until("all have ended", lambda: sessions(daemon)[name].calls_ended == before + 5)
    reports = list(daemon.admin.ListReports(request).reports)
    killed = [r for r in reports if r.verdict == pb.VERDICT_OOM_CALL]
    assert (len(reports), len(killed)) == (5, 2)
    assert all(r.grant.memory_max_bytes == 12 * MIB for r in reports)
    service.remove(name)
    is_none(daemon, name)


def test_starts_mixed_with_restarts_of_everything(daemon: DaemonProcess, service: Service) -> None:
    """Every container that is started is found, whatever else begins anew meanwhile; and nothing is
    left when they have ended."""
    started, live = time.monotonic(), list[str]()
    for number in range(STARTS):
        name = f"s{number}-{service.name}"
        match number % 6:
            case 2 if service.name == "docker":
                service.stop(signal.SIGKILL if number % 4 else signal.SIGTERM)
                service.start()
            case 3:
                daemon.kill()
                service.run(name, SLEEP, LABELS)
                daemon.start()
            case 5:
                service.client.containers.get(live[-1]).restart(timeout=0)
        if name not in service.made:
            service.run(name, SLEEP, LABELS)
        live.append(name)
        if len(live) > 4:
            is_session(daemon, live[0])  # however long the runtime takes to tell of it
            service.remove(live.pop(0))
    for name in live:
        is_session(daemon, name)
        assert cgroup_of(pid_of(service, name)).endswith("/agent")
    entries = [json.loads(line) for line in daemon.audit_lines()]
    opened = {e["session"] for e in entries if e["event"] == "session_opened"}
    refused = [e for e in entries if e["event"] == "container_refused"]
    print(f"{service.name}: {STARTS} starts in {since(started)}, {len(opened)} sessions")
    assert refused == []
    for name in live:
        service.remove(name)
        is_none(daemon, name)
    expected = {f"s{number}-{service.name}" for number in range(STARTS)}
    missed = expected - opened
    assert missed == set()


@pytest.mark.parametrize("ended", [signal.SIGKILL, signal.SIGTERM])
def test_a_runtime_that_ends_in_the_middle_of_a_call(
    daemon: DaemonProcess, services: dict[str, Service], ended: signal.Signals
) -> None:
    docker = services["docker"]
    name = f"mid-{ended.name.lower()}"
    mount = {str(daemon.run_dir / "agent"): {"bind": "/run/agentcgroup/agent", "mode": "rw"}}
    container = docker.run(name, SLEEP, LABELS, volumes=mount)
    is_session(daemon, name)
    container.exec_run(["agentcg-exec", "--", "sleep", "5"], detach=True)
    wait_until("a call is open", lambda: sessions(daemon)[name].calls_open == 1, 30)
    docker.stop(ended)
    docker.start()
    wait_until("its call has ended", lambda: sessions(daemon)[name].calls_ended == 1, 30)
    at = Path(f"/sys/fs/cgroup{sessions(daemon)[name].cgroup_path}")
    assert "frozen 0" in (at / "cgroup.events").read_text()
    docker.remove(name)
    is_none(daemon, name)


def test_docker_with_the_wrapper_starts_in_the_agent_leaf(
    daemon: DaemonProcess, services: dict[str, Service]
) -> None:
    docker = services["docker"]
    show = ("sh", "-c", "cat /proc/self/cgroup; exec sleep 100000")
    for number in range(3):
        name = f"early-{number}"
        container = docker.run(name, show, LABELS, runtime="agentcg", mem_limit="64m")
        wait_until("it has spoken", partial(_has_said, container, 1), 30)
        assert container.logs().strip() == b"0::/agent"
        is_session(daemon, name)
        code, output = execute(docker, name, "cat", "/proc/self/cgroup")
        assert (code, output.strip()[-6:]) == (0, "/agent")
        container.restart(timeout=1)
        wait_until("it has spoken again", partial(_has_said, container, 2), 30)
        assert container.logs().split() == [b"0::/agent"] * 2
        docker.remove(name)
        is_none(daemon, name)


def test_podman_with_the_hook_starts_in_the_agent_leaf(
    daemon: DaemonProcess, services: dict[str, Service]
) -> None:
    podman = services["podman"]
    name, mark = "early-podman", "agentcgroup.session=true"
    show = ("sh", "-c", "cat /proc/self/cgroup; exec sleep 100000")
    options = ("--detach", f"--name={name}", "--network=none", "--stop-signal=SIGKILL")
    argv = [*podman.argv[:4], "run", *options, f"--label={mark}", f"--annotation={mark}"]
    subprocess.run([*argv, IMAGE, *show], check=True, stdout=subprocess.DEVNULL)
    podman.made.append(name)
    container = podman.client.containers.get(name)
    wait_until("it has spoken", lambda: b"0::" in container.logs(), 30)
    assert container.logs().strip() == b"0::/agent"
    is_session(daemon, name)
    podman.remove(name)
    is_none(daemon, name)
