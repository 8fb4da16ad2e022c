"""containerd, asked as a kubelet asks it, and pods of one container."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import grpc

from tests.containers.runtimes import IMAGE, STORE, WITH_SYSTEMD, image
from tests.harness import PATIENCE, wait_until

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


class Containerd:
    """A containerd with NRI, and pods in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket, self.nri = directory / "containerd.sock", directory / "nri.sock"
        self.log = directory / "containerd.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.pb, grpc_module = load_cri(directory)
        self._stub_type = grpc_module.RuntimeServiceStub
        self._count = 0
        runc = "plugins.'io.containerd.cri.v1.runtime'"
        self._config = directory / "containerd.toml"
        self._config.write_text(
            f"version = 3\nroot = '{STORE}/containerd'\nstate = '{directory}/state'\n"
            f"[grpc]\naddress = '{self.socket}'\n"
            f"[plugins.'io.containerd.nri.v1.nri']\ndisable = false\nsocket_path = '{self.nri}'\n"
            "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'native'\n"
            f"[plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = '{PAUSE}'\n"
            f"[{runc}]\nignore_deprecation_warnings = []\n"
            f"[{runc}.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n"
            f"snapshotter = 'native'\n"
            f"[{runc}.containerd.runtimes.runc.options]\n"
            f"SystemdCgroup = {str(WITH_SYSTEMD).lower()}\n"
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
            options = ("--snapshotter=native", "--local")
            argv = [*address, "images", "import", *options, str(path)]
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)

    def run(
        self,
        name: str,
        command: Sequence[str],
        annotations: Mapping[str, str],
        memory_bytes: int = 0,
    ) -> tuple[str, str]:
        """Start a pod with one container; returns the ids of both."""
        pb = self.pb
        self._count += 1
        network = pb.Namespaces(network=2, pid=1)
        parent = "agentcg-test-pods.slice" if WITH_SYSTEMD else "/agentcg-test-pods"
        pod = pb.PodConfig(
            metadata=pb.PodMetadata(name=name, uid=f"u{self._count}", namespace="team"),
            log_directory=str(self.directory),
            annotations=dict(annotations),
            linux=pb.PodLinux(cgroup_parent=parent, security=pb.PodSecurity(namespaces=network)),
        )
        ask = pb.RunPodSandboxRequest(config=pod)
        pod_id = self.stub.RunPodSandbox(ask, timeout=ANSWER_S).id
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="main"),
            image=pb.Image(image=POD_IMAGE),
            command=list(command),
            log_path=f"{name}-{self._count}.log",
            linux=pb.ContainerLinux(
                resources=pb.Resources(memory_limit=memory_bytes),
                security=pb.ContainerSecurity(namespaces=network),
            ),
        )
        create = pb.CreateContainerRequest(pod=pod_id, config=config, sandbox=pod)
        container = self.stub.CreateContainer(create, timeout=ANSWER_S).id
        self.stub.StartContainer(pb.Id(id=container), timeout=ANSWER_S)
        return pod_id, container

    def said(self, name: str) -> str:
        """What the containers of the pods of a name have written."""
        return "".join(path.read_text() for path in self.directory.glob(f"{name}-*.log"))

    def execute(self, container: str, *command: str) -> tuple[int, str]:
        """Execute a command; returns its exit status and what it has said."""
        request = self.pb.ExecRequest(id=container, command=command, timeout=int(ANSWER_S))
        done = self.stub.ExecSync(request, timeout=ANSWER_S)
        return done.exit_code, (done.stdout + done.stderr).decode(errors="replace")

    def remove(self, pod_id: str) -> None:
        """End a pod and remove it."""
        self.stub.StopPodSandbox(self.pb.Id(id=pod_id), timeout=ANSWER_S)
        self.stub.RemovePodSandbox(self.pb.Id(id=pod_id), timeout=ANSWER_S)


@contextmanager
def running(directory: Path) -> Iterator[Containerd]:
    """A containerd with our images."""
    made = Containerd(directory)
    made.start()
    try:
        made.load_images()
        wait_until("NRI listens", made.nri.exists, 20)
        yield made
    finally:
        made.stop()
        print(made.log.read_text()[-6000:])
