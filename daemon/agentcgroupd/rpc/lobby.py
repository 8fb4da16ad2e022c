"""Whose a new connection is, found out before anything is read from it.

Whoever may connect can do so from ever new processes, which have ended before they can be asked
for. So it is looked up at once, by a single read, whose a connection seems to be. The rest is done
in that one's turn: a session's own new processes wait behind none of somebody else. All who are
outside of sessions share the turns of one, and who has ended is turned away without one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import Counter
from functools import partial
from typing import Protocol

from agentcgroupd.errors import AgentcgroupdError
from agentcgroupd.host.syscalls import PeerCredentials, peer_credentials
from agentcgroupd.rpc.budgets import STRANGERS, Bucket, Budgets, Crowd, user_key
from agentcgroupd.rpc.peers import (
    NOT_LOOKED,
    Look,
    Peer,
    SessionFinder,
    crowd_at,
    crowd_of,
    path_of,
)
from agentcgroupd.turns import Turns

log = logging.getLogger(__name__)

UNSEEN_MAX = 512
"""Connections of one session, or of root outside of sessions, that wait until it is found out
whose they are."""
UNSEEN_USER_MAX = 64
"""The same, of one user outside of sessions."""
UNSEEN_STRANGERS_MAX = 256
"""The same, of all these users together."""

SLOW_S = 0.005
"""A look at a process's cgroup that takes longer is counted, unless the process is root's. The
kernel takes 18 ms to write the path of one that lies 2,000 deep, and whoever was given a cgroup may
make such. Agents are often root, and their sessions have cgroup.max.depth."""
ROOT_UID = 0
SLOW_RATE = 0.1
SLOW_BURST_S = 0.02
"""The part of the loop's time that slow looks at processes of one user may take, and how much of it
at once. Beyond that its connections wait."""
USERS_KEPT = 1024


class Host(Protocol):
    """The server that a lobby is before. Each of these takes the socket over."""

    def too_many(self, crowd: Crowd) -> str:
        """What a crowd has too much of to be let in once more; empty: nothing."""

    def let_in(self, sock: socket.socket, peer: Peer, crowd: Crowd) -> None:
        """Serve a peer that is known."""

    def turn_away(self, sock: socket.socket, crowd: Crowd, what: str) -> None:
        """Refuse a connection of a crowd that has too much of `what`."""

    def not_told(self, sock: socket.socket, error: Exception) -> None:
        """Refuse a connection of which it cannot be told whose it is."""

    def ended(self, sock: socket.socket) -> None:
        """Refuse a connection whose process has ended, at little cost."""


def _is_stranger(key: str) -> bool:
    return key.startswith(f"{STRANGERS}/")


class Lobby:
    """Where connections wait until it is found out whose they are."""

    def __init__(
        self, host: Host, find: SessionFinder, budgets: Budgets, turns: Turns, crowded: str
    ) -> None:
        """`find`: the session of a cgroup. `crowded`: what there is too much of where too many
        wait."""
        self._host, self._find = host, find
        self._budgets, self._turns = budgets, turns
        self._crowded = crowded
        self._unseen = Counter[str]()
        """Connections that wait, by key, and those of all strangers."""
        self._slow: dict[int, Bucket] = {}
        """Seconds that looks may take, of users whose processes it took long to look at."""
        self._loop = asyncio.get_running_loop()

    def accepted(self, sock: socket.socket) -> None:
        """Take in a new connection."""
        try:
            who = peer_credentials(sock)
        except OSError:
            sock.close()
            return
        crowd = self._budgets.known(who.pid)
        if crowd is not None and (what := self._host.too_many(crowd)):
            self._host.turn_away(sock, crowd, what)
            return
        slow = self._slow.get(who.uid)
        if slow is not None and (wait_s := slow.wait_s(self._loop.time(), 0)):
            self._later(sock, who, slow, wait_s)
            return
        try:
            look = self._timed(who)
        except ProcessLookupError:
            self._turns.spent(self._stranger(who.uid), 0)
            self._host.ended(sock)
            return
        crowd = self._budgets.crowd(look.crowd or user_key(who.uid))
        key = crowd.turns_key if look.crowd else self._stranger(who.uid)
        if self._is_full(key):
            self._host.turn_away(sock, crowd, self._crowded)
        else:
            self._count(key, 1)
            self._turns.submit_or_do(key, partial(self._identify, sock, who.pid, look, key))
            # From here on the daemon does other work, which may move the process.
            look.expire()

    def _later(
        self, sock: socket.socket, who: PeerCredentials, slow: Bucket, wait_s: float
    ) -> None:
        """Let a connection of a user wait whose processes it takes long to look at."""
        key = self._stranger(who.uid)
        if self._is_full(key):
            self._host.turn_away(sock, self._budgets.crowd(user_key(who.uid)), self._crowded)
            return
        slow.take(SLOW_BURST_S)
        self._count(key, 1)
        identify = partial(self._identify, sock, who.pid, NOT_LOOKED, key)
        self._loop.call_later(wait_s, self._turns.submit, key, identify)

    def _timed(self, who: PeerCredentials) -> Look:
        """Do as `_look_at`, and count for the user what that takes if it is long."""
        started = time.thread_time()
        try:
            return self._look_at(who)
        finally:
            took_s = time.thread_time() - started
            if took_s > SLOW_S and who.uid != ROOT_UID:
                now = self._loop.time()
                if len(self._slow) >= USERS_KEPT:
                    self._slow = {u: b for u, b in self._slow.items() if b.wait_s(now, 0)}
                new = Bucket(SLOW_RATE, SLOW_BURST_S, now)
                self._slow.setdefault(who.uid, new).take(took_s)

    @staticmethod
    def _stranger(uid: int) -> str:
        return f"{STRANGERS}/{user_key(uid)}"

    def _is_full(self, key: str) -> bool:
        if not _is_stranger(key):
            return self._unseen[key] >= UNSEEN_MAX
        all_of_them = self._unseen[STRANGERS]
        return self._unseen[key] >= UNSEEN_USER_MAX or all_of_them >= UNSEEN_STRANGERS_MAX

    def _count(self, key: str, count: int) -> None:
        for what in (key, STRANGERS) if _is_stranger(key) else (key,):
            self._unseen[what] += count
            if not self._unseen[what]:
                del self._unseen[what]

    def _look_at(self, who: PeerCredentials) -> Look:
        """Look at the process of a pid, which may not be who connected any more. Raises
        ProcessLookupError if it has ended."""
        if not who.pid:
            return NOT_LOOKED
        try:
            path = path_of(who.pid)
            return Look(path, crowd_at(path, who.pid, who.uid, self._find))
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessLookupError from None
        except Exception:
            log.debug("process %d is asked for once more", who.pid, exc_info=True)
            return NOT_LOOKED

    def _identify(self, sock: socket.socket, pid: int, look: Look, key: str) -> None:
        """Ask the kernel who is there, and hand it to the server."""
        self._count(key, -1)
        peer: Peer | None = None
        try:
            # Peer checks that who connected still lives, so the look was at that process.
            peer = Peer(sock, look)
            crowd = self._budgets.crowd(look.crowd or crowd_of(peer, self._find))
        except Exception as error:
            if peer is not None:
                peer.close()
            if not isinstance(error, AgentcgroupdError):
                log.exception("who opened a connection cannot be told")
            self._host.not_told(sock, error)
            return
        self._budgets.remember(pid, crowd)
        if what := self._host.too_many(crowd):
            peer.close()
            self._host.turn_away(sock, crowd, what)
        else:
            self._host.let_in(sock, peer, crowd)
