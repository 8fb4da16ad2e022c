"""containerd, asked as a kubelet asks it, and pods of one container."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from tests.containers.runtimes import IMAGE, STORE, WITH_SYSTEMD, image
from tests.containers.streams import follow
from tests.harness import PATIENCE, wait_until

IS_OLD = (
    shutil.which("containerd") is not None
    and " 1."
    in subprocess.run(
        ["containerd", "--version"], capture_output=True, text=True, check=False
    ).stdout
)
"""Whether it is containerd 1."""
PAUSE = "localhost/pause:1"
POD_IMAGE = f"localhost/{IMAGE}"
ANSWER_S = 60 * PATIENCE


def load_cri(directory: Path) -> tuple[ModuleType, ModuleType]:
    """Compile cri.proto, and return its messages and its stubs."""
    source = Path(__file__).with_name("cri.proto")
    outputs = [f"--{kind}_out={directory}" for kind in ("python", "grpc_python")]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source.parent}", *outputs]
    subprocess.run([*protoc, str(source)], check=True)
    sys.path.insert(0, str(directory))
    return import_module("cri_pb2"), import_module("cri_pb2_grpc")


def oci_archive(name: str, rootfs: bytes, entry: Sequence[str]) -> bytes:
    """An image with one layer, in the form that `ctr images import` reads."""
    blobs: dict[str, bytes] = {}

    def add(kind: str, data: bytes) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        blobs[digest] = data
        media = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media, "digest": digest, "size": len(data)}

    layer = add("layer.v1.tar", rootfs)
    about = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": list(entry), "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }
    config = add("config.v1+json", json.dumps(about).encode())
    form = {"schemaVersion": 2, "config": config, "layers": [layer]}
    form["mediaType"] = "application/vnd.oci.image.manifest.v1+json"
    manifest = add("manifest.v1+json", json.dumps(form).encode())
    manifest["annotations"] = {"io.containerd.image.name": name}
    manifest["platform"] = {"architecture": "amd64", "os": "linux"}
    files = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode(),
        **{f"blobs/{digest.replace(':', '/')}": data for digest, data in blobs.items()},
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, data in files.items():
            entry_of = tarfile.TarInfo(path)
            entry_of.size = len(data)
            tar.addfile(entry_of, io.BytesIO(data))
    return buffer.getvalue()


@dataclass
class Pod:
    """A pod with one container, as it was asked for."""

    id: str
    container: str
    config: Any
    command: tuple[str, ...]
    memory_bytes: int
    mounts: Mapping[str, Path]
    log_name: str
    attempt: int = 0


class Containerd:
    """A containerd, and pods in it."""

    def __init__(self, directory: Path, *, with_nri: bool = True) -> None:
        self.directory = directory
        self.socket, self.nri = directory / "containerd.sock", directory / "nri.sock"
        self.log = directory / "containerd.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.pb, grpc_module = load_cri(directory)
        self._stub_type = grpc_module.RuntimeServiceStub
        self._count = 0
        self.with_nri = with_nri
        self.pods: dict[str, Pod] = {}
        self._config = directory / "containerd.toml"
        self._config.write_text(self._settings())

    def _settings(self) -> str:
        """The configuration, which has other tables in containerd 1."""
        whole = (
            f"root = '{STORE}/containerd/{self.directory.name}'\n"
            f"state = '{self.directory}/state'\n"
            f"[grpc]\naddress = '{self.socket}'\n"
            f"[ttrpc]\naddress = '{self.socket}.ttrpc'\n"
            f"[plugins.'io.containerd.nri.v1.nri']\ndisable = {str(not self.with_nri).lower()}\n"
            f"socket_path = '{self.nri}'\n"
            # 5 s and 2 s by themselves: a machine with other work to do needs longer.
            f"plugin_registration_timeout = '60s'\nplugin_request_timeout = '60s'\n"
        )
        if IS_OLD:
            cri = "plugins.'io.containerd.grpc.v1.cri'"
            whole = (
                f"version = 2\n{whole}[{cri}]\nsandbox_image = '{PAUSE}'\n"
                f"[{cri}.containerd]\nsnapshotter = 'native'\n"
            )
        else:
            tables = (f"plugins.'io.containerd.cri.v1.{part}'" for part in ("runtime", "images"))
            cri, images = tables
            whole = (
                f"version = 3\n{whole}[{images}]\nsnapshotter = 'native'\n"
                f"[{images}.pinned_images]\nsandbox = '{PAUSE}'\n"
                f"[{cri}]\nignore_deprecation_warnings = []\n"
            )
        runc = f"{cri}.containerd.runtimes.runc"
        return (
            f"{whole}[{runc}]\nruntime_type = 'io.containerd.runc.v2'\nsnapshotter = 'native'\n"
            f"[{runc}.options]\nSystemdCgroup = {str(WITH_SYSTEMD).lower()}\n"
        )

    def start(self) -> None:
        """Start it, and wait until it answers."""
        argv = ["containerd", "--config", str(self._config)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        channel = grpc.insecure_channel(f"unix:{self.socket}")
        self.stub = self._stub_type(channel)
        wait_until("containerd answers", self._answers, 60, every_s=0.1)

    def _answers(self) -> bool:
        try:
            self.stub.Version(self.pb.Empty(), timeout=ANSWER_S)
        except grpc.RpcError:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            return False
        return True

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; its containers go on."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(ANSWER_S)
            self.process = None

    def load_images(self) -> None:
        """Bring in the image of our pods, and the one that keeps a pod's namespaces."""
        for name, entry in ((PAUSE, ("/bin/sleep", "1000000")), (POD_IMAGE, ("/bin/sh",))):
            path = self.directory / "image.tar"
            path.write_bytes(oci_archive(name, image(), entry))
            address = ("ctr", f"--address={self.socket}", "-n", "k8s.io")
            options = ("--snapshotter=native", *(() if IS_OLD else ("--local",)))
            argv = [*address, "images", "import", *options, str(path)]
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)

    def run(
        self,
        name: str,
        command: Sequence[str],
        annotations: Mapping[str, str],
        memory_bytes: int = 0,
        mounts: Mapping[str, Path] | None = None,
    ) -> tuple[str, str]:
        """Start a pod with one container; returns the ids of both. `mounts`: directories, by their
        place in the container."""
        pod = self._pod(name, command, annotations, memory_bytes, mounts)
        self._start(pod)
        return pod.id, pod.container

    def _pod(
        self,
        name: str,
        command: Sequence[str],
        annotations: Mapping[str, str],
        memory_bytes: int = 0,
        mounts: Mapping[str, Path] | None = None,
    ) -> Pod:
        """Make a pod without a container."""
        pb = self.pb
        self._count += 1
        parent = "agentcg-test-pods.slice" if WITH_SYSTEMD else "/agentcg-test-pods"
        config = pb.PodConfig(
            metadata=pb.PodMetadata(name=name, uid=f"u{self._count}", namespace="team"),
            log_directory=str(self.directory),
            annotations=dict(annotations),
            linux=pb.PodLinux(
                cgroup_parent=parent, security=pb.PodSecurity(namespaces=self._namespaces)
            ),
        )
        ask = pb.RunPodSandboxRequest(config=config)
        pod_id = self.stub.RunPodSandbox(ask, timeout=ANSWER_S).id
        log_name = f"{name}-{self._count}.log"
        pod = Pod(pod_id, "", config, tuple(command), memory_bytes, mounts or {}, log_name)
        self.pods[pod_id] = pod
        return pod

    def timed(self, name: str, command: Sequence[str], annotations: Mapping[str, str]) -> float:
        """Start a pod with one container; returns the seconds that the container took."""
        pod = self._pod(name, command, annotations)
        began = time.perf_counter()
        self._start(pod)
        return time.perf_counter() - began

    @property
    def _namespaces(self) -> Any:
        return self.pb.Namespaces(network=2, pid=1)

    def _start(self, pod: Pod) -> None:
        """Make the container of a pod, and start it."""
        pb = self.pb
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="main", attempt=pod.attempt),
            image=pb.Image(image=POD_IMAGE),
            command=list(pod.command),
            mounts=[
                pb.Mount(container_path=to, host_path=str(path)) for to, path in pod.mounts.items()
            ],
            log_path=pod.log_name,
            linux=pb.ContainerLinux(
                resources=pb.Resources(memory_limit=pod.memory_bytes),
                security=pb.ContainerSecurity(namespaces=self._namespaces),
            ),
        )
        create = pb.CreateContainerRequest(pod=pod.id, config=config, sandbox=pod.config)
        pod.container = self.stub.CreateContainer(create, timeout=ANSWER_S).id
        self.stub.StartContainer(pb.Id(id=pod.container), timeout=ANSWER_S)

    def restart(self, pod_id: str) -> None:
        """End a pod's container, and start another one in its place, as a kubelet does."""
        pod = self.pods[pod_id]
        self.stub.StopContainer(self.pb.Id(id=pod.container), timeout=ANSWER_S)
        self.stub.RemoveContainer(self.pb.Id(id=pod.container), timeout=ANSWER_S)
        pod.attempt += 1
        self._start(pod)

    def status(self, container: str) -> Any:
        """What is told of a container."""
        return self.stub.ContainerStatus(self.pb.Id(id=container), timeout=ANSWER_S).status

    def runs(self, container: str) -> bool:
        """Whether a container runs."""
        return bool(self.status(container).state == 1)

    def said(self, name: str) -> str:
        """What the containers of the pods of a name have written."""
        return "".join(path.read_text() for path in self.directory.glob(f"{name}-*.log"))

    def execute(self, container: str, *command: str) -> tuple[int, str]:
        """Execute a command; returns its exit status and what it has said."""
        request = self.pb.ExecRequest(id=container, command=command, timeout=int(ANSWER_S))
        done = self.stub.ExecSync(request, timeout=ANSWER_S)
        return done.exit_code, (done.stdout + done.stderr).decode(errors="replace")

    def execute_with_streams(
        self, container: str, *command: str, tty: bool
    ) -> tuple[int | None, str]:
        """Execute a command over a connection of its own, as `kubectl exec` does; returns its exit
        status, None where it is not told, and what it has said."""
        request = self.pb.ExecStreamsRequest(
            id=container, command=command, tty=tty, stdout=True, stderr=not tty
        )
        url = self.stub.Exec(request, timeout=ANSWER_S).url
        return follow(url)

    def remove(self, pod_id: str) -> None:
        """End a pod and remove it."""
        self.pods.pop(pod_id, None)
        self.stub.StopPodSandbox(self.pb.Id(id=pod_id), timeout=ANSWER_S)
        self.stub.RemovePodSandbox(self.pb.Id(id=pod_id), timeout=ANSWER_S)


@contextmanager
def running(directory: Path, *, with_nri: bool = True) -> Iterator[Containerd]:
    """A containerd with our images."""
    made = Containerd(directory, with_nri=with_nri)
    made.start()
    try:
        made.load_images()
        if with_nri:
            wait_until("NRI listens", made.nri.exists, 20)
        yield made
    finally:
        made.stop()
        print(made.log.read_text()[-6000:])
