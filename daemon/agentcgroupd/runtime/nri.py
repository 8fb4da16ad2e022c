"""containerd and CRI-O, by the Node Resource Interface: the daemon is a plugin of theirs.

The runtime asks before it makes a container, which gets the agents' sockets then, and before it
starts one, which is split then. It drops a plugin that answers late, and starts the container all
the same: so every answer is given in the thread that reads, whatever the daemon's loop does.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from google.protobuf.message import DecodeError, Message

from agentcgroup.v1 import nri_pb2 as nri
from agentcgroupd.config_containers import ContainerRule
from agentcgroupd.runtime.early import Splitter
from agentcgroupd.runtime.engine import Change, EngineError, Told, is_runtimes_socket
from agentcgroupd.runtime.labels import PREFIX, SHORT_ID, Container, wish_of
from agentcgroupd.runtime.place import HasEnded, NoPlace, cgroup_of_container, cgroup_of_oci_path
from agentcgroupd.runtime.ttrpc import REQUEST, RESPONSE, BrokenFrame, Frame, Mux

log = logging.getLogger(__name__)

PLUGIN, RUNTIME = 1, 2
"""Connections in the one socket: in which we are asked, and in which we ask."""
NAME, INDEX = "agentcgroup", "90"
START, POST_START, POST_UPDATE = 6, 7, 9
EVENTS = (4, START, POST_START, POST_UPDATE)
"""What we want to be asked: numbers that all versions of NRI know, 4 is CreateContainer."""
RUNS = 3
REGISTER_S = 10.0
"""How long the runtime may take to register us and to tell what runs."""
UNIMPLEMENTED, INVALID = 12, 3
SOCKETS_AT = "/run/agentcgroup/agent"
"""Where a container finds the agents' sockets."""
EVENT_OF_METHOD = {
    "StartContainer": START,
    "PostStartContainer": POST_START,
    "PostUpdateContainer": POST_UPDATE,
}
"""Newer versions have a method for what is a StateChange in older ones."""


class Nri:
    """A runtime with NRI; see `runtime.engine.Engine`."""

    name = "nri"
    waits = False

    def __init__(
        self,
        path: Path,
        rules: Sequence[ContainerRule],
        may: Sequence[str],
        sockets: Path,
        splitter: Splitter,
    ) -> None:
        """`path`: the runtime's socket; `may`: labels that annotations of pods may set; `sockets`:
        the directory of the agents' sockets, which sessions' containers get."""
        self._path, self._rules = path, rules
        self._may = frozenset(f"{PREFIX}{name}" for name in may)
        self._sockets, self._splitter = sockets, splitter
        self._sock: socket.socket | None = None
        self._mux: Mux | None = None
        self._frames: Iterator[Frame] = iter(())
        self._synchronized = False
        self._pods: dict[str, nri.Pod] = {}
        self._found: list[Container] = []
        self._told: list[Told] = []
        self._runtime = ""
        self.slowest_s = 0.0
        """The longest that an answer has taken."""

    # As an engine

    def there(self) -> bool:
        """Whether the runtime's socket is there."""
        return is_runtimes_socket(self._path)

    def connect(self) -> str:
        """Register, and have the runtime tell what runs. Raises EngineError."""
        self.close()
        self._synchronized, self._found, self._told = False, [], []
        with self._errors():
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            self._sock = sock
            sock.settimeout(REGISTER_S)
            sock.connect(str(self._path))
            self._mux = Mux(sock)
            self._frames = self._mux.frames()
            self._register(self._mux)
            while not self._synchronized:
                self._step()
            sock.settimeout(None)
        return self._runtime

    def running(self) -> Iterator[Container]:
        """What ran when we were registered."""
        yield from self._found
        self._found = []

    def events(self, since_unix_s: float) -> Iterator[Told]:
        """Answer the runtime, and tell what happens, until it hangs up. Raises EngineError."""
        with self._errors():
            while self._step():
                told, self._told = self._told, []
                yield from told

    def close(self) -> None:
        """Hang up."""
        sock, self._sock = self._sock, None
        if sock is not None:
            with suppress(OSError):  # it may never have been connected
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    # Messages

    def _register(self, mux: Mux) -> None:
        about = nri.RegisterPlugin(plugin_name=NAME, plugin_idx=INDEX)
        request = nri.TtrpcRequest(
            service="nri.pkg.api.v1alpha1.Runtime",
            method="RegisterPlugin",
            payload=about.SerializeToString(),
        )
        mux.send(Frame(RUNTIME, 1, REQUEST, request.SerializeToString()))

    def _step(self) -> bool:
        """Read a message, and answer it. Returns False where the runtime has hung up. Raises what
        `_errors` knows."""
        frame = next(self._frames, None)
        if frame is None:
            if not self._synchronized:
                raise EngineError("it has hung up before we were registered")
            return False
        if frame.connection == RUNTIME and frame.kind == RESPONSE:
            self._check_registered(frame)
        elif frame.kind == REQUEST:
            began = time.monotonic()
            answer = self._answer(nri.TtrpcRequest.FromString(frame.payload))
            assert self._mux is not None
            payload = answer.SerializeToString()
            self._mux.send(Frame(frame.connection, frame.stream, RESPONSE, payload))
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        return True

    @staticmethod
    def _check_registered(frame: Frame) -> None:
        status = nri.TtrpcResponse.FromString(frame.payload).status
        if status.code:
            raise EngineError(f"it refuses us: {status.message}"[:500])

    def _answer(self, request: nri.TtrpcRequest) -> nri.TtrpcResponse:
        methods: dict[str, Callable[[bytes], Message]] = {
            "Configure": self._configure,
            "Synchronize": self._synchronize,
            "CreateContainer": self._create,
            "StateChange": self._state_change,
        }
        method, event = methods.get(request.method), EVENT_OF_METHOD.get(request.method)
        try:
            if method is not None:
                return nri.TtrpcResponse(payload=method(request.payload).SerializeToString())
            if event is not None:
                about = nri.OfContainer.FromString(request.payload)
                self._event(event, about.pod, about.container)
                return nri.TtrpcResponse()
            if request.method == "Shutdown":
                return nri.TtrpcResponse()
        except DecodeError as error:
            status = nri.TtrpcStatus(code=INVALID, message=str(error))
            return nri.TtrpcResponse(status=status)
        unknown = nri.TtrpcStatus(code=UNIMPLEMENTED, message=f"no method {request.method[:64]!r}")
        return nri.TtrpcResponse(status=unknown)

    def _configure(self, payload: bytes) -> Message:
        about = nri.Configure.FromString(payload)
        self._runtime = f"{about.runtime_name} {about.runtime_version}".strip()
        return nri.Configured(events=sum(1 << (event - 1) for event in EVENTS))

    def _synchronize(self, payload: bytes) -> Message:
        about = nri.Synchronize.FromString(payload)
        self._pods |= {pod.id: pod for pod in about.pods}
        for each in about.containers:
            if each.state == RUNS:
                pod = self._pods.get(each.pod_sandbox_id, nri.Pod())
                container = self._container(pod, each)
                if wish_of(container, self._rules) is not None:
                    self._found.append(container)
        if not about.more:
            self._synchronized, self._pods = True, {}
        return nri.Synchronized(more=about.more)

    def _create(self, payload: bytes) -> Message:
        """Give a session's container the agents' sockets."""
        about = nri.OfContainer.FromString(payload)
        if wish_of(self._container(about.pod, about.container), self._rules) is None:
            return nri.Created()
        # Read-only: a socket can be connected to all the same, and nothing be put beside it.
        sockets = nri.Mount(
            destination=SOCKETS_AT,
            type="bind",
            source=str(self._sockets),
            options=["rbind", "ro", "nosuid", "nodev", "noexec"],
        )
        where = nri.KeyValue(key="AGENTCG_RUN_DIR", value=str(Path(SOCKETS_AT).parent))
        return nri.Created(adjust=nri.Adjustment(mounts=[sockets], env=[where]))

    def _state_change(self, payload: bytes) -> Message:
        about = nri.StateChange.FromString(payload)
        self._event(about.event, about.pod, about.container)
        return nri.TtrpcResponse()  # empty, as NRI's own is

    def _event(self, event: int, pod: nri.Pod, about: nri.NriContainer) -> None:
        container = self._container(pod, about)
        if event not in EVENTS or wish_of(container, self._rules) is None:
            return
        if event == START:
            self._split(container)
        change = Change.CHANGED if event == POST_UPDATE else Change.RUNS
        self._told.append(Told(change, container))

    def _split(self, container: Container) -> None:
        try:
            why = self._splitter.split(cgroup_of_container(container))
        except HasEnded:
            why = "it has no process"
        except NoPlace as error:
            why = str(error)
        if why:
            log.warning(
                "container %s (%s) is not split before it starts: %s",
                container.id[:SHORT_ID],
                container.name[:200],
                why,
            )

    def _container(self, pod: nri.Pod, about: nri.NriContainer) -> Container:
        """A container as the daemon knows them: annotations of its pod, then its own, as far as
        they may set something."""
        given = {**pod.annotations, **about.annotations}
        labels = {name: value for name, value in given.items() if name in self._may}
        name = "/".join(part for part in (pod.namespace, pod.name, about.name) if part)
        cgroup = "" if about.pid else cgroup_of_oci_path(about.linux.cgroups_path)
        return Container(self.name, about.id, name, "", about.pid, labels, cgroup)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the socket and its messages raise into EngineError."""
        try:
            yield
        except (OSError, BrokenFrame, DecodeError) as error:
            raise EngineError(f"{type(error).__name__}: {error}"[:500]) from error
