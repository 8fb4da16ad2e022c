"""Containers of all runtimes at once, mixed with restarts of everything: each becomes a session,
none fails because of that, and nothing is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.containers import pods
from tests.containers.pods import Containerd
from tests.containers.runtimes import IMAGE, Service, dockerd, podman, running, since
from tests.containers.test_engines import is_none, is_session, sessions
from tests.harness import DaemonProcess, wait_until

STARTS = int(os.environ.get("AGENTCG_STARTS") or 12)
SEED = int(os.environ.get("AGENTCG_STARTS_SEED") or 1)
LIVE_MOST = 5
TRUE = {"agentcgroup.session": "true"}
MARK = "agentcgroup.session=true"
SHOW = ("sh", "-c", "cat /proc/self/cgroup; exec sleep 100000")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass
class Made:
    """A container."""

    way: str
    name: str
    session: str
    id: str = ""
    early: bool = False
    """Whether its first instruction has to be in the agent leaf."""


class Host:
    """All runtimes and a daemon."""

    def __init__(
        self,
        services: dict[str, Service],
        with_nri: Containerd,
        without: Containerd,
        daemon: DaemonProcess,
    ) -> None:
        self.services, self.nri, self.cri, self.daemon = services, with_nri, without, daemon
        self.paths = set[str]()
        """Where the cgroups of sessions were."""
        self.said: dict[str, str] = {}

    def start(self, way: str, name: str) -> Made:
        """Start a container in one of WAYS."""
        made = Made(way, name, name, early="early" in way)
        match way:
            case "docker" | "podman":
                self.services[way].run(name, SHOW, TRUE)
            case "docker, early":
                self.services["docker"].run(name, SHOW, TRUE, runtime="agentcg")
            case "podman, early":
                self._podman(name)
            case "nri" | "cri":
                containerd = self.nri if way == "nri" else self.cri
                made.early = way == "nri" and self.is_plugin()
                made.session = f"team-{name}-main"
                made.id, _ = containerd.run(name, SHOW, TRUE)
        return made

    def _podman(self, name: str) -> None:
        service = self.services["podman"]
        options = ("--detach", f"--name={name}", "--network=none", "--stop-signal=SIGKILL")
        marks = (f"--label={MARK}", f"--annotation={MARK}")
        argv = [*service.argv[:4], "run", *options, *marks, IMAGE, *SHOW]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        service.made.append(name)

    def _service(self, made: Made) -> Service:
        return self.services[made.way.partition(",")[0]]

    def _containerd(self, made: Made) -> Containerd:
        return self.nri if made.way == "nri" else self.cri

    def restart(self, made: Made) -> None:
        """End what a container runs, and start it again."""
        before = sessions(self.daemon)[made.session].cgroup_id
        if made.way in ("nri", "cri"):
            made.early = made.way == "nri" and self.is_plugin()
            self._containerd(made).restart(made.id)
        else:
            self._service(made).client.containers.get(made.name).restart(timeout=0)
        wait_until(
            f"{made.name} is a session again",
            lambda: self._cgroup_id(made) not in (0, before),
            60,
            every_s=0.05,
        )

    def _cgroup_id(self, made: Made) -> int:
        session = sessions(self.daemon).get(made.session)
        return 0 if session is None else session.cgroup_id

    def runs(self, made: Made) -> bool:
        """Whether a container has not ended."""
        if made.way in ("nri", "cri"):
            containerd = self._containerd(made)
            return containerd.runs(containerd.pods[made.id].container)
        container = self._service(made).client.containers.get(made.name)
        return bool(container.status == "running")

    def check(self, made: Made) -> str:
        """Check that a container is a session and runs. Returns where it has begun, at its last
        start."""
        is_session(self.daemon, made.session)
        session = sessions(self.daemon)[made.session]
        self.paths.add(session.cgroup_path)
        assert self.runs(made), made
        leaf = CGROUPS / session.cgroup_path.strip("/") / "agent"
        assert (leaf / "cgroup.procs").read_text().split(), f"{made}: nothing in {leaf}"
        if made.way in ("nri", "cri"):
            text = self._containerd(made).said(made.name)
        else:
            container = self._service(made).client.containers.get(made.name)
            wait_until("it has spoken", lambda: b"0::" in container.logs(), 30, every_s=0.05)
            text = container.logs().decode()
        return [line for line in text.split("\n") if "0::" in line][-1].rpartition("0::")[2]

    def remove(self, made: Made) -> None:
        """End a container."""
        if made.way in ("nri", "cri"):
            self._containerd(made).remove(made.id)
        else:
            self._service(made).remove(made.name)
        is_none(self.daemon, made.session)

    def is_plugin(self) -> bool:
        """Whether the daemon has joined the runtime that runs now, as far as its log tells."""
        text = self.daemon.log.read_text()
        return text.rfind("nri containerd") > max(text.rfind("nri: "), text.rfind("is enforced"))

    # Restarts

    def disturb(self, what: str) -> None:
        """Have something begin anew."""
        name, _, how = what.partition(" ")
        number = signal.SIGKILL if how == "killed" else signal.SIGTERM
        if name == "daemon":
            self.daemon.kill() if how == "killed" else self.daemon.stop()
            self.daemon.start()
        elif name in self.services:
            self.services[name].stop(number)
            self.services[name].start()
        else:
            containerd = self.nri if name == "nri" else self.cri
            containerd.stop(number)
            containerd.start()
        if name in ("daemon", "nri"):
            wait_until("it is a plugin again", self.is_plugin, 60, every_s=0.1)


WAYS = ("docker", "docker, early", "podman", "podman, early", "nri", "cri")
ENDS = ("killed", "ended")
RESTARTED = ("daemon", "docker", "podman", "nri", "cri")


@pytest.fixture(scope="module")
def host(directory: Path) -> Iterator[Host]:
    """All that runs."""
    places = {name: directory / name for name in ("e", "kn", "kc", "dm")}
    for path in places.values():
        path.mkdir()
    with ExitStack() as stack:
        services = {
            "docker": stack.enter_context(running(dockerd(places["e"]))),
            "podman": stack.enter_context(running(podman(places["e"]))),
        }
        nri = stack.enter_context(pods.running(places["kn"]))
        cri = stack.enter_context(pods.running(places["kc"], with_nri=False))
        asked = [f'{name} = "{each.socket}"' for name, each in services.items()]
        asked += [f'nri = "{nri.nri}"', f'cri = ["{cri.socket}"]']
        daemon = DaemonProcess(places["dm"], "[containers]\n" + "\n".join(asked) + "\n")
        daemon.start()
        made = Host(services, nri, cri, daemon)
        wait_until("it is a plugin", made.is_plugin, 30)
        yield made
        daemon.close()
        print(daemon.log.read_text()[-6000:])


@pytest.mark.timeout(6000)
def test_starts_of_all_runtimes_mixed_with_restarts_of_all(host: Host) -> None:
    draw = random.Random(SEED)
    started, live = time.monotonic(), list[Made]()
    starts, restarts, early = Counter[str](), Counter[str](), Counter[str]()

    def leave(made: Made) -> None:
        where = host.check(made)
        if made.early:
            early[f"{made.way} {where}"] += 1
        host.remove(made)

    for number in range(STARTS):
        way = WAYS[number % len(WAYS)]
        if draw.random() < 0.12:
            what = f"{draw.choice(RESTARTED)} {draw.choice(ENDS)}"
            restarts[what] += 1
            host.disturb(what)
        away = draw.random() < 0.06
        if away:  # the container starts while nobody is there
            host.daemon.kill()
        made = host.start(way, f"m{number}")
        starts[way] += 1
        if away:
            restarts["container started without a daemon"] += 1
            host.daemon.start()
        live.append(made)
        if draw.random() < 0.15:
            again = draw.choice(live)
            is_session(host.daemon, again.session)
            host.restart(again)
            restarts[f"container of {again.way}"] += 1
        if len(live) > LIVE_MOST:
            leave(live.pop(draw.randrange(len(live))))
    for made in live:
        leave(made)
    wait_until("no cgroup is left", lambda: not host_leftovers(host), 30)
    entries = [json.loads(line) for line in host.daemon.audit_lines()]
    said = f"{STARTS} starts in {since(started)}: {dict(starts)}; restarts {dict(restarts)}; "
    print(f"{said}first instruction {dict(early)}; {len(host.paths)} cgroups")
    assert [entry for entry in entries if entry["event"] == "container_refused"] == []
    assert {line.rpartition(" ")[2] for line in early} == {"/agent"}
    assert sessions(host.daemon) == {}


def host_leftovers(host: Host) -> list[str]:
    """What is left of sessions' cgroups, and in the daemon's pool."""
    found = [path for path in host.paths if (CGROUPS / path.strip("/")).exists()]
    return [*found, *(str(path) for path in host.daemon.cgroup_dir.iterdir() if path.is_dir())]
