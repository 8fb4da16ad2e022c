"""The runtime's side of the Container Runtime Interface, for tests: a real gRPC server on a socket,
with as much of the interface as a follower of containers asks for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import Any

import grpc

from agentcgroup.v1 import cri_pb2 as cri
from agentcgroupd.runtime.cri import SERVICE, STARTED


class CriRuntime:
    """A server, and the containers that it tells of."""

    def __init__(self, path: Path, version: str = "v2.1.9", name: str = "containerd") -> None:
        self.path, self.version, self.name = path, version, name
        self.pods: dict[str, cri.CriPod] = {}
        self.containers: dict[str, tuple[cri.CriContainer, int]] = {}
        """A container, and the number of its first process, by its id."""
        self.asked: list[str] = []
        self.implements = True
        self._streams: list[Queue[cri.ContainerEvent | None]] = []
        self._server: grpc.Server | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> CriRuntime:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen."""
        self.path.unlink(missing_ok=True)
        server = grpc.server(ThreadPoolExecutor(8))
        one = grpc.unary_unary_rpc_method_handler
        handlers = {
            name: one(self._asked(name, answer), request.FromString, _bytes)
            for name, answer, request in (
                ("Version", self._version, cri.VersionRequest),
                ("ListContainers", self._list, cri.ListContainersRequest),
                ("ListPodSandbox", self._list_pods, cri.ListPodsRequest),
                ("ContainerStatus", self._status, cri.StatusRequest),
            )
        }
        handlers["GetContainerEvents"] = grpc.unary_stream_rpc_method_handler(
            self._asked("GetContainerEvents", self._events), cri.EventsRequest.FromString, _bytes
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_insecure_port(f"unix:{self.path}")
        server.start()
        self._server = server

    def stop(self) -> None:
        """End, and take the socket away."""
        with self._lock:
            for stream in self._streams:
                stream.put(None)
        if self._server is not None:
            self._server.stop(0).wait(10)
        self.path.unlink(missing_ok=True)

    @property
    def followers(self) -> int:
        """How many clients wait for events."""
        return len(self._streams)

    def run(
        self, container: cri.CriContainer, pod: cri.CriPod, pid: int, *, told: bool = True
    ) -> None:
        """Have a container run. `told`: with an event."""
        self.pods[pod.id] = pod
        self.containers[container.id] = (container, pid)
        if told:
            self.tell(container.id)

    def tell(self, container_id: str, kind: int = STARTED) -> None:
        """Send an event to all who wait for some."""
        event = cri.ContainerEvent(container_id=container_id, container_event_type=kind)
        with self._lock:
            for stream in self._streams:
                stream.put(event)

    def _asked(self, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def noting(request: Any, context: grpc.ServicerContext) -> Any:
            self.asked.append(name)
            if not self.implements:
                context.abort(grpc.StatusCode.UNIMPLEMENTED, f"unknown service {SERVICE}")
            return answer(request, context)

        return noting

    def _version(self, request: cri.VersionRequest, context: object) -> cri.Version:
        return cri.Version(runtime_name=self.name, runtime_version=self.version)

    def _list(self, request: cri.ListContainersRequest, context: object) -> cri.ListContainers:
        assert request.filter.state.state == 1
        found = [each for each, _ in self.containers.values()]
        wanted = request.filter.id
        return cri.ListContainers(containers=[e for e in found if wanted in ("", e.id)])

    def _list_pods(self, request: cri.ListPodsRequest, context: object) -> cri.ListPods:
        wanted = request.filter.id
        return cri.ListPods(items=[e for e in self.pods.values() if wanted in ("", e.id)])

    def _status(self, request: cri.StatusRequest, context: grpc.ServicerContext) -> cri.Status:
        if request.container_id not in self.containers:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such container")
        assert request.verbose
        _, pid = self.containers[request.container_id]
        return cri.Status(info={"info": json.dumps({"sandboxID": "p", "pid": pid})})

    def _events(
        self, request: cri.EventsRequest, context: grpc.ServicerContext
    ) -> Iterator[cri.ContainerEvent]:
        stream: Queue[cri.ContainerEvent | None] = Queue()
        if not context.add_callback(lambda: stream.put(None)):
            return  # it has ended already, and nobody would ever say so
        with self._lock:
            self._streams.append(stream)
        while (event := stream.get()) is not None:
            yield event
        with self._lock:
            self._streams.remove(stream)


def _bytes(message: Any) -> bytes:
    return bytes(message.SerializeToString())
