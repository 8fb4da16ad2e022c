"""NVIDIA's Multi-Process Service: one control daemon for the pool, started, watched and stopped.

The control daemon is given the devices by UUID and a pipe directory of its own, which agents see
(containers have the directory of sockets mounted). The environment puts a call's processes on the
service. A process that drops those variables is not held by it, so a tenant whose process is on the
GPU and not on the service is told.
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
    """Raised where MPS cannot be had, or does not answer; the message says why."""


class MpsControl(Protocol):
    """The control daemon, or a stand-in for it."""

    def start(self) -> int:
        """Start the control daemon, or take up one that an earlier agentcgroupd left; returns its
        pid. Raises MpsUnavailable."""

    def ask(self, command: str) -> str:
        """Give one command to its shell; returns what that prints. Raises MpsUnavailable."""

    def stop(self) -> None:
        """Tell it to quit, and wait for its end."""


class MpsControlDaemon:
    """NVIDIA's own program."""

    def __init__(self, pipes: Path, logs: Path, devices: Sequence[str]) -> None:
        """Start nothing yet. `pipes`, `logs`: directories for it; `devices`: UUIDs."""
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
        """Start the program, in the foreground where it knows how. Raises MpsUnavailable."""
        program = shutil.which(PROGRAM)
        if program is None:
            raise MpsUnavailable(f"{PROGRAM} is not installed")
        for directory in (self._pipes, self._logs):
            directory.mkdir(parents=True, exist_ok=True)
        self._pipes.chmod(0o755)
        running = self._running()
        if running is not None:
            log.info("MPS goes on as an earlier daemon left it (%d)", running)
            return running
        try:
            return self._start(program, "-f")
        except MpsUnavailable as error:
            log.info("%s -f: %s; started with -d instead", PROGRAM, error)
            return self._start(program, "-d")

    def _start(self, program: str, option: str) -> int:
        """Run the program and wait until it answers; returns its pid. `option`: -f for the
        foreground, so that its end is seen, or -d for a daemon of its own. Raises
        MpsUnavailable."""
        with (self._logs / "start.log").open("wb") as output:
            self._process = subprocess.Popen(
                [program, option],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
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
        """The pid that the control daemon has noted; None where it has noted none."""
        try:
            return int((self._pipes / PID_FILE).read_text())
        except (OSError, ValueError):
            return None

    def _running(self) -> int | None:
        """The pid of a control daemon that runs already with these pipes."""
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
        """Give one command to the program's shell. Raises MpsUnavailable."""
        try:
            done = subprocess.run(
                [PROGRAM],
                input=f"{command}\n",
                env=self._environment(),
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MpsUnavailable(f"{PROGRAM}: {command}: {error}") from None
        said = f"{done.stdout}{done.stderr}".strip()
        if done.returncode != 0 or "Cannot find MPS control daemon" in said:
            raise MpsUnavailable(f"{PROGRAM}: {command}: {said or f'status {done.returncode}'}")
        return said

    def stop(self) -> None:
        """Tell the program to quit; kill one of ours that does not."""
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
    """Keeps MPS running. Made and used on a running loop; commands run in an executor."""

    def __init__(self, control: MpsControl, pipes: Path, on_end: Callable[[], None]) -> None:
        """`on_end`: called when MPS has ended though nobody stopped it; it is then started again
        without further ado."""
        self._control, self._pipes, self._on_end = control, pipes, on_end
        self._loop = asyncio.get_running_loop()
        self._pidfd = -1
        self._again: asyncio.Task[None] | None = None
        self.works = False
        self.starts = 0

    async def start(self) -> None:
        """Start the control daemon and watch for its end. Raises MpsUnavailable."""
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
        """Pids of the processes that use MPS. Raises MpsUnavailable."""
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
        """Variables that put a tool on MPS, with its share and its limit of memory on each of so
        many devices."""
        return environment(self._pipes, percent, memory_bytes, devices)

    async def stop(self, leave: bool) -> None:
        """Stop MPS; with `leave`, only stop watching it, so that calls go on."""
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
