"""NVIDIA's Multi-Process Service: one control daemon for the pool, started, watched and stopped.

It is told the devices by UUID and gets a pipe directory of its own, which agents see (containers
get the directory of sockets mounted). A call is put on it by its environment; what a call leaves
out of its environment it is not held by, so whoever is on the GPU and not on the service is told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from agentcgroupd.errors import AgentcgroupdError

log = logging.getLogger(__name__)

PROGRAM = "nvidia-cuda-mps-control"
COMMAND_TIMEOUT_S = 10.0
START_TIMEOUT_S = 6.0
STOP_TIMEOUT_S = 10.0
RESTART_PAUSE_S = 2.0
PID_FILE = f"{PROGRAM}.pid"


class MpsUnavailable(AgentcgroupdError):
    """It cannot be had, or does not answer; the message says why."""


class Control(Protocol):
    """The control daemon, or a fake of it."""

    def start(self) -> int:
        """Start it, or take up one that an earlier daemon left; its pid. Raises MpsUnavailable."""

    def ask(self, command: str) -> str:
        """One command of its shell; what it says. Raises MpsUnavailable."""

    def stop(self) -> None:
        """`quit`, and wait for its end."""


class ControlDaemon:
    """The real one."""

    def __init__(self, pipes: Path, logs: Path, devices: Sequence[str]) -> None:
        """Nothing is started yet. `devices`: UUIDs."""
        self._pipes, self._logs, self._devices = pipes, logs, devices
        self._process: subprocess.Popen[bytes] | None = None

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "NVIDIA_"))}
        return {
            **kept,
            "CUDA_MPS_PIPE_DIRECTORY": str(self._pipes),
            "CUDA_MPS_LOG_DIRECTORY": str(self._logs),
            "CUDA_VISIBLE_DEVICES": ",".join(self._devices),
        }

    def start(self) -> int:
        """See Control."""
        program = shutil.which(PROGRAM)
        if program is None:
            raise MpsUnavailable(f"{PROGRAM} is not installed")
        for directory in (self._pipes, self._logs):
            directory.mkdir(parents=True, exist_ok=True)
        self._pipes.chmod(0o755)
        left = self._left()
        if left is not None:
            log.info("MPS goes on as an earlier daemon left it (%d)", left)
            return left
        try:
            return self._start(program, "-f")
        except MpsUnavailable as error:
            log.info("%s -f: %s; started with -d instead", PROGRAM, error)
            return self._start(program, "-d")

    def _start(self, program: str, how: str) -> int:
        """In the foreground, so that its end is seen; else as a daemon of its own."""
        with (self._logs / "start.log").open("wb") as output:
            self._process = subprocess.Popen(
                [program, how], env=self._environment(), stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.ask("get_default_active_thread_percentage")
                return self._pid() or self._process.pid
            except MpsUnavailable as error:
                if self._process.poll() not in (None, 0) or time.monotonic() > deadline:
                    said = (self._logs / "start.log").read_text("utf-8", "replace").strip()
                    self.stop()
                    raise MpsUnavailable(f"{said or error}") from None
            time.sleep(0.05)

    def _pid(self) -> int | None:
        """As it has noted it itself."""
        try:
            return int((self._pipes / PID_FILE).read_text())
        except (OSError, ValueError):
            return None

    def _left(self) -> int | None:
        """One that runs already with our pipes."""
        pid = self._pid()
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if pid is None or not PROGRAM.startswith(name):
                return None
            self.ask("get_default_active_thread_percentage")
        except (OSError, MpsUnavailable):
            return None
        return pid

    def ask(self, command: str) -> str:
        """See Control."""
        try:
            done = subprocess.run(
                [PROGRAM], input=f"{command}\n", env=self._environment(), capture_output=True,
                text=True, timeout=COMMAND_TIMEOUT_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MpsUnavailable(f"{PROGRAM}: {command}: {error}") from None
        said = f"{done.stdout}{done.stderr}".strip()
        if done.returncode != 0 or "Cannot find MPS control daemon" in said:
            raise MpsUnavailable(f"{PROGRAM}: {command}: {said or f'status {done.returncode}'}")
        return said

    def stop(self) -> None:
        """See Control."""
        try:
            self.ask("quit")
        except MpsUnavailable as error:
            log.debug("%s", error)
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("%s does not end; it is killed", PROGRAM)
            process.kill()
            process.wait()


class Mps:
    """The service as the daemon uses it. On a running loop; commands run in an executor."""

    def __init__(self, control: Control, pipes: Path, on_end: Callable[[], None]) -> None:
        """`on_end`: it has ended though nobody stopped it; it is started again by itself."""
        self._control, self._pipes, self._on_end = control, pipes, on_end
        self._loop = asyncio.get_running_loop()
        self._pidfd = -1
        self._again: asyncio.Task[None] | None = None
        self.works = False
        self.starts = 0

    async def start(self) -> None:
        """Raises MpsUnavailable."""
        pid = await self._loop.run_in_executor(None, self._control.start)
        self.starts += 1
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise MpsUnavailable(f"{PROGRAM} ended at once") from None
        self._loop.add_reader(self._pidfd, self._ended)
        self.works = True
        log.info("MPS works (control daemon %d, pipes in %s)", pid, self._pipes)

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _ended(self) -> None:
        self._unwatch()
        self.works = False
        log.error("MPS has ended; it is started again")
        self._on_end()
        self._again = self._loop.create_task(self._restart())

    async def _restart(self) -> None:
        while not self.works:
            try:
                await self._loop.run_in_executor(None, self._control.stop)
                await self.start()
            except MpsUnavailable as error:
                log.error("MPS cannot be started again: %s", error)
                await asyncio.sleep(RESTART_PAUSE_S)

    async def clients(self) -> set[int]:
        """Processes that are on it. Raises MpsUnavailable."""
        found: set[int] = set()
        servers = await self._loop.run_in_executor(None, self._control.ask, "get_server_list")
        for server in servers.split():
            if server.isdigit():
                said = await self._loop.run_in_executor(
                    None, self._control.ask, f"get_client_list {server}"
                )
                found.update(int(word) for word in said.split() if word.isdigit())
        return found

    def environment(self, percent: int, memory_bytes: int, devices: int) -> dict[str, str]:
        """What puts a tool on it, with its share and its limit on each of so many devices."""
        return environment(self._pipes, percent, memory_bytes, devices)

    async def stop(self, leave: bool) -> None:
        """Stop it; or, with `leave`, only watch no longer: calls go on."""
        if self._again is not None:
            self._again.cancel()
        self._unwatch()
        self.works = False
        if not leave:
            await self._loop.run_in_executor(None, self._control.stop)


def environment(pipes: Path, percent: int, memory_bytes: int, devices: int) -> dict[str, str]:
    """Variables of the MPS client interface. The limit counts whole MiB, and what the driver keeps
    for the client itself."""
    limit = max(1, memory_bytes >> 20)
    return {
        "CUDA_MPS_PIPE_DIRECTORY": str(pipes),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent),
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": ",".join(f"{i}={limit}M" for i in range(devices)),
    }
