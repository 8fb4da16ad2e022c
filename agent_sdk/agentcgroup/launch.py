"""Starting a program through the launcher, with the errors that subprocess has without it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

CANNOT_EXEC, NOT_FOUND = 126, 127
"""Exit statuses of a launcher that could not execute the tool, as env(1) has them."""


class Launch:
    """A start of a program through the launcher; `with` closes its pipe.

    The launcher writes errno to a pipe when it cannot execute the tool, as the child of subprocess
    does. The pipe is closed when it can. Where the launcher is started while its call is being
    begun, the pipe is a pair of sockets, and the id of the call goes the other way.

    Attributes:
        argv, options: arguments for subprocess.Popen or loop.subprocess_exec.
        failed: the program did not come to run.
    """

    def __init__(
        self,
        launcher: list[str],
        command: list[str],
        options: dict[str, Any],
        piped: bool,
        early: bool = False,
    ) -> None:
        """Prepare to start `command`. `launcher`: the command line that ends in "--"; empty: the
        command is started directly. `options`: arguments for Popen. `piped`: there is a pipe, and
        `check` will be called; else the launcher says on stderr what is wrong. `early`: the
        launcher waits for `tell`; with `piped` only."""
        if launcher and options.get("process_group") is None:
            launcher = [*launcher[:-1], "--own-group", *launcher[-1:]]
        self.argv, self.options, self.failed = [*launcher, *command], options, False
        self._program, self._launcher = command[0], launcher[0] if launcher else None
        self._fds: list[int] = []
        if launcher and piped:
            read, write = _socket_pair() if early else os.pipe()
            # A number below 3 may be taken for one of the tool's own streams.
            ours = fcntl.fcntl(write, fcntl.F_DUPFD_CLOEXEC, 3) if write < 3 else write
            if ours != write:
                os.close(write)
            self._fds = [read, ours]
            told = [f"--error-fd={ours}", *([f"--call-fd={ours}"] if early else [])]
            self.argv = [*launcher[:-1], *told, *launcher[-1:], *command]
            self.options = self._handing_over(ours, options)

    @staticmethod
    def _handing_over(fd: int, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("close_fds", True):
            return {**options, "pass_fds": (*options.get("pass_fds", ()), fd)}
        os.set_inheritable(fd, True)  # pass_fds would close what the caller wants open
        return options

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._fds:
            os.close(self._fds.pop())

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Start the process in this block. Errors of starting the launcher become those of starting
        the program."""
        try:
            yield
        except OSError as error:
            self.failed = True
            if self._launcher is not None and error.filename == self._launcher:
                raise OSError(error.errno, error.strerror, self._program) from None
            raise
        except Exception:
            self.failed = True
            raise
        if self._fds:
            os.close(self._fds.pop())  # from now on the pipe ends with the launcher

    def tell(self, call_id: str) -> None:
        """Tell a launcher that was started early which call to enter; no error if it has ended."""
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, self._fds[0])
        try:
            line.send(f"{call_id}\n".encode(), socket.MSG_NOSIGNAL)
        except OSError:
            return  # it was killed, which its exit status says
        finally:
            line.detach()

    def check(self, returncode: int) -> None:
        """Raise what subprocess raises for a program that could not be executed, once the process
        has ended. A tool may end with such a status as well, and then nothing is raised.

        Raises:
            FileNotFoundError, PermissionError, OSError: as subprocess, errno and filename too.
        """
        if returncode not in (CANNOT_EXEC, NOT_FOUND) or not self._fds:
            return
        os.set_blocking(self._fds[0], False)
        try:
            said = os.read(self._fds[0], 16)
        except (BlockingIOError, ConnectionResetError):
            return  # another child of this process has the pipe too: it was forked meanwhile
        if said.isdigit():
            self.failed = True
            number = int(said) or errno.ENOENT
            raise OSError(number, os.strerror(number), self._program)


def _socket_pair() -> tuple[int, int]:
    ours, launchers = socket.socketpair()
    return ours.detach(), launchers.detach()
