"""What a session, a user outside of all sessions, and all of them together may ask of the daemon.

A crowd is all that one session's processes have open, or all that a user's processes outside of
sessions have. Rates are token buckets: a crowd that has spent its own is served later. Counts are
limits: what goes beyond is refused.

One user may have tens of thousands of user ids, and be a crowd with each. So all users outside of
sessions but root, the strangers, have besides a share of what there is for all, and no session
loses anything to them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from agentcgroupd.config import LimitsConfig
from agentcgroupd.errors import ResourceExhausted
from agentcgroupd.telemetry.metrics import Metrics

PID_KNOWN_S = 0.2
"""How long it is remembered to which crowd a process belongs, so that one which is to be refused
again is refused at little cost. Nothing is granted by that."""
PIDS_KNOWN_MAX = 4096
ALL_FACTOR = 8
"""All together may have as much a second as this many crowds."""
STRANGERS_PART = 4
"""Strangers have one in so many of what there is for all."""
STRANGERS = "users"
"""Group of their turns on the loop (turns.Turns)."""
STRANGERS_AGAIN_S = 0.01
"""After this time paused connections of strangers are looked at again."""
RESUMED_MOST = 32
"""How many of them at a time."""


def user_key(uid: int) -> str:
    """The crowd of a user outside of sessions."""
    return f"user {uid}"


def _is_stranger(key: str) -> bool:
    return key.startswith("user ") and key != user_key(0)


class Bucket:
    """Tokens that come back at a steady rate, up to `burst`. It may be overdrawn."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        """`rate`: tokens a second."""
        self._rate, self._burst = rate, burst
        self._left, self._at = burst, now

    def left(self, now: float) -> float:
        """Tokens there are now; negative: overdrawn."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return self._left

    def take(self, tokens: float) -> None:
        """Spend tokens, there or not."""
        self._left -= tokens

    def wait_s(self, now: float, tokens: float = 1.0) -> float:
        """Seconds until there are `tokens` (at most what the bucket holds)."""
        lacking = min(tokens, self._burst) - self.left(now)
        return max(0.0, lacking / self._rate)


class Paused(Protocol):
    """A connection whose bytes wait until its crowd may send more."""

    def resume(self) -> None:
        """Go on, or pause again."""


@dataclass(slots=True, eq=False)
class Share:
    """What many crowds have together."""

    requests: Bucket
    octets: Bucket
    connections_max: int
    attaching_max: int
    streams_max: int
    watchers_max: int
    answer_bytes_max: int
    connections: int = 0
    attaching: int = 0
    streams: int = 0
    watchers: int = 0
    answer_bytes: int = 0


@dataclass(slots=True, eq=False)
class Crowd:
    """All connections of a session, or of a user outside of sessions."""

    key: str
    """What people are told: `session x` or `user 1000`."""
    requests: Bucket
    octets: Bucket
    connects: Bucket
    packets: Bucket
    shares: tuple[Share, ...] = ()
    """What it has together with others: with all, and before that with all strangers, if it is one
    of these."""
    connections: dict[int, Callable[[], None]] = field(default_factory=dict)
    """What closes each open connection, by a number of its own, oldest first."""
    attaching: int = 0
    """Open connections of the attach socket."""
    streams: int = 0
    watchers: int = 0
    answer_bytes: int = 0
    """Size of the answers that were given and have not been taken."""
    refusals: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    """Answers to requests that are refused unread, by reason: in words, and as a message."""
    paused: deque[Paused] = field(default_factory=deque)
    timer: asyncio.TimerHandle | None = None

    @property
    def is_stranger(self) -> bool:
        """Whether it is a user outside of sessions, other than root."""
        return len(self.shares) > 1

    @property
    def rated(self) -> tuple[Crowd | Share, ...]:
        """Whose rates hold for it: its own, and those of its shares."""
        return (self, *self.shares)

    @property
    def turns_key(self) -> str:
        """Whose turn on the loop it is when something is done for it."""
        return f"{STRANGERS}/{self.key}" if self.is_stranger else self.key

    @property
    def is_idle(self) -> bool:
        """Whether nothing of it is open."""
        return not (self.connections or self.attaching or self.streams or self.paused)


class Budgets:
    """All crowds, and what they have together."""

    def __init__(self, limits: LimitsConfig, connections_max: int, metrics: Metrics) -> None:
        """`connections_max`: gRPC connections of one crowd at a time."""
        self.limits = limits
        self._connections_max = connections_max
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._crowds: dict[str, Crowd] = {}
        self._pids: dict[int, tuple[Crowd, float]] = {}
        self._all = self._share(1)
        self._strangers = self._share(STRANGERS_PART)
        self._paused_strangers = deque[tuple[Crowd, Paused]]()
        self._number = 0

    def _share(self, part: int) -> Share:
        """A share: one part in `part` of what there is for all."""
        limits, now, factor = self.limits, self._loop.time(), ALL_FACTOR / part
        rate = factor * limits.bytes_per_s
        return Share(
            Bucket(factor * limits.requests_per_s, factor * limits.requests_burst, now),
            Bucket(rate, rate / 4, now),
            max(1, limits.connections_all // part),
            limits.attaching * ALL_FACTOR // part,
            limits.streams * ALL_FACTOR // part,
            limits.watchers * ALL_FACTOR // part,
            limits.answer_bytes_all // part,
        )

    @property
    def answer_bytes(self) -> int:
        """Size of the answers of all that were given and have not been taken."""
        return self._all.answer_bytes

    @property
    def connections(self) -> int:
        """Open connections of all."""
        return self._all.connections

    def crowd(self, key: str) -> Crowd:
        """The crowd of that name."""
        crowd = self._crowds.get(key)
        if crowd is None:
            if len(self._crowds) > PIDS_KNOWN_MAX:
                self._crowds = {k: c for k, c in self._crowds.items() if not c.is_idle}
            limits, now = self.limits, self._loop.time()
            crowd = self._crowds[key] = Crowd(
                key,
                Bucket(limits.requests_per_s, limits.requests_burst, now),
                Bucket(limits.bytes_per_s, limits.bytes_per_s / 4, now),
                Bucket(limits.connects_per_s, limits.connects_per_s, now),
                Bucket(limits.packets_per_s, limits.packets_per_s, now),
                (self._strangers, self._all) if _is_stranger(key) else (self._all,),
            )
        return crowd

    def crowds(self) -> list[Crowd]:
        """All crowds that have something open."""
        return [crowd for crowd in self._crowds.values() if not crowd.is_idle]

    def refused(self, what: str) -> None:
        """Count a refusal."""
        self._metrics.refused.labels(what).inc()

    # Who it is

    def known(self, pid: int) -> Crowd | None:
        """The crowd to which a process belonged a moment ago."""
        found = self._pids.get(pid)
        return found[0] if found is not None and found[1] > self._loop.time() else None

    def remember(self, pid: int, crowd: Crowd) -> None:
        """Keep in mind to which crowd a process belongs."""
        if len(self._pids) >= PIDS_KNOWN_MAX:
            self._pids.clear()
        self._pids[pid] = (crowd, self._loop.time() + PID_KNOWN_S)

    # Connections

    def may_connect(self, crowd: Crowd) -> str:
        """Why a crowd may have no further gRPC connection now; empty: it may."""
        if len(crowd.connections) >= self._connections_max:
            return "connections"
        return "connects" if crowd.connects.left(self._loop.time()) < 1 else ""

    def connected(self, crowd: Crowd, close: Callable[[], None]) -> int:
        """Count a new connection; returns the number to give to `disconnected`. Where there are too
        many of all crowds together, the oldest of the crowd with the most is closed for it, of a
        stranger as long as there is one; where strangers have too many, one of theirs."""
        crowd.connects.take(1)
        if crowd.is_stranger and self._strangers.connections >= self._strangers.connections_max:
            self._close_one("connections_strangers")
        elif self._all.connections >= self._all.connections_max:
            self._close_one("connections_all")
        self._number += 1
        crowd.connections[self._number] = close
        for share in crowd.shares:
            share.connections += 1
        return self._number

    def _close_one(self, why: str) -> None:
        """Close the oldest connection of the stranger, or else the crowd, that has the most."""
        strangers = bool(self._strangers.connections)
        crowds = (crowd for crowd in self._crowds.values() if crowd.is_stranger or not strangers)
        most = max(crowds, key=lambda crowd: len(crowd.connections))
        self.refused(why)
        next(iter(most.connections.values()))()

    def disconnected(self, crowd: Crowd, number: int) -> None:
        """Count the end of a connection."""
        if crowd.connections.pop(number, None) is not None:
            for share in crowd.shares:
                share.connections -= 1

    # At the attach socket

    def may_attach(self, crowd: Crowd) -> str:
        """Why a crowd may send no further packet now; empty: it may."""
        if crowd.attaching >= self.limits.attaching or (
            crowd.is_stranger and self._strangers.attaching >= self._strangers.attaching_max
        ):
            return "attaching"
        return "packets" if crowd.packets.left(self._loop.time()) < 1 else ""

    def attached(self, crowd: Crowd, count: int) -> None:
        """Count connections of the attach socket that were opened; negative: closed."""
        crowd.attaching += count
        for share in crowd.shares:
            share.attaching += count

    # What comes in over gRPC

    def may_ask(self, crowd: Crowd) -> bool:
        """Whether one more request of a crowd may be passed on now."""
        now = self._loop.time()
        return all(of.requests.left(now) >= 1 for of in crowd.rated)

    def may_send(self, crowd: Crowd) -> bool:
        """Whether bytes of a crowd may be passed on now."""
        now = self._loop.time()
        return all(of.octets.left(now) > 0 for of in crowd.rated)

    def asked(self, crowd: Crowd) -> None:
        """Count a request that was passed on."""
        for of in crowd.rated:
            of.requests.take(1)

    def took(self, crowd: Crowd, seconds: float) -> None:
        """Charge a stranger for the loop's time: a request that took t seconds costs what its rate
        allows in 10 t, so that its requests get a tenth of the time."""
        if crowd.is_stranger:
            for of in crowd.rated[:-1]:
                of.requests.take(10 * seconds * self.limits.requests_per_s)
            crowd.packets.take(10 * seconds * self.limits.packets_per_s)

    def sent(self, crowd: Crowd, cost_bytes: int) -> None:
        """Count bytes that were passed on."""
        for of in crowd.rated:
            of.octets.take(cost_bytes)

    def pause(self, crowd: Crowd, connection: Paused) -> None:
        """Have a connection resumed when its crowd may send again."""
        if crowd.is_stranger:
            # A timer for each of thousands of them would itself be a flood.
            if not self._paused_strangers:
                self._loop.call_later(STRANGERS_AGAIN_S, self._wake_strangers)
            self._paused_strangers.append((crowd, connection))
            return
        crowd.paused.append(connection)
        if crowd.timer is None:
            self._set_timer(crowd)

    def _wake_strangers(self) -> None:
        for _ in range(min(RESUMED_MOST, len(self._paused_strangers))):
            crowd, connection = self._paused_strangers.popleft()
            if self.may_ask(crowd) and self.may_send(crowd):
                connection.resume()
            else:
                self._paused_strangers.append((crowd, connection))
        if self._paused_strangers:
            self._loop.call_later(STRANGERS_AGAIN_S, self._wake_strangers)

    def _set_timer(self, crowd: Crowd) -> None:
        now = self._loop.time()
        waits = [
            wait_s
            for of in crowd.rated
            for wait_s in (of.requests.wait_s(now), of.octets.wait_s(now))
        ]
        crowd.timer = self._loop.call_later(max(*waits, 0.001), self._wake, crowd)

    def _wake(self, crowd: Crowd) -> None:
        crowd.timer = None
        for _ in range(len(crowd.paused)):
            if not (self.may_ask(crowd) and self.may_send(crowd)):
                break
            crowd.paused.popleft().resume()
        if crowd.paused and crowd.timer is None:
            self._set_timer(crowd)

    # What is being answered

    def open_stream(self, crowd: Crowd, watches: bool) -> None:
        """Count a request that is being answered. `watches`: with a stream without end. Raises
        ResourceExhausted."""
        if crowd.streams >= self.limits.streams:
            self._refuse("streams", crowd, f"{crowd.streams} requests at a time", "streams")
        if watches and crowd.watchers >= self.limits.watchers:
            self._refuse("watchers", crowd, f"{crowd.watchers} streams of events", "watchers")
        strangers = self._strangers
        if crowd.is_stranger and (
            strangers.streams >= strangers.streams_max
            or (watches and strangers.watchers >= strangers.watchers_max)
        ):
            self._refuse("streams_strangers", crowd, "a request while too many others are answered")
        self.check_answers(crowd)
        self._count_stream(crowd, 1, watches)

    def close_stream(self, crowd: Crowd, watches: bool) -> None:
        """Count the end of a request."""
        self._count_stream(crowd, -1, watches)

    @staticmethod
    def _count_stream(crowd: Crowd, count: int, watches: bool) -> None:
        for of in crowd.rated:
            of.streams += count
            of.watchers += count * watches

    def check_answers(self, crowd: Crowd) -> None:
        """Refuse a request of a crowd that does not take the answers it has got. Raises
        ResourceExhausted."""
        if crowd.answer_bytes > self.limits.answer_bytes:
            self._refuse("answers", crowd, "more answers than it takes", "answer_bytes")
        if any(share.answer_bytes > share.answer_bytes_max for share in crowd.shares):
            self._refuse("answers_all", crowd, "an answer while too many others wait to be taken")

    def answered(self, crowd: Crowd, size_bytes: int) -> None:
        """Count an answer that was given; a negative size: it was taken."""
        crowd.answer_bytes += size_bytes
        for share in crowd.shares:
            share.answer_bytes += size_bytes

    def _refuse(self, what: str, crowd: Crowd, much: str, key: str = "") -> None:
        self.refused(what)
        limit = f" (limits.{key})" if key else ""
        raise ResourceExhausted(f"{crowd.key} has {much}, which is all it may have{limit}", what)
