"""Docker and podman, started for a test, and containers of them."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import docker
import docker.errors

from agentcgroup.cli import install_docker
from tests.harness import EXEC, PATIENCE, ROOT, SLOW, wait_until

BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "sleep", "cat", "echo", "true", "dd", "tail", "kill", "grep")
IMAGE = "agentcg-test:1"
STORE = Path("/var/lib")
WRAPPER = Path(EXEC).with_name("agentcg-runtime")
WITH_SYSTEMD = Path("/run/systemd/system").is_dir()
PAGE = ROOT / "docs/containers.md"


def documented(kind: str) -> list[str]:
    """Examples of docs/containers.md in a language."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def image() -> bytes:
    """A tar with busybox and the launcher."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for directory in ("bin", "tmp", "run"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for source, name in ((BUSYBOX, "bin/busybox"), (Path(EXEC), "bin/agentcg-exec")):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = source.stat().st_size, 0o755
            with source.open("rb") as file:
                tar.addfile(entry, file)
        for applet in APPLETS:
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    return buffer.getvalue()


@dataclass
class Beside:
    """A program that a runtime needs, and that lives on when the runtime is ended."""

    argv: tuple[str, ...]
    socket: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self, log: IO[bytes]) -> None:
        """Start it unless it runs, and wait until it listens."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            wait_until(f"{self.argv[0]} listens", self.socket.exists, 60, every_s=0.1)

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60 * PATIENCE)
            self.process = None


@dataclass
class Service:
    """A runtime's daemon."""

    name: str
    argv: tuple[str, ...]
    socket: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    made: list[str] = field(default_factory=list)
    beside: Beside | None = None

    @property
    def client(self) -> docker.DockerClient:
        """A client of its API."""
        return docker.DockerClient(base_url=f"unix://{self.socket}", timeout=60 * int(PATIENCE))

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self.log.open("ab") as log:
            if self.beside is not None:
                self.beside.start(log)
            self.process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(f"{self.name} answers", self._answers, 60, every_s=0.1)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            return bool(self.client.ping())
        except (docker.errors.DockerException, OSError):
            return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; its containers go on."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(60 * PATIENCE)
            self.process = None

    def run(self, name: str, command: Sequence[str], labels: Mapping[str, str], **more: Any) -> Any:
        """Start a container in the background."""
        container = self.client.containers.run(
            IMAGE,
            list(command),
            name=name,
            labels=dict(labels),
            detach=True,
            network_mode="none",
            stop_signal="SIGKILL",
            **more,
        )
        self.made.append(name)
        return container

    def remove(self, name: str) -> None:
        """End a container and remove it."""
        with suppress(docker.errors.NotFound):
            self.client.containers.get(name).remove(force=True)
        if name in self.made:
            self.made.remove(name)

    def close(self) -> None:
        """Remove all containers, and end it."""
        if self.process is None:
            self.start()
        for name in list(self.made):
            self.remove(name)
        self.stop()
        if self.beside is not None:
            self.beside.stop()


def dockerd(directory: Path, *options: str) -> Service:
    """Docker, whose containers live on when it is killed."""
    driver = "systemd" if WITH_SYSTEMD else "cgroupfs"
    socket = directory / "docker.sock"
    argv = (
        *("dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--live-restore"),
        *("--storage-driver=vfs", f"--exec-opt=native.cgroupdriver={driver}"),
        *(f"--host=unix://{socket}", f"--data-root={STORE}/docker", *options),
    )
    # As `agentcg install --docker` does; Docker reads what it would be.
    install_docker.apply(install_docker.adding(Path("/"), WRAPPER), check=True)
    made = Service("docker", argv, socket, directory / "docker.log")
    if SLOW > 1:  # Docker gives one that it starts itself 15 s
        made.beside = _containerd(directory)
        made.argv = (*argv, f"--containerd={made.beside.socket}")
    return made


def _containerd(directory: Path) -> Beside:
    """A containerd for Docker alone."""
    socket, config = directory / "containerd.sock", directory / "containerd.toml"
    config.write_text(
        f"version = 2\nroot = '{STORE}/docker/containerd-of-it'\nstate = '{directory}/state'\n"
        f"disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.images', "
        f"'io.containerd.cri.v1.runtime', 'io.containerd.nri.v1.nri']\n"
        f"[grpc]\naddress = '{socket}'\n[ttrpc]\naddress = '{socket}.ttrpc'\n"
    )
    return Beside(("containerd", "--config", str(config)), socket)


def podman(directory: Path) -> Service:
    """podman's API."""
    manager = "systemd" if WITH_SYSTEMD else "cgroupfs"
    socket = directory / "podman.sock"
    argv = (
        *("podman", f"--cgroup-manager={manager}", "--storage-driver=vfs"),
        f"--hooks-dir={_hooks(directory)}",
        *("system", "service", "--time=0", f"unix://{socket}"),
    )
    return Service("podman", argv, socket, directory / "podman.log")


def _hooks(directory: Path) -> Path:
    """A directory with our hook for podman, which is the one of docs/containers.md."""
    hooks = directory / "hooks"
    hooks.mkdir()
    (hook,) = (one for one in documented("json") if '"hook"' in one)
    hook = hook.replace("/opt/agentcgroup/bin/agentcg-runtime", str(WRAPPER))
    (hooks / "agentcgroup.json").write_text(hook)
    return hooks


@contextmanager
def running(service: Service) -> Iterator[Service]:
    """A runtime with our image; its containers are removed at the end."""
    service.start()
    try:
        _import(service)
        yield service
    finally:
        service.close()
        print(service.log.read_text()[-4000:])


def _import(service: Service) -> None:
    repository, _, tag = IMAGE.partition(":")
    if service.name == "podman":
        path = service.log.with_name("image.tar")
        path.write_bytes(image())
        argv = [*service.argv[:4], "import", "--quiet", str(path), IMAGE]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        return
    service.client.api.import_image_from_data(image(), repository=repository, tag=tag)


def prepare_guest() -> None:
    """Put what runtimes store into memory, because an overlay cannot lie on another one; and give
    all controllers on at the root, as systemd does: user-mode Linux refuses that for the CPU once
    a runtime has made cgroups."""
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+cpu +io +memory +pids")
    for name in ("docker", "containers", "containerd"):
        where = STORE / name
        where.mkdir(parents=True, exist_ok=True)
        if not os.path.ismount(where):
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(where)], check=True)


def since(started: float) -> str:
    """Seconds since a time, for what a test prints."""
    return f"{time.monotonic() - started:.2f} s"
