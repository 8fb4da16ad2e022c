"""Boot the test guest once: processes, output, end.

The machine (QEMU, or a kernel built as a program) gets one end of a stream socket for each of the
guest's channels (console, standard output, standard error, control); this side relays what comes
out of the other ends and knows from the control channel whether the guest is alive and how the
command ended. init.sh is the guest's part.
"""

from __future__ import annotations

import fcntl
import os
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

EXIT_TIMEOUT = 124  # as timeout(1)
EXIT_BROKEN = 125  # as timeout(1) and docker run: the tool failed, not the command
CONSOLE_LINES = 60
POWER_OFF_SEC = 10.0
DRAIN_SEC = 1.0
INODE_CHECK_SEC = 0.25

# The state directory's path goes on the kernel's command line and into a socket address, so it
# must be short and without spaces: not below $TMPDIR.
STATE_PARENT = Path("/tmp")
STATE_PREFIX = "agentcg-guest-"
STATE_STALE_SEC = 60
FILES_SOCKET = "files.sock"

Sink = Callable[[bytes], None]


class GuestError(Exception):
    """The guest could not be started, or died or hung before its command ended."""

    def __init__(self, message: str, exit_status: int = EXIT_BROKEN) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds until the first sign of life, and until the end of the command."""

    boot_sec: float
    total_sec: float


@dataclass(frozen=True, slots=True)
class Channels:
    """The descriptors that the machine gets, one for each of the guest's channels."""

    console: int
    out: int
    err: int
    control: int


@dataclass(slots=True)
class Progress:
    """What the guest has said on its control channel."""

    up: bool = False
    exit_status: int | None = None
    ended: float | None = None  # time.monotonic() of the exit status
    _pending: bytes = b""

    def feed(self, data: bytes) -> None:
        """Take bytes as they come."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            word, _, value = line.partition(b" ")
            if word == b"up":
                self.up = True
            elif word == b"exit":
                self.exit_status, self.ended = int(value), time.monotonic()


@dataclass(slots=True)
class InodeWatch:
    """Tells when the guest should forget inodes.

    virtiofsd of QEMU 7 holds a descriptor for every inode that the guest remembers, and its limit
    can be low (it raises it to a million where it may: CAP_SYS_RESOURCE). User-mode Linux holds one
    for every file that was read. A guest that has walked a large tree would get "Too many open
    files" from then on.
    """

    pid: int
    limit: int  # descriptors; 0: there are enough for any guest
    _next: float = 0.0

    def due(self) -> bool:
        """True when the guest should forget; looks at most once in INODE_CHECK_SEC."""
        if not self.limit or (now := time.monotonic()) < self._next:
            return False
        self._next = now + INODE_CHECK_SEC
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd")) > self.limit
        except FileNotFoundError:
            return False  # it has ended, which Boot.wait sees by itself

    @staticmethod
    def limit_here() -> int:
        """The limit to use under this process's own resource limits."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return 0 if hard == resource.RLIM_INFINITY or hard > 500_000 else hard // 2


@dataclass(slots=True)
class Boot:
    """A context manager: whatever happens, nothing that it started outlives it.

    state: the directory from `state_dir`.
    out, err: take the command's output as it comes.
    show_console: the console goes to `err` too.
    """

    state: Path
    limits: Limits
    out: Sink
    err: Sink
    show_console: bool = False
    _progress: Progress = field(default_factory=Progress)
    _console: deque[bytes] = field(default_factory=lambda: deque([b""], maxlen=CONSOLE_LINES))
    _stack: ExitStack = field(default_factory=ExitStack)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _started: float = field(default_factory=time.monotonic)
    _dead: bool = False
    _inodes: InodeWatch | None = None
    _control: socket.socket | None = None

    def __enter__(self) -> Boot:
        self._stack.callback(self._selector.close)
        return self

    def __exit__(self, *_: object) -> None:
        """End the children and close everything; a second signal has to wait until it is done."""
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._stack.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def start_file_server(self, argv: Callable[[int], list[str]]) -> None:
        """Start virtiofsd. argv: makes its command line, given the listening socket."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.state / FILES_SOCKET))
            listener.listen(1)
            pid = self._spawn("virtiofsd", argv(listener.fileno()), [listener.fileno()])
        self._inodes = InodeWatch(pid, InodeWatch.limit_here())

    def start_machine(
        self, name: str, argv: Callable[[Channels], list[str]], cwd: Path | None = None
    ) -> None:
        """Start what runs the guest's kernel.

        name: "qemu" or the like, for messages. argv: makes its command line, given its ends of the
        channels. cwd: the directory that it starts in.
        """
        with ExitStack() as theirs:  # our copies are closed, so that EOF comes through
            far: list[int] = []
            for sink in (self._take_console, self.out, self.err, self._progress.feed):
                near, end = socket.socketpair()
                self._stack.enter_context(near)
                theirs.enter_context(end)
                near.setblocking(False)
                self._selector.register(near, selectors.EVENT_READ, sink)
                self._control = near
                far.append(end.fileno())
            pid = self._spawn(name, argv(Channels(*far)), far, cwd)
        if self._inodes is None:
            self._inodes = InodeWatch(pid, InodeWatch.limit_here())

    def _spawn(
        self, name: str, argv: list[str], descriptors: list[int], cwd: Path | None = None
    ) -> int:
        """Start a child that dies with the thread that started it, even if that is killed."""
        log = self._stack.enter_context((self.state / f"{name}.log").open("wb"))
        try:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                cwd=cwd,
                start_new_session=True,  # Ctrl-C is for us; we end the children
            )
        except FileNotFoundError as error:
            raise GuestError("setpriv is missing (Debian: util-linux)") from error
        self._stack.callback(_end, process)
        _keep_priority(process.pid)
        pidfd = os.pidfd_open(process.pid)
        self._stack.callback(os.close, pidfd)
        self._selector.register(pidfd, selectors.EVENT_READ)
        return process.pid

    def wait(self) -> int:
        """Relay output until the guest is done; return the command's exit status.

        Raises GuestError when the guest dies, hangs or runs out of time first.
        """
        while not self._dead and (remaining := self._deadline() - time.monotonic()) > 0:
            if self._inodes and self._inodes.limit:
                remaining = min(remaining, INODE_CHECK_SEC)
            self._relay(remaining)
            self._forget_inodes()
        enough = time.monotonic() + DRAIN_SEC
        while self._relay(0) and time.monotonic() < enough:  # what is left in the sockets
            pass
        if self._progress.exit_status is None:
            raise self._failure()
        return self._progress.exit_status

    def _deadline(self) -> float:
        """When to stop waiting, by time.monotonic()."""
        if self._progress.ended is not None:
            return self._progress.ended + POWER_OFF_SEC
        limit = self.limits.total_sec
        if not self._progress.up:
            limit = min(limit, self.limits.boot_sec)
        return self._started + limit

    def _relay(self, timeout_sec: float) -> bool:
        """Pass on what the guest has sent; False when there was nothing."""
        events = self._selector.select(timeout_sec)
        for key, _ in events:
            if key.data is None:  # a child's pidfd: it has ended
                self._selector.unregister(key.fileobj)
                self._dead = True
            elif data := _receive(key.fd):
                key.data(data)
            else:
                self._selector.unregister(key.fileobj)
        return bool(events)

    def _forget_inodes(self) -> None:
        if self._control and self._inodes and self._progress.up and self._inodes.due():
            with suppress(BrokenPipeError):  # the machine has just ended
                self._control.send(b"forget\n")

    def _take_console(self, data: bytes) -> None:
        if self.show_console:
            self.err(data)
        first, *rest = data.replace(b"\r", b"").split(b"\n")
        self._console[-1] += first
        self._console.extend(rest)

    def _failure(self) -> GuestError:
        status = EXIT_BROKEN
        if self._dead:
            message = "died before the command ended"
        elif self._progress.up or self.limits.total_sec <= self.limits.boot_sec:
            message = f"stopped after {self.limits.total_sec:g} s: the command had not ended"
            status = EXIT_TIMEOUT
        else:
            message = f"no sign of life within {self.limits.boot_sec:g} s"
        lines = [line.decode(errors="replace") for line in self._console if line.strip()]
        for path in sorted(self.state.glob("*.log")):
            log = path.read_text(errors="replace").splitlines()
            lines.extend(f"{path.stem}: {line}" for line in log[-10:])
        tail = "\n".join(f"  | {line}" for line in lines) or "  | (nothing)"
        return GuestError(f"{message}; the console's last lines:\n{tail}", status)


def _keep_priority(pid: int) -> None:
    """Give a session of its own the priority of this one, where the scheduler groups by session: a
    group begins with nice 0, whatever its first process has."""
    own = Path("/proc/self/autogroup")
    if own.exists():
        nice = own.read_text(encoding="ascii").split()[-1]
        if nice != "0":
            Path(f"/proc/{pid}/autogroup").write_text(nice, encoding="ascii")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a child, if it is still there, and reap it."""
    process.kill()
    process.wait()


def _receive(descriptor: int) -> bytes:
    """Read from a socket; a connection that was reset is one that ended."""
    try:
        return os.read(descriptor, 1 << 16)
    except ConnectionResetError:
        return b""


@contextmanager
def state_dir(parent: Path = STATE_PARENT) -> Iterator[Path]:
    """A directory for one boot, locked while in use and removed afterwards."""
    sweep(parent)
    state = Path(tempfile.mkdtemp(prefix=STATE_PREFIX, dir=parent))
    descriptor = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield state
    finally:
        shutil.rmtree(state, ignore_errors=True)
        os.close(descriptor)


def sweep(parent: Path) -> None:
    """Remove what runs that were killed outright have left: directories that nobody holds locked.

    A new directory is unlocked for a moment, so only those older than a minute count.
    """
    for state in parent.glob(f"{STATE_PREFIX}*"):
        try:
            descriptor = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone, or not ours to open
        try:
            found = os.fstat(descriptor)
            old = time.time() - found.st_mtime > STATE_STALE_SEC
            if old and found.st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(state, ignore_errors=True)
        except BlockingIOError:
            continue  # in use
        finally:
            os.close(descriptor)
