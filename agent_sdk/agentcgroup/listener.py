"""A thread that hears of what happens in the pool, also after the daemon was away."""

from __future__ import annotations

import threading
from collections.abc import Callable

from agentcgroup.admin import Admin
from agentcgroup.closing import Closing
from agentcgroup.errors import AgentcgError
from agentcgroup.types import Event


class EventListener(Closing):
    """Hands on each event of all sessions, from `start` to `close`.

    make_admin: connects to the daemon. heard: is given each event, in the listener's thread.
    retry_s: how long to wait before a daemon that could not be asked is asked again; what happened
    until then is not told.
    """

    def __init__(
        self, make_admin: Callable[[], Admin], heard: Callable[[Event], None], *, retry_s: float
    ) -> None:
        self._make_admin, self._heard, self._retry_s = make_admin, heard, retry_s
        self._stopping = threading.Event()
        self._stream: Closing | None = None
        self._thread = threading.Thread(target=self._listen_on, name="listen", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def close(self) -> None:
        """End it, from any other thread."""
        self._stopping.set()
        stream = self._stream
        if stream is not None:
            stream.close()
        if self._thread.is_alive():
            self._thread.join(5)

    def _listen_on(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._make_admin() as admin, admin.events() as stream:
                    self._stream = stream
                    if self._stopping.is_set():
                        break  # `close` came before there was a stream to close.
                    for event in stream:
                        self._heard(event)
            except AgentcgError:
                self._stopping.wait(self._retry_s)
