"""What a session, a user outside of all sessions, and all of them together may ask of the daemon.

A crowd is all that one session's processes have open, or all that a user's processes outside of
sessions have. Rates are token buckets: a crowd that has spent its own is served later. Counts are
limits: what goes beyond is refused.
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
class Crowd:
    """All connections of a session, or of a user outside of sessions."""

    key: str
    """What people are told: `session x` or `user 1000`."""
    requests: Bucket
    octets: Bucket
    connects: Bucket
    packets: Bucket
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
        now = self._loop.time()
        self._requests = Bucket(
            ALL_FACTOR * limits.requests_per_s, ALL_FACTOR * limits.requests_burst, now
        )
        self._bytes = Bucket(
            ALL_FACTOR * limits.bytes_per_s, ALL_FACTOR * limits.bytes_per_s / 4, now
        )
        self.answer_bytes = 0
        self.connections = 0
        self._number = 0

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
        many of all crowds together, the oldest of the crowd with the most is closed for it."""
        crowd.connects.take(1)
        if self.connections >= self.limits.connections_all:
            most = max(self._crowds.values(), key=lambda other: len(other.connections))
            self.refused("connections_all")
            next(iter(most.connections.values()))()
        self._number += 1
        crowd.connections[self._number] = close
        self.connections += 1
        return self._number

    def disconnected(self, crowd: Crowd, number: int) -> None:
        """Count the end of a connection."""
        if crowd.connections.pop(number, None) is not None:
            self.connections -= 1

    # What comes in over gRPC

    def may_ask(self, crowd: Crowd) -> bool:
        """Whether one more request of a crowd may be passed on now."""
        now = self._loop.time()
        return crowd.requests.left(now) >= 1 and self._requests.left(now) >= 1

    def may_send(self, crowd: Crowd) -> bool:
        """Whether bytes of a crowd may be passed on now."""
        now = self._loop.time()
        return crowd.octets.left(now) > 0 and self._bytes.left(now) > 0

    def asked(self, crowd: Crowd) -> None:
        """Count a request that was passed on."""
        crowd.requests.take(1)
        self._requests.take(1)

    def sent(self, crowd: Crowd, cost_bytes: int) -> None:
        """Count bytes that were passed on."""
        crowd.octets.take(cost_bytes)
        self._bytes.take(cost_bytes)

    def pause(self, crowd: Crowd, connection: Paused) -> None:
        """Have a connection resumed when its crowd may send again."""
        crowd.paused.append(connection)
        if crowd.timer is None:
            self._set_timer(crowd)

    def _set_timer(self, crowd: Crowd) -> None:
        now = self._loop.time()
        wait_s = max(
            crowd.requests.wait_s(now),
            crowd.octets.wait_s(now),
            self._requests.wait_s(now),
            self._bytes.wait_s(now),
            0.001,
        )
        crowd.timer = self._loop.call_later(wait_s, self._wake, crowd)

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
        self.check_answers(crowd)
        crowd.streams += 1
        crowd.watchers += watches

    def close_stream(self, crowd: Crowd, watches: bool) -> None:
        """Count the end of a request."""
        crowd.streams -= 1
        crowd.watchers -= watches

    def check_answers(self, crowd: Crowd) -> None:
        """Refuse a request of a crowd that does not take the answers it has got. Raises
        ResourceExhausted."""
        if crowd.answer_bytes > self.limits.answer_bytes:
            self._refuse("answers", crowd, "more answers than it takes", "answer_bytes")
        if self.answer_bytes > self.limits.answer_bytes_all:
            self._refuse("answers_all", crowd, "an answer while too many others wait to be taken")

    def answered(self, crowd: Crowd, size_bytes: int) -> None:
        """Count an answer that was given; a negative size: it was taken."""
        crowd.answer_bytes += size_bytes
        self.answer_bytes += size_bytes

    def _refuse(self, what: str, crowd: Crowd, much: str, key: str = "") -> None:
        self.refused(what)
        limit = f" (limits.{key})" if key else ""
        raise ResourceExhausted(f"{crowd.key} has {much}, which is all it may have{limit}", what)
