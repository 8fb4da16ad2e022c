"""What the daemon wants of a container runtime, and the thread in which one is asked.

A runtime is asked in a thread of its own, because its answers may take seconds: what it tells comes
to the daemon's loop one container at a time, and the next is read once that has been dealt with.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from agentcgroupd.runtime.labels import Container

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
"""How often it is looked whether a runtime is there."""
AGAIN_MOST_S = 30.0
"""The longest pause before a runtime that does not answer is asked again."""
OVERLAP_S = 1.0
"""Events are asked for from this much before a list: a container that starts meanwhile is told
twice rather than never."""


def is_runtimes_socket(path: Path) -> bool:
    """Whether a socket is there that a runtime is believed at: root's, or one of our own user."""
    try:
        found = path.stat()
    except OSError:
        return False
    if not stat.S_ISSOCK(found.st_mode):
        return False
    if found.st_uid in (0, os.geteuid()):
        return True
    if path not in _passed_over:
        _passed_over.add(path)
        log.warning(
            "%s belongs to uid %d: a runtime of another user may set any label, so its containers "
            "become no sessions by themselves; adopt them: agentcg session adopt NAME --pid PID",
            path,
            found.st_uid,
        )
    return False


_passed_over: set[Path] = set()
"""Sockets of which that was said: no more than the configuration names."""


class EngineError(Exception):
    """A runtime does not answer, or has stopped to; expected when it is restarted."""


class Change(Enum):
    """What has become of a container."""

    RUNS = "runs"
    CHANGED = "changed"
    """The limits of a container are others."""


@dataclass(frozen=True, slots=True)
class Told:
    """A change that a runtime tells of."""

    change: Change
    container: Container


class Engine(Protocol):
    """A container runtime; each method may block, and raises EngineError."""

    name: str
    waits: bool
    """Whether the runtime may be kept waiting until the loop has dealt with what it has told."""

    def there(self) -> bool:
        """Whether the runtime can be asked here."""

    def connect(self) -> str:
        """Connect anew. Returns the runtime's version, for the log."""

    def running(self) -> Iterator[Container]:
        """Containers that run now and may be sessions."""

    def events(self, since_unix_s: float) -> Iterator[Told]:
        """What happens to containers that may be sessions, from a time on, until the runtime
        ends."""

    def close(self) -> None:
        """Disconnect, from any thread, so that whoever waits for the runtime gets an error."""


class Watcher:
    """Asks one runtime in a thread: a list, then what happens; again after each interruption."""

    def __init__(
        self, engine: Engine, loop: AbstractEventLoop, tell: Callable[[Told], None]
    ) -> None:
        """`tell` is called on the loop."""
        self._engine, self._loop, self._tell = engine, loop, tell
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"runtime {engine.name}", daemon=True
        )
        self.connected = 0
        """How often the runtime has answered."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Have the thread end by itself; it is not waited for."""
        self._stopping.set()
        self._engine.close()

    def _run(self) -> None:
        pause_s, said = LOOK_EVERY_S, ("", 0)
        while not self._stopping.is_set():
            if not self._engine.there():
                pause_s = LOOK_EVERY_S
                self._stopping.wait(pause_s)
                continue
            before = self.connected
            try:
                self._follow()
                reason = "it has ended its events"
            except EngineError as error:
                reason = str(error)
            except CancelledError:
                return
            except Exception:
                if self._loop.is_closed():
                    return
                # Whatever it was, containers are followed again after a while.
                log.exception("%s: what it tells cannot be dealt with", self._engine.name)
                reason = "it was not understood"
            if self._stopping.is_set():
                return
            pause_s = LOOK_EVERY_S if self.connected > before else min(pause_s * 2, AGAIN_MOST_S)
            # What goes on being so is said once: a socket may be there whose owner never answers.
            log.log(
                logging.DEBUG if (reason, self.connected) == said else logging.WARNING,
                "%s: %s; asked again in %g s, its containers go on meanwhile",
                self._engine.name,
                reason,
                pause_s,
            )
            said = (reason, self.connected)
            self._stopping.wait(pause_s)

    def _follow(self) -> None:
        """Tell of what runs, and of what happens from then on. Raises EngineError."""
        version = self._engine.connect()
        since = time.time() - OVERLAP_S
        found = 0
        for container in self._engine.running():
            self._pass_on(Told(Change.RUNS, container))
            found += 1
        self.connected += 1
        log.info(
            "%s %s: followed, %d containers run that may be sessions",
            self._engine.name,
            version,
            found,
        )
        for told in self._engine.events(since):
            self._pass_on(told)

    def _pass_on(self, told: Told) -> None:
        """Have the loop deal with one thing, and wait for that. Raises CancelledError or
        RuntimeError where the loop has ended."""
        done: Future[None] = Future()

        def deal() -> None:
            try:
                self._tell(told)
            finally:
                done.set_result(None)

        self._loop.call_soon_threadsafe(deal)
        while self._engine.waits and not done.done():
            if self._stopping.is_set():
                raise CancelledError
            _wait_a_moment(done)


def _wait_a_moment(done: Future[None]) -> None:
    try:
        done.result(0.5)
    except TimeoutError:
        return
