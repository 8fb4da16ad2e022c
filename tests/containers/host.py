"""All runtimes and one daemon that follows them, asked alike for containers."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.containers import pods
from tests.containers.pods import Containerd
from tests.containers.runtimes import IMAGE, Service, dockerd, podman, running
from tests.harness import DaemonProcess, wait_until

TRUE = {"agentcgroup.session": "true"}
MARK = "agentcgroup.session=true"
WAYS = ("docker", "docker, early", "podman", "podman, early", "nri", "cri")
"""Ways in which a container comes to be a session; `early`: split before its first instruction by
agentcg-runtime."""
RUNTIMES = ("docker", "podman", "nri", "cri")
SLEEP = ("sleep", "100000")
SHOW = ("sh", "-c", "cat /proc/self/cgroup; exec sleep 100000")
CGROUPS = Path("/sys/fs/cgroup")
AGENT_SOCKETS = "/run/agentcgroup/agent"


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

    def run(
        self, runtime: str, name: str, labels: Mapping[str, str], memory_bytes: int = 0
    ) -> Made:
        """Start a container of one of RUNTIMES that waits to be told what to execute."""
        sockets = self.daemon.run_dir / "agent"
        made = Made(runtime, name, name)
        if runtime in self.services:
            volumes = {str(sockets): {"bind": AGENT_SOCKETS, "mode": "rw"}}
            more = (
                {"mem_limit": memory_bytes, "memswap_limit": memory_bytes} if memory_bytes else {}
            )
            self.services[runtime].run(name, SLEEP, labels, volumes=volumes, **more)
        else:
            containerd = self.nri if runtime == "nri" else self.cri
            # NRI has the daemon mount it.
            mounts = {} if runtime == "nri" else {AGENT_SOCKETS: sockets}
            made.session = f"team-{name}-main"
            made.id, _ = containerd.run(name, SLEEP, labels, memory_bytes, mounts)
        is_session(self.daemon, made.session)
        self.paths.add(sessions(self.daemon)[made.session].cgroup_path)
        return made

    def execute(self, made: Made, *command: str, tty: bool = False) -> tuple[int | None, str]:
        """Execute a command in a container from outside; returns its exit status and what it has
        said."""
        if made.way in ("nri", "cri"):
            containerd = self._containerd(made)
            container = containerd.pods[made.id].container
            if tty:
                return containerd.execute_with_streams(container, *command, tty=True)
            return containerd.execute(container, *command)
        container = self._service(made).client.containers.get(made.name)
        done = container.exec_run(list(command), tty=tty)
        return done.exit_code, done.output.decode(errors="replace")

    def start(self, way: str, name: str) -> Made:
        """Start a container in one of WAYS, which tells where it is."""
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

    def told_of_memory(self, made: Made) -> str:
        """`OOMKilled` where a runtime says so of a container; a pod's is stopped for that, because
        nothing is said of one that runs."""
        if made.way not in ("nri", "cri"):
            state = self._service(made).client.containers.get(made.name).attrs["State"]
            return "OOMKilled" if state["OOMKilled"] else ""
        containerd = self._containerd(made)
        container = containerd.pods[made.id].container
        containerd.stub.StopContainer(containerd.pb.Id(id=container))
        reason = str(containerd.status(container).reason)
        return "OOMKilled" if reason == "OOMKilled" else ""

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
        """Whether the daemon runs, and has joined the runtime that runs now, as far as its log
        tells."""
        process = self.daemon.process
        if process is None or process.poll() is not None:
            return False
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

    def leftovers(self) -> list[str]:
        """What is left of sessions' cgroups, and in the daemon's pool."""
        found = [path for path in self.paths if (CGROUPS / path.strip("/")).exists()]
        pool = self.daemon.cgroup_dir
        return [*found, *(str(path) for path in pool.iterdir() if path.is_dir())]


def sessions(daemon: DaemonProcess) -> dict[str, pb.Session]:
    """Open sessions, by their ids."""
    listed = daemon.admin.ListSessions(pb.ListSessionsRequest(), wait_for_ready=True, timeout=60)
    return {session.id: session for session in listed.sessions}


def is_session(daemon: DaemonProcess, name: str) -> None:
    """Wait until a session is open."""
    wait_until(f"{name} is a session", lambda: name in sessions(daemon), 30, every_s=0.02)


def is_none(daemon: DaemonProcess, name: str) -> None:
    """Wait until a session has ended."""
    wait_until(f"{name} has ended", lambda: name not in sessions(daemon), 30, every_s=0.02)


@contextmanager
def all_runtimes(directory: Path) -> Iterator[Host]:
    """Docker, podman, a containerd with NRI and one without, and a daemon that follows all."""
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
        asked += [f'nri = "{nri.nri}"', f'cri = ["/proc/1/root{cri.socket}", "{nri.socket}"]']
        daemon = DaemonProcess(places["dm"], "[containers]\n" + "\n".join(asked) + "\n")
        daemon.start()
        made = Host(services, nri, cri, daemon)
        try:
            wait_until("it is a plugin", made.is_plugin, 30)
            yield made
        finally:
            daemon.close()
            print(daemon.log.read_text()[-6000:])
