"""Containers of a Docker become sessions by themselves: a daemon, real cgroups and processes, and a
Docker whose API the test serves."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import nri_pb2 as nri
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.conftest import StartDaemon
from tests.docker_api import DockerApi
from tests.harness import DaemonProcess, wait_until
from tests.nri_runtime import NriRuntime

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LABELS = {"agentcgroup.session": "web", "agentcgroup.priority": "important"}


@dataclass
class Docker:
    """A daemon with a Docker, whose containers the test makes of cgroups and `sleep`."""

    daemon: DaemonProcess
    api: DockerApi
    base: Cgroup
    processes: list[subprocess.Popen[bytes]]

    def run(self, container_id: str) -> subprocess.Popen[bytes]:
        """Make a container's cgroup with a process in it."""
        made = self.base.make_child(f"docker-{container_id}.scope")
        process = subprocess.Popen(["sleep", "1000"])
        self.processes.append(process)
        made.attach(process.pid)
        return process

    def end(self, container_id: str, process: subprocess.Popen[bytes]) -> None:
        """End a container as a runtime does: its processes, then its cgroup."""
        process.kill()
        process.wait()
        self.api.end(container_id)
        self.base.child(f"docker-{container_id}.scope").remove()

    def sessions(self) -> dict[str, pb.Session]:
        listed = self.daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions
        return {session.id: session for session in listed}

    def cgroup_id(self, session: str) -> int:
        """The cgroup of a session that is open; 0: it is not."""
        return self.sessions().get(session, pb.Session()).cgroup_id

    def audit(self, event: str) -> list[dict[str, Any]]:
        return [e for e in map(json.loads, self.daemon.audit_lines()) if e["event"] == event]


@pytest.fixture
def docker(start_daemon: StartDaemon, tmp_path: Path) -> Iterator[Docker]:
    api = DockerApi(tmp_path / "docker.sock")
    config = f'[containers]\ndocker = "{api.path}"\npodman = ""\n'
    with _base() as base:
        found = Docker(start_daemon(config), api, base, [])
        yield found
        found.daemon.stop()
        api.stop()
        for process in found.processes:
            process.kill()
            process.wait()


@contextmanager
def _base() -> Iterator[Cgroup]:
    """A cgroup below which the test makes those of containers."""
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    base = Cgroup.open(made.path)
    yield base
    base.kill_and_remove()
    base.close()
    root.close()


def placed(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/cgroup").read_text().rpartition("0::")[2].strip()


def test_a_container_is_a_session_from_its_start_to_its_end(docker: Docker) -> None:
    one = secrets.token_hex(32)
    process = docker.run(one)
    docker.api.start(one, "Web_1", process.pid, LABELS)
    wait_until("it is a session", lambda: "web" in docker.sessions(), 20)
    session = docker.sessions()["web"]
    assert session.adopted and session.priority == 80
    assert session.container == f"docker:{one}"
    assert placed(process) == f"/{docker.base.path.name}/docker-{one}.scope/agent"
    docker.end(one, process)
    wait_until("its session has ended", lambda: "web" not in docker.sessions())


def test_a_restarted_container_is_a_session_again(docker: Docker) -> None:
    one = secrets.token_hex(32)
    process = docker.run(one)
    docker.api.start(one, "web", process.pid, LABELS)
    wait_until("it is a session", lambda: "web" in docker.sessions(), 20)
    seen = {0, docker.sessions()["web"].cgroup_id}
    for _ in range(5):
        docker.end(one, process)
        process = docker.run(one)
        docker.api.start(one, "web", process.pid, LABELS)
        wait_until("it is one again", lambda: docker.cgroup_id("web") not in seen)
        seen.add(docker.cgroup_id("web"))
        assert placed(process).endswith("/agent")
    assert docker.audit("container_refused") == []


def test_a_restart_of_the_daemon_finds_what_is_there_and_what_came(docker: Docker) -> None:
    one, two = secrets.token_hex(32), secrets.token_hex(32)
    process = docker.run(one)
    docker.api.start(one, "web", process.pid, LABELS)
    wait_until("it is a session", lambda: "web" in docker.sessions(), 20)
    docker.daemon.kill()
    second = docker.run(two)
    docker.api.start(two, "db", second.pid, {"agentcgroup.session": "true"})
    docker.daemon.start()
    wait_until("both are sessions", lambda: {"web", "db"} <= docker.sessions().keys(), 20)
    wait_until(
        "the first is known again", lambda: docker.sessions()["web"].container == f"docker:{one}"
    )
    opened = [entry["session"] for entry in docker.audit("session_opened")]
    assert opened == ["web", "db"]


def test_a_second_container_of_the_same_name_gets_another(docker: Docker) -> None:
    one, two = secrets.token_hex(32), secrets.token_hex(32)
    for number in (one, two):
        docker.api.start(number, number[:6], docker.run(number).pid, LABELS)
    names = {"web", f"web-{two[:12]}"}
    wait_until("both are sessions", lambda: docker.sessions().keys() == names, 20)


def test_labels_that_cannot_be_used_are_said_and_left_out(docker: Docker) -> None:
    one = secrets.token_hex(32)
    labels = {**LABELS, "agentcgroup.memory": "lots", "agentcgroup.colour": "red"}
    docker.api.start(one, "web", docker.run(one).pid, labels)
    wait_until("it is a session", lambda: "web" in docker.sessions(), 20)
    said = [entry["why"] for entry in docker.audit("container_label_ignored")]
    assert len(said) == 2 and "colour" in said[0] and "'lots'" in said[1]


def test_a_process_that_is_elsewhere_is_not_taken_for_the_container(docker: Docker) -> None:
    docker.api.start(secrets.token_hex(32), "web", os.getpid(), LABELS)
    # Twice where the event and the list both tell of it.
    wait_until("it is refused", lambda: len(docker.audit("container_refused")) >= 1, 20)
    assert docker.sessions() == {}
    assert "does not have its id" in docker.audit("container_refused")[0]["why"]


def test_a_container_that_was_split_before_its_first_instruction(docker: Docker) -> None:
    one = secrets.token_hex(32)
    process = docker.run(one)
    scope = docker.base.child(f"docker-{one}.scope")
    scope.make_child("agent").attach(process.pid)
    docker.api.start(one, "web", process.pid, LABELS)
    wait_until("it is a session", lambda: "web" in docker.sessions(), 20)
    assert placed(process).endswith(f"docker-{one}.scope/agent")
    docker.end(one, process)
    wait_until("its session has ended", lambda: docker.sessions() == {})


def test_a_docker_that_hangs_delays_nobody(docker: Docker) -> None:
    docker.api.hold.clear()
    one = secrets.token_hex(32)
    docker.api.start(one, "web", docker.run(one).pid, LABELS)
    docker.daemon.open("other")
    assert "other" in docker.sessions()
    assert docker.daemon.process is not None
    docker.daemon.process.send_signal(signal.SIGTERM)
    assert docker.daemon.process.wait(10) == 0
    docker.api.hold.set()


def test_a_pod_is_in_its_agent_leaf_before_its_first_instruction(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """NRI asks before: what the runtime has put into the cgroup is in agent/ when the runtime has
    its answer, and the session follows."""
    with NriRuntime(tmp_path / "nri.sock") as runtime, _base() as base:
        config = f'[containers]\ndocker = ""\npodman = ""\nnri = "{runtime.path}"\n'
        daemon = start_daemon(config)
        runtime.accept()
        one = secrets.token_hex(32)
        pod = nri.Pod(name="web", namespace="team", annotations={"agentcgroup.session": "true"})
        linux = nri.LinuxContainer(cgroups_path=f"/{base.path.name}/{one}")
        about = nri.NriContainer(id=one, name="main", linux=linux)
        created = runtime.ask("CreateContainer", nri.OfContainer(pod=pod, container=about))
        (mount,) = nri.Created.FromString(created).adjust.mounts
        assert mount.source == str(daemon.run_dir / "agent")
        made = base.make_child(one)
        process = subprocess.Popen(["sleep", "1000"])
        made.attach(process.pid)
        runtime.ask("StateChange", nri.StateChange(event=6, pod=pod, container=about))
        assert placed(process) == f"/{base.path.name}/{one}/agent"

        def sessions() -> dict[str, pb.Session]:
            listed = daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions
            return {session.id: session for session in listed}

        wait_until("it is a session", lambda: "team-web-main" in sessions(), 20)
        assert sessions()["team-web-main"].container == f"nri:{one}"
        process.kill()
        process.wait()
        made.remove()
        wait_until("its session has ended", lambda: sessions() == {})
        assert max(runtime.took_s) < 0.5
