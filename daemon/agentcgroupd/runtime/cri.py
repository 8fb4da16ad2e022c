"""containerd and CRI-O, by the Container Runtime Interface: what a kubelet asks them.

Where the runtime has no NRI, or NRI has told nothing of a container, its pod is a session all the
same, a moment after the start. The runtime is asked for a list again and again; where every client
gets all events, they are followed as well, so that the list need not be asked for so often.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from agentcgroup.v1 import cri_pb2 as cri
from agentcgroupd.config_containers import ContainerRule
from agentcgroupd.runtime.engine import Change, EngineError, Told, is_runtimes_socket
from agentcgroupd.runtime.labels import PREFIX, Container, wish_of

log = logging.getLogger(__name__)

SERVICE = "runtime.v1.RuntimeService"
ANSWER_S = 10.0
LIST_EVERY_S = 5.0
"""How often the list is asked for where events are followed: those of a runtime that is overrun are
lost, and of new limits there is none."""
LIST_WITHOUT_EVENTS_S = 1.0
EVENTS_MOST = 1024
"""Events that wait to be dealt with; the list has what was dropped."""
ANSWER_BYTES_MAX = 32 << 20
RUNS, STARTED = 1, 1
"""A state of containers, and a kind of event."""

_Answer = TypeVar("_Answer", bound=Message)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call with one answer."""

    method: str
    request: Message


class Cri:
    """A runtime by CRI; see `runtime.engine.Engine`."""

    name = "cri"
    waits = True

    def __init__(self, path: Path, rules: Sequence[ContainerRule], may: Sequence[str]) -> None:
        """`path`: the runtime's socket; `may`: labels that annotations of pods may set."""
        self._path, self._rules = path, rules
        self._may = frozenset(f"{PREFIX}{name}" for name in may)
        self._channel: grpc.Channel | None = None
        self._closed = threading.Event()
        self._events_of_all = False
        self._known: dict[str, Container] = {}
        """Containers that are sessions and were told of, by their id."""

    def there(self) -> bool:
        """Whether the runtime's socket is there."""
        return is_runtimes_socket(self._path)

    def connect(self) -> str:
        """Connect anew; returns the runtime's name and version. Raises EngineError."""
        self.close()
        self._closed.clear()
        self._known = {}
        options = [("grpc.max_receive_message_length", ANSWER_BYTES_MAX)]
        self._channel = grpc.insecure_channel(f"unix:{self._path}", options=options)
        about = self._ask(_Call("Version", cri.VersionRequest()), cri.Version)
        name, version = about.runtime_name[:64], about.runtime_version[:64]
        self._events_of_all = tells_everybody(name, version)
        return f"{name} {version}".strip()

    def close(self) -> None:
        """Disconnect."""
        self._closed.set()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def running(self) -> Iterator[Container]:
        """Containers that run now and may be sessions. Raises EngineError."""
        for told in self._list():
            yield told.container

    def events(self, since_unix_s: float) -> Iterator[Told]:
        """Tell of what the list has that it did not have before, without end. Raises EngineError.

        `since_unix_s` has no meaning to CRI: what starts between a list and the first event is in
        the next list.
        """
        if not self._events_of_all:
            while not self._closed.wait(LIST_WITHOUT_EVENTS_S):
                yield from self._list()
            raise EngineError("it was disconnected")
        happened: Queue[str | EngineError] = Queue(EVENTS_MOST)
        threading.Thread(
            target=self._follow, args=(happened,), name="runtime cri events", daemon=True
        ).start()
        yield from self._list()
        while True:
            try:
                what = happened.get(timeout=LIST_EVERY_S)
            except Empty:
                yield from self._list()
                continue
            if isinstance(what, EngineError):
                raise what
            yield from self._list(what)

    def _follow(self, happened: Queue[str | EngineError]) -> None:
        """Put the ids of containers that start into a queue, and why there are no more."""
        why = EngineError("it has ended its events")
        try:
            with self._errors():
                stream = self._connected().unary_stream(
                    f"/{SERVICE}/GetContainerEvents",
                    request_serializer=cri.EventsRequest.SerializeToString,
                    response_deserializer=cri.ContainerEvent.FromString,
                )
                for event in stream(cri.EventsRequest(), wait_for_ready=False):
                    if event.container_event_type == STARTED and event.container_id:
                        with suppress(Full):  # the list has it
                            happened.put_nowait(event.container_id)
        except EngineError as error:
            why = error
        # The reader empties the queue, or has ended: then nobody waits for this.
        with suppress(Full):
            happened.put(why, timeout=ANSWER_S)

    def _list(self, only: str = "") -> Iterator[Told]:
        """Ask for the containers that run. `only`: for the one of an id. Raises EngineError."""
        chosen = cri.ContainerFilter(id=only, state=cri.ContainerStateValue(state=RUNS))
        request = cri.ListContainersRequest(filter=chosen)
        listed = self._ask(_Call("ListContainers", request), cri.ListContainers).containers
        if not only:
            running = {each.id for each in listed}
            self._known = {id_: known for id_, known in self._known.items() if id_ in running}
            for known in self._known.values():
                yield Told(Change.CHANGED, known)  # its limits may be others
        # A container that is started again has another id.
        new = [each for each in listed if each.id not in self._known]
        if not new:
            return
        pod = cri.PodFilter(id=new[0].pod_sandbox_id if len(new) == 1 else "")
        asked = _Call("ListPodSandbox", cri.ListPodsRequest(filter=pod))
        pods = {each.id: each for each in self._ask(asked, cri.ListPods).items}
        for each in new:
            container = self._container(pods.get(each.pod_sandbox_id, cri.CriPod()), each)
            if container is not None:
                self._known[container.id] = container
                yield Told(Change.RUNS, container)

    def _container(self, pod: cri.CriPod, about: cri.CriContainer) -> Container | None:
        """A container as the daemon knows them: annotations of its pod, then its own, as far as
        they may set something. None: no session, or it does not run any more. Raises
        EngineError."""
        given = {**pod.annotations, **about.annotations}
        labels = {name: value for name, value in given.items() if name in self._may}
        parts = (pod.metadata.namespace, pod.metadata.name, about.metadata.name)
        name = "/".join(part for part in parts if part)
        image = about.image.user_specified_image or about.image.image
        container = Container(self.name, about.id, name, image, 0, labels)
        if wish_of(container, self._rules) is None:
            return None
        pid = self._pid(about.id)
        return Container(self.name, about.id, name, image, pid, labels) if pid else None

    def _pid(self, container_id: str) -> int:
        """The number of a container's first process; 0: it has ended. Raises EngineError."""
        request = cri.StatusRequest(container_id=container_id, verbose=True)
        try:
            status = self._ask(_Call("ContainerStatus", request), cri.Status)
        except _NotFound:
            return 0
        return pid_of_info(status.info.get("info", ""))

    def _ask(self, call: _Call, answer: type[_Answer]) -> _Answer:
        """Ask, and wait for the answer. Raises EngineError."""
        with self._errors():
            ask: grpc.UnaryUnaryMultiCallable[Message, _Answer] = self._connected().unary_unary(
                f"/{SERVICE}/{call.method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=answer.FromString,
            )
            return ask(call.request, timeout=ANSWER_S)

    def _connected(self) -> grpc.Channel:
        channel = self._channel
        if channel is None:
            raise EngineError("it was disconnected")
        return channel

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what gRPC raises into EngineError."""
        try:
            yield
        except grpc.RpcError as error:
            # What is raised is the call as well, which its type does not tell.
            code: grpc.StatusCode = getattr(error, "code", lambda: grpc.StatusCode.UNKNOWN)()
            details = getattr(error, "details", lambda: "")()
            kind = _NotFound if code is grpc.StatusCode.NOT_FOUND else EngineError
            raise kind(f"{code.name.lower()}: {details}"[:500]) from error
        except (ValueError, DecodeError) as error:
            # gRPC raises ValueError where `close` has closed the channel meanwhile.
            raise EngineError(f"{type(error).__name__}: {error}"[:500]) from error


class _NotFound(EngineError):
    """The runtime does not know a container any more."""


def tells_everybody(name: str, version: str) -> bool:
    """Whether each of several clients gets all events. containerd before 2.0 (its #7318) and CRI-O
    (its #6466) give each event to one of them: what is taken here would be missing at the kubelet,
    so they are asked for lists alone."""
    found = re.match(r"v?(\d+)\.", version)
    return name == "containerd" and found is not None and int(found[1]) >= 2


def pid_of_info(text: str) -> int:
    """The number of a container's first process, from what containerd and CRI-O tell of it to
    whoever debugs them; 0: it is not in there."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        return 0
    pid = about.get("pid") if isinstance(about, dict) else None
    return pid if isinstance(pid, int) and not isinstance(pid, bool) and pid > 0 else 0
