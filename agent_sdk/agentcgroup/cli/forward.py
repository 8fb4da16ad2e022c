"""A command that `session run` starts: signals are passed on to it, and it may be of another
user."""

from __future__ import annotations

import grp
import os
import pwd
import signal
import subprocess
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from agentcgroup.errors import NotFound

if TYPE_CHECKING:
    from typing_extensions import Self


class Forwarder:
    """A command, and the signals of a person or an init system that are passed on to it."""

    SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._forward) for number in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, argv: list[str], environment: dict[str, str] | None = None) -> int:
        """Run a command. Returns its exit status as a shell has it."""
        self._process = subprocess.Popen(argv, env=environment)
        for number in self._early:
            self._process.send_signal(number)
        returncode = self._process.wait()
        return 128 - returncode if returncode < 0 else returncode

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._process is None:
            self._early.append(number)
        # ^C and ^\ reach the command from the terminal itself, so they are not sent a second time.
        elif number not in (signal.SIGINT, signal.SIGQUIT) or not _in_foreground():
            self._process.send_signal(number)


def _in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


@dataclass(frozen=True)
class User:
    """A user to run a command as. `account`: None for a number that has none."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    account: pwd.struct_passwd | None

    @classmethod
    def named(cls, text: str) -> User:
        """Return the user of `USER[:GROUP]`, each a name or a number. With a group the command is
        in no other.

        Raises:
            NotFound: there is no such user or group, or a number without an account comes without
                a group.
        """
        name, colon, group = text.partition(":")
        account = _account(name)
        if account is None and not name.isdecimal():
            raise _unknown("user", text)
        uid = account.pw_uid if account is not None else int(name)
        if colon:
            gid = _gid(group, text)
            return cls(uid, gid, (gid,), account)
        if account is None:
            raise _unknown("user", text, f"a user of that number, or {name}:GROUP")
        groups = os.getgrouplist(account.pw_name, account.pw_gid)
        return cls(uid, account.pw_gid, tuple(groups), account)

    @property
    def ids(self) -> str:
        """Return the numbers as agentcg-exec takes them."""
        return f"{self.uid}:{self.gid}:{','.join(map(str, self.groups))}"

    def environment(self) -> dict[str, str]:
        """Return the environment of the command: ours, with the user's home and names."""
        if self.account is None:
            return {**os.environ, "HOME": "/"}
        name, home, shell = self.account.pw_name, self.account.pw_dir, self.account.pw_shell
        return {**os.environ, "HOME": home, "SHELL": shell, "USER": name, "LOGNAME": name}


def _account(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        return None


def _gid(group: str, text: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise _unknown("group", text) from None


def _unknown(what: str, text: str, allowed: str = "") -> NotFound:
    allowed = allowed or f"a {what} of this host, by name or number"
    return NotFound(
        f"--user: {text!r} cannot be used: there is no such {what}",
        field="user",
        value=text,
        allowed=allowed,
    )
