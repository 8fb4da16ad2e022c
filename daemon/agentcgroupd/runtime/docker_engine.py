"""Docker and podman, over the HTTP API that both have, by the `docker` package."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentcgroupd.config_containers import ContainerRule
from agentcgroupd.runtime.engine import Change, EngineError, Told, is_runtimes_socket
from agentcgroupd.runtime.labels import PREFIX, Container, wanted

if TYPE_CHECKING:
    import docker

log = logging.getLogger(__name__)

ANSWER_S = 10.0
"""How long the runtime may take to answer; events are waited for without end."""
CHANGES = {
    "start": Change.RUNS,
    "restart": Change.RUNS,
    "update": Change.CHANGED,
}
"""What is done about an event, by its action; others are not asked for."""


class DockerEngine:
    """Docker or podman; see `runtime.engine.Engine`."""

    waits = True

    def __init__(
        self, name: str, socket: Path, rules: Sequence[ContainerRule], may: Sequence[str] = ()
    ) -> None:
        """`name`: `docker` or `podman`; `socket`: where it listens; `may`: labels that an image
        may set."""
        self.name, self._socket, self._rules = name, socket, rules
        self._may = frozenset(f"{PREFIX}{label}" for label in may)
        self._client: docker.APIClient | None = None
        self._stream: Any = None

    def there(self) -> bool:
        """Whether its socket is there."""
        return is_runtimes_socket(self._socket)

    def connect(self) -> str:
        """Connect anew; returns the version. Raises EngineError."""
        # 0.3 s and 10 MB: not for a host without such a runtime.
        import docker

        self.close()
        with self._errors():
            url = f"unix://{self._socket}"
            self._client = docker.APIClient(base_url=url, version="auto", timeout=ANSWER_S)
            answer = self._client.version()
        return str(answer.get("Version", "of no version"))

    def close(self) -> None:
        """Disconnect."""
        client, self._client = self._client, None
        stream, self._stream = self._stream, None
        for each in (stream, client):
            if each is not None:
                try:
                    each.close()
                except (OSError, AttributeError, ValueError) as error:
                    # The stream has no socket any more where its other end has closed it.
                    log.debug("%s: closing: %s", self.name, error)

    def running(self) -> Iterator[Container]:
        """Containers that run now and may be sessions. Raises EngineError."""
        with self._errors():
            listed = self._connected().containers()
        for each in listed:
            names = each.get("Names") or [""]
            name = str(names[0]).lstrip("/")
            if self._wanted(each.get("Labels"), name, str(each.get("Image", ""))):
                container = self._inspect(str(each.get("Id", "")))
                if container is not None:
                    yield container

    def events(self, since_unix_s: float) -> Iterator[Told]:
        """What happens from a time on. Raises EngineError."""
        filters = {"type": "container", "event": list(CHANGES)}
        with self._errors():
            client = self._connected()
            stream = client.events(since=f"{since_unix_s:.9f}", filters=filters, decode=True)
            self._stream = stream
            if self._client is not client:  # `close` came before there was a stream to be closed
                stream.close()
                raise EngineError("it was disconnected")
            for event in stream:
                told = self._told(event)
                if told is not None:
                    yield told

    def _told(self, event: Mapping[str, Any]) -> Told | None:
        """Complete an event with what the container is now; None: it is none of ours."""
        action = str(event.get("Action") or event.get("status") or "")
        actor = event.get("Actor") or {}
        about = actor.get("Attributes") or {}
        change = CHANGES.get(action)
        if change is None:
            return None
        if not self._wanted(about, str(about.get("name", "")), str(about.get("image", ""))):
            return None
        container = self._inspect(str(actor.get("ID") or event.get("id") or ""))
        return None if container is None else Told(change, container)

    def _wanted(self, labels: Mapping[str, str] | None, name: str, image: str) -> bool:
        return wanted(labels or {}, name, image, self._rules)

    def _inspect(self, container_id: str) -> Container | None:
        """Ask for one container; None: it does not run any more. Raises EngineError."""
        import docker.errors

        with self._errors():
            try:
                found = self._connected().inspect_container(container_id)
            except docker.errors.NotFound:
                return None
        state, config = found.get("State") or {}, found.get("Config") or {}
        pid = state.get("Pid")
        if not state.get("Running") or not isinstance(pid, int) or pid <= 0:
            return None
        labels = self._believed(found.get("Image"), _texts(config.get("Labels")))
        return Container(
            self.name,
            str(found.get("Id", "")),
            str(found.get("Name", "")).lstrip("/"),
            str(config.get("Image", "")),
            pid,
            labels,
        )

    def _believed(self, image: object, labels: dict[str, str]) -> dict[str, str]:
        """A container's labels without those that its image has given it and may not: whoever made
        the image is not who started the container. Raises EngineError."""
        import docker.errors

        doubtful = {n for n in labels if n.startswith(PREFIX)} - self._may
        if not doubtful:
            return labels
        of_image: dict[str, str] | None = None
        with self._errors():
            try:
                about = self._connected().inspect_image(str(image))
                of_image = _texts((about.get("Config") or {}).get("Labels"))
            except docker.errors.NotFound:
                log.warning("%s: there is no image %.80s any more", self.name, image)
        dropped = {n for n in doubtful if of_image is None or of_image.get(n) == labels[n]}
        return {name: value for name, value in labels.items() if name not in dropped}

    def _connected(self) -> docker.APIClient:
        client = self._client
        if client is None:
            raise EngineError("it is not connected")
        return client

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the `docker` package and its transport raise into EngineError."""
        import docker.errors
        import requests
        import urllib3

        known = (
            docker.errors.DockerException,
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            OSError,
            ValueError,
        )
        try:
            yield
        except known as error:
            raise EngineError(f"{type(error).__name__}: {error}"[:500]) from error
        except AttributeError as error:
            # http.client reads from None where `close` has taken the socket away meanwhile.
            if self._client is not None:
                raise
            raise EngineError("it was disconnected") from error


def _texts(labels: Mapping[str, Any] | None) -> dict[str, str]:
    return {str(name): str(value) for name, value in (labels or {}).items()}
