"""Connections wait for being identified in the turns of whoever they seem to be of."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from agentcgroupd.config import LimitsConfig
from agentcgroupd.host.proc import cgroup_of
from agentcgroupd.rpc import lobby
from agentcgroupd.rpc.budgets import STRANGERS, Budgets, Crowd
from agentcgroupd.rpc.lobby import Lobby
from agentcgroupd.rpc.peers import Peer, SessionFinder
from agentcgroupd.state.session import Session
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.turns import Turns

IN_SESSION = cast(Session, SimpleNamespace(turns_key="session x"))
DIES = """
import os, socket, sys
for _ in range(int(sys.argv[2])):
    pid = os.fork()
    if not pid:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(sys.argv[1])
        os._exit(0)
    os.waitpid(pid, 0)
"""


class Noting:
    """A server that notes what becomes of each connection."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def too_many(self, crowd: Crowd) -> str:
        return ""

    def let_in(self, sock: socket.socket, peer: Peer, crowd: Crowd) -> None:
        self._note(sock, crowd.turns_key)
        peer.close()

    def turn_away(self, sock: socket.socket, crowd: Crowd, what: str) -> None:
        self._note(sock, f"too many {what}")

    def not_told(self, sock: socket.socket, error: Exception) -> None:
        self._note(sock, f"not told: {error}")

    def ended(self, sock: socket.socket) -> None:
        self._note(sock, "ended")

    def _note(self, sock: socket.socket, what: str) -> None:
        self.seen.append(what)
        sock.close()


class Place:
    """A lobby behind a socket that is listened to by hand."""

    def __init__(self, path: Path, find: SessionFinder) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(128)
        self.path = path
        self.host, self.turns = Noting(), Turns()
        self.budgets = Budgets(LimitsConfig(), 256, Metrics())
        self.lobby = Lobby(self.host, find, self.budgets, self.turns, "connects")

    def connect(self, count: int) -> None:
        """Accept connections of this process, and others that have been made."""
        for _ in range(count):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(self.path))
                self.accept(1)

    def accept(self, count: int) -> None:
        for _ in range(count):
            self.lobby.accepted(self.listener.accept()[0])

    async def settle(self) -> list[str]:
        """What was seen once nobody waits any more."""
        last = asyncio.Event()
        for key in ("session x", f"{STRANGERS}/user 1000"):
            last.clear()
            self.turns.submit(key, last.set)
            await last.wait()
        return self.host.seen


@pytest.fixture
def not_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects is another process than the daemon, of a user other than root."""
    monkeypatch.setattr("agentcgroupd.rpc.peers.os", SimpleNamespace(getpid=lambda: -1))
    monkeypatch.setattr("agentcgroupd.rpc.peers.user_key", lambda uid: "user 1000")


def in_session(path: str) -> Session | None:
    return IN_SESSION


def in_none(path: str) -> Session | None:
    return None


async def of_ended(path: Path, count: int) -> tuple[list[str], int]:
    place = Place(path, in_session)
    await asyncio.to_thread(
        subprocess.run, [sys.executable, "-S", "-c", DIES, str(path), str(count)], check=True
    )
    place.accept(count)
    seen = list(place.host.seen)
    return seen, place.turns.waiting("session x")


def test_who_has_ended_has_no_turn(tmp_path: Path) -> None:
    assert asyncio.run(of_ended(tmp_path / "s", 50)) == (["ended"] * 50, 0)


async def beside_strangers(path: Path) -> list[str]:
    place = Place(path, in_none)
    # Somebody else's work is under way, so nothing is done at once.
    place.turns.submit("session y", lambda: None)
    place.connect(lobby.UNSEEN_USER_MAX + 5)
    assert place.turns.waiting(STRANGERS) == lobby.UNSEEN_USER_MAX
    place.lobby = Lobby(place.host, in_session, place.budgets, place.turns, "connects")
    place.connect(3)
    assert place.turns.waiting("session x") == 3
    return await place.settle()


@pytest.mark.usefixtures("not_the_daemon")
def test_a_sessions_new_processes_do_not_wait_behind_strangers(tmp_path: Path) -> None:
    seen = asyncio.run(beside_strangers(tmp_path / "s"))
    assert seen[:5] == ["too many connects"] * 5, "no more strangers wait than may"
    places = [at for at, what in enumerate(seen[5:]) if what == "session x"]
    assert len(places) == 3 and places[-1] <= 8, "each has its turn beside one of theirs"
    assert seen.count(f"{STRANGERS}/user 1000") == lobby.UNSEEN_USER_MAX


async def once(path: Path, find: SessionFinder) -> list[str]:
    place = Place(path, find)
    place.connect(1)
    return await place.settle()


def broken(path: str) -> Session | None:
    raise RuntimeError("the books are broken")


def test_who_cannot_be_told_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert asyncio.run(once(tmp_path / "s", broken)) == ["not told: the books are broken"]
    assert "who opened a connection cannot be told" in caplog.text


async def moved(path: Path) -> list[str]:
    """What becomes of one whose cgroup is looked up."""
    places: list[str] = []

    def find(at: str) -> Session | None:
        places.append(at)
        return IN_SESSION

    seen = await once(path, find)
    assert places == [cgroup_of(os.getpid())]
    return seen


def test_one_look_at_its_cgroup_is_enough(tmp_path: Path) -> None:
    assert asyncio.run(moved(tmp_path / "s")) == ["session x"]


async def slowly_looked_at(path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many processes had been looked at after each connection, and at the end."""
    place, looked = Place(path, in_none), [0]

    def slow(pid: int) -> str:
        looked[0] += 1
        end = time.thread_time() + 0.03
        while time.thread_time() < end:
            pass
        return "/deep"

    monkeypatch.setattr(lobby, "path_of", slow)
    monkeypatch.setattr(lobby, "ROOT_UID", -1)  # the tests are root
    monkeypatch.setattr("agentcgroupd.rpc.peers.path_of", slow)
    seen = []
    for _ in range(count):
        place.connect(1)
        seen.append(looked[0])
    for _ in range(3000):
        if len(place.host.seen) == count:
            break
        await asyncio.sleep(0.01)
    assert place.host.seen == [f"{STRANGERS}/user 1000"] * count
    return [*seen, looked[0]]


@pytest.mark.usefixtures("not_the_daemon")
def test_who_is_slow_to_look_at_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = asyncio.run(slowly_looked_at(tmp_path / "s", 6, monkeypatch))
    assert seen[0] == 1 and seen[5] <= 2, "the others are looked at later"
    assert seen[-1] == 6


class Asking(Noting):
    """A server that asks where a peer stands: when it is let in, and once more later."""

    def __init__(self) -> None:
        super().__init__()
        self.peers: list[Peer] = []
        self.places: list[str] = []

    def let_in(self, sock: socket.socket, peer: Peer, crowd: Crowd) -> None:
        self.places.append(peer.cgroup_path())
        self.peers.append(peer)
        sock.close()


async def places_seen(path: Path, at_once: bool) -> list[str]:
    place = Place(path, in_session)
    host = place.host = Asking()
    place.lobby = Lobby(host, in_session, place.budgets, place.turns, "connects")
    if not at_once:
        place.turns.submit("session y", lambda: None)
    place.connect(1)
    await place.settle()
    (peer,) = host.peers
    host.places.append(peer.cgroup_path())
    peer.close()
    return host.places


@pytest.mark.usefixtures("not_the_daemon")
@pytest.mark.parametrize(
    ("at_once", "seen"),
    [
        pytest.param(True, ["/first", "/second"], id="one look where it is served at once"),
        pytest.param(False, ["/second", "/third"], id="another one where it has waited"),
    ],
)
def test_where_a_peer_stands_is_read_anew_after_a_wait(
    at_once: bool, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = iter(("/first", "/second", "/third"))
    for module in ("peers", "lobby"):
        monkeypatch.setattr(f"agentcgroupd.rpc.{module}.path_of", lambda pid: next(places))
    assert asyncio.run(places_seen(tmp_path / "s", at_once)) == seen
