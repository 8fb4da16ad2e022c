"""Listening Unix sockets: made here, or handed over by systemd (sd_listen_fds(3)).

systemd keeps the sockets that it handed over while no daemon is there, so who connects meanwhile
waits instead of being refused. They are known by the name of their unit (FileDescriptorName=),
which is a role, and by their kind: `agent-grpc` is the stream of the unit named `agent`.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from agentcgroupd.errors import ConfigError

LISTEN_FDS_START = 3
"""Number of the first descriptor that systemd hands over."""
BACKLOG = 64
"""Connections that wait to be accepted: a flood keeps that many before everybody's own."""
PROTOCOLS = {socket.SOCK_STREAM: "grpc", socket.SOCK_SEQPACKET: "attach"}
"""What is spoken on each kind of socket."""


class Listener:
    """A socket that listens at `path`."""

    def __init__(self, sock: socket.socket, path: Path, *, handed_over: bool) -> None:
        self.socket, self.path = sock, path
        self.handed_over = handed_over
        """Whether systemd made the socket, and keeps it."""

    def close(self) -> None:
        """Stop listening. A file that was made here is removed."""
        if self.handed_over:
            # Who connects until the next daemon is there has to find room.
            self.socket.listen(socket.SOMAXCONN)
        self.socket.close()
        if not self.handed_over:
            self.path.unlink(missing_ok=True)


def handed_over(environment: MutableMapping[str, str] = os.environ) -> dict[str, socket.socket]:
    """Take the sockets that systemd handed over to this process, by role and protocol, such as
    `agent-grpc`. The variables are removed, so that no child takes them for its own. Raises
    ConfigError."""
    pid, count, names = (
        environment.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    )
    if pid != str(os.getpid()):
        return {}
    taken: dict[str, socket.socket] = {}
    for number, name in enumerate(names.split(":")[: int(count or 0)]):
        fd = LISTEN_FDS_START + number
        os.set_inheritable(fd, False)
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConfigError(f"systemd: descriptor {fd} ({name}) is no socket")
        sock = socket.socket(fileno=fd)
        kind = PROTOCOLS.get(socket.SocketKind(sock.type), "?")
        if (key := f"{name}-{kind}") in taken:
            raise ConfigError(f"systemd: there are two sockets {name!r} for {kind}")
        taken[key] = sock
    return taken


def listen(
    path: Path, kind: int, mode: int, name: str, given: Mapping[str, socket.socket]
) -> Listener:
    """Listen at `path` with a socket of `kind` and a file of `mode`, or take the one of `given`
    that is called `name`. Raises ConfigError."""
    if (sock := given.get(name)) is not None:
        _check_handed_over(sock, path, kind, name)
        sock.setblocking(False)
        return Listener(sock, path, handed_over=True)
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        remove_stale(path)
        sock.setblocking(False)
        sock.bind(str(path))
        path.chmod(mode)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"server.run_dir: no socket can be made at {path}: {why}") from None
    except BaseException:
        sock.close()
        raise
    return Listener(sock, path, handed_over=False)


def remove_stale(path: Path) -> None:
    """Remove the socket that an earlier daemon left at `path`. Raises ConfigError where something
    else is there, which is left alone, and OSError."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        what = "a directory" if stat.S_ISDIR(found.st_mode) else "a file that is no socket"
        raise ConfigError(f"server.run_dir: {path} is {what}, where a socket belongs; remove it")
    path.unlink()


def _check_handed_over(sock: socket.socket, path: Path, kind: int, name: str) -> None:
    """Refuse a socket of another kind or at another path than ours. Raises ConfigError."""
    is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or sock.type != kind or not is_listening:
        wanted = socket.SocketKind(kind).name
        raise ConfigError(f"systemd: its socket {name!r} is no listening Unix socket of {wanted}")
    if sock.getsockname() != str(path):
        raise ConfigError(
            f"systemd: its socket {name!r} listens at {sock.getsockname()!r}, and server.run_dir "
            f"asks for {str(path)!r}; let ListenStream= or ListenSequentialPacket= say the same"
        )
