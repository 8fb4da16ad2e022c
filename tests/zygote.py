"""Processes that start with their imports done, forked by a process that did the imports once.

An emulated CPU takes 20 s to import the daemon and 7 s to import an agent's worker, and tests start
a hundred of these. The code that runs is the same, in a process of its own. The tests of systemd,
the launcher and the command line start the programs as they are installed.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOAD = (
    "agentcgroupd.__main__",
    "agentcgroup.aio",
    "agentcgroup.client",
    "grpc.aio",
    "tests.harness",
    "tests.gpu_fakes",
)
REQUEST_BYTES_MAX = 1 << 17
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Forked:
    """A child of this process, with those parts of Popen's interface that tests use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit status of the process, as Popen gives it; None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process. Returns its exit status; raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(0.002)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM, unless the process has ended."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _zygote() -> socket.socket:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", str(its.fileno())],
            pass_fds=[its.fileno()],
            cwd=Path(__file__).resolve().parent.parent,
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def fork(
    module: str, argv: Sequence[str], env: Mapping[str, str], stdin: int, stdout: int, stderr: int
) -> Forked:
    """Run `module`'s main() in a new child of this process, with the given arguments (without the
    program's name), environment and descriptors. The descriptors stay open in this process too."""
    zygote = _zygote()
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    # The process between the zygote and the new one ends at once, so this process inherits its
    # child.
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        data = pickle.dumps((module, list(argv), dict(env)))
        assert len(data) <= REQUEST_BYTES_MAX
        socket.send_fds(zygote, [data], [stdin, stdout, stderr])
        answer = zygote.recv(32)
        assert answer, "the zygote has ended"
        return Forked(int(answer))
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _adopted_by_client(client: socket.socket) -> int:
    """Fork twice. Returns 0 in the new process; here its pid, once the one between has ended."""
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child == 0:
            for fd in (read, write):
                os.close(fd)
            client.close()
            return 0
        os.write(write, str(child).encode())
        os._exit(0)
    os.waitpid(between, 0)
    child = int(os.read(read, 32))
    os.close(read)
    os.close(write)
    return child


def main() -> Any:
    """Serve until the client goes. Returns the exit status."""
    client = socket.socket(fileno=int(sys.argv[1]))
    for module in PRELOAD:
        importlib.import_module(module)
    while True:
        data, fds, _, _ = socket.recv_fds(client, REQUEST_BYTES_MAX, 3)
        if not data:
            return 0
        module, argv, env = pickle.loads(data)
        if child := _adopted_by_client(client):
            client.send(str(child).encode())
            for fd in fds:
                os.close(fd)
            continue
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = [module, *argv]
        return importlib.import_module(module).main()


if __name__ == "__main__":
    sys.exit(main())
