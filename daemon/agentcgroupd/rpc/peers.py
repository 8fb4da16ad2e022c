"""Finding out who is calling, by the kernel's word."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from agentcgroupd.errors import PermissionDenied, Unavailable
from agentcgroupd.host.proc import CgroupUnknown, cgroup_of
from agentcgroupd.host.syscalls import peer_credentials, peer_pidfd, pidfd_alive
from agentcgroupd.rpc.budgets import user_key
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Session

NOBODY = 65534
"""A user and a group that own nothing (overflowuid, user_namespaces(7))."""
ENDED = "the process that opened the connection has ended"
NOT_IN_SESSION = (
    "this process is in no session: it is not in a cgroup that agentcgroup manages. "
    "Open one with `agentcg session run NAME -- COMMAND`, or adopt the container's cgroup with "
    "`agentcg session adopt`"
)


def _not_known(error: OSError) -> PermissionDenied | Unavailable:
    """Say why the kernel does not tell who a peer is."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return Unavailable(f"the daemon has used up what it needs: {os.strerror(error.errno)}")
    return PermissionDenied(ENDED)


@dataclass(slots=True)
class Look:
    """A look at where a process stands: what was read of its pid, for as long as nothing else has
    been done since."""

    path: str
    """The cgroup, below the mount; empty: not read, or read too long ago to be relied on."""
    crowd: str
    """The crowd whose budget the process uses; empty: to be found out by way of its pidfd."""

    def expire(self) -> None:
        """Have the cgroup read anew by whoever asks for it from now on."""
        self.path = ""


NOT_LOOKED = Look("", "")


class Peer:
    """The process that opened a connection."""

    __slots__ = ("_look", "gid", "process", "uid")

    def __init__(self, sock: socket.socket, look: Look = NOT_LOOKED) -> None:
        """Take the peer of a connected Unix socket, whose process is found to be alive. `look`:
        what was read of its pid since it connected. Raises PermissionDenied if the process is gone
        or cannot be seen from the daemon's pid namespace, Unavailable where no descriptor is
        left."""
        self._look = look
        credentials = peer_credentials(sock)
        self.uid, self.gid = credentials.uid, credentials.gid
        if credentials.pid == 0:
            raise PermissionDenied(
                "the calling process cannot be seen from the daemon's pid namespace; "
                "agentcgroupd has to run in the host's"
            )
        try:
            pidfd = peer_pidfd(sock)
        except OSError as error:
            raise _not_known(error) from None
        try:
            self.process = Process.of_pidfd(credentials.pid, pidfd)
        except BaseException as error:
            os.close(pidfd)
            if isinstance(error, OSError):
                raise _not_known(error) from None
            raise

    @classmethod
    def of_process(cls, process: Process) -> Peer:
        """A process of which a program in the kernel has told, and which is taken over: it counts
        for its session alone, whoever its user is."""
        peer = cls.__new__(cls)
        peer.uid = peer.gid = NOBODY
        peer._look = NOT_LOOKED
        peer.process = process
        return peer

    def cgroup_path(self) -> str:
        """The cgroup of the process, below the cgroup2 mount: of its look until that expires, else
        read now. Raises PermissionDenied, or Unavailable where no descriptor is left."""
        if self._look.path:
            return self._look.path
        try:
            path = path_of(self.process.pid)
        except OSError as error:
            raise _not_known(error) from None
        # Alive after the read: it was this process that was read, not a later one of its pid.
        self.check_alive()
        return path

    def check_alive(self) -> None:
        """Refuse a process that has ended. Raises PermissionDenied."""
        if not pidfd_alive(self.process.pidfd):
            raise PermissionDenied(ENDED)

    def check_sender(self, pid: int | None) -> None:
        """Refuse what another process has sent over the connection, which it inherited. Raises
        PermissionDenied. None: the kernel did not tell who."""
        if pid is not None and pid != self.process.pid:
            raise PermissionDenied(
                f"process {pid} sent this over a connection of process {self.process.pid}; each "
                "process has to open its own"
            )

    def close(self) -> None:
        """Give up the pidfd."""
        self.process.close()


SessionFinder = Callable[[str], Session | None]


def session_of(path: str, find: SessionFinder) -> Session:
    """The session that a cgroup belongs to. Raises PermissionDenied if that is none."""
    session = find(path)
    if session is None:
        raise PermissionDenied(NOT_IN_SESSION, "session", "", "a process of an open session")
    return session


def check_operator(peer: Peer, find: SessionFinder) -> None:
    """Refuse whoever is not the operator, which is root outside every session: root inside a
    container is still an agent. Raises PermissionDenied."""
    if peer.uid != 0:
        raise PermissionDenied(f"only root may do this (the caller has uid {peer.uid})")
    session = find(peer.cgroup_path())
    if session is not None:
        raise PermissionDenied(f"a process of session {session.id} may not act as the operator")


def path_of(pid: int) -> str:
    """The cgroup that a process is in, below the cgroup2 mount. Raises PermissionDenied where that
    is no usable one, OSError where the process is gone or cannot be read."""
    try:
        path = cgroup_of(pid)
    except CgroupUnknown as error:
        raise PermissionDenied(f"the calling process is in no usable cgroup: {error}") from None
    if not path.startswith("/") or path.endswith(" (deleted)"):
        raise PermissionDenied(f"the calling process is in no usable cgroup ({path!r})")
    return path


def crowd_of(peer: Peer, find: SessionFinder) -> str:
    """Whose budget a peer uses: its session's, or its user's where it is in none. Raises
    PermissionDenied."""
    return crowd_at(peer.cgroup_path(), peer.process.pid, peer.uid, find)


def crowd_at(path: str, pid: int, uid: int, find: SessionFinder) -> str:
    """Whose budget a process in the cgroup `path` uses. The daemon, which asks itself whether it
    answers, has its own."""
    session = find(path)
    if session is not None:
        return session.turns_key
    return "the daemon" if pid == os.getpid() else user_key(uid)
