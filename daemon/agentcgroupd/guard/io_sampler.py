"""Waits for disks, and their users, read only where the policy asks for it.

Pressure is a read of one small file of the pool, and one of each important session; calls are read
while there is pressure, or where something was done to one of them.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import KnobError
from agentcgroupd.guard.session_sampler import parse_stalled
from agentcgroupd.policy.schema import IoStalled, Policy
from agentcgroupd.policy.snapshot import CallIo
from agentcgroupd.state.session import Call, Session
from agentcgroupd.units import IMPORTANT_PRIORITY

log = logging.getLogger(__name__)

EVERY_USEC = 500_000
"""The shortest time between two reads."""
CALLS_MOST = 256
"""Calls that are read at a time, the least important first: those are held back."""
SESSIONS_MOST = 64
"""Important and adopted sessions that are read at a time."""
STALLED = Knob("io.pressure", parse_stalled)


def bytes_moved(text: str) -> int:
    """Bytes read and written of all devices in io.stat. A device that lies on others counts with
    each of them: rates are compared with one another alone."""
    moved = 0
    for word in text.split():
        if word.startswith(("rbytes=", "wbytes=")):
            moved += int(word[7:])
    return moved


_MOVED = Knob("io.stat", bytes_moved)


def asks_for_disks(policy: Policy) -> bool:
    """Tell whether a ruleset of the policy goes by pressure on disks."""
    return any(isinstance(d, IoStalled) for r in policy.rulesets if r.enabled for d in r.when)


@dataclass(slots=True)
class _Total:
    at_usec: int
    count: int


class IoSampler:
    """Keeps what was last seen. `look` is to be called before each sample of the pool."""

    def __init__(
        self,
        pool: Cgroup,
        calls: Mapping[str, Call],
        sessions: Callable[[], Iterable[Session]],
        policy: Callable[[], Policy],
        lowered: dict[str, Call],
    ) -> None:
        """`lowered`: calls that were held back, by their ids; those that are no longer are taken
        out. With thousands of open calls, they are not all asked at each look."""
        self._lowered = lowered
        self._pool = pool
        self._calls = calls
        self._sessions = sessions
        self._policy = policy
        self._looked_usec: int | None = None
        self._totals: dict[str, _Total] = {}
        self._shares: dict[str, float] = {}
        self._turn = 0
        self.pool_share: float | None = 0.0
        """Part of the last moment in which some task of the pool, or of the adopted session that
        waits most, waited for disks; None: this kernel does not tell."""
        self.calls: tuple[CallIo, ...] = ()

    def share_of(self, session_id: str) -> float:
        """Tell the same of an important or adopted session; 0 of any other."""
        return self._shares.get(session_id, 0.0)

    def look(self, now_usec: int) -> bool:
        """Read what is due. Returns whether a ruleset may hold, or something is to be undone."""
        if self._looked_usec is not None and now_usec - self._looked_usec < EVERY_USEC:
            return bool(self.calls)
        self._looked_usec = now_usec
        lowered = self._still_lowered()
        if not asks_for_disks(self._policy()) and not lowered:
            self.pool_share, self.calls = 0.0, ()
            self._shares.clear()
            self._totals.clear()
            return False
        before, self._totals = self._totals, {}
        self.pool_share = self._stalled("", self._pool, before, now_usec)
        self._look_at_sessions(before, now_usec)
        if self.pool_share or lowered:
            self.calls = tuple(self._read_calls(before, now_usec))
        else:
            self.calls = ()
        return bool(self.calls)

    def _look_at_sessions(self, before: Mapping[str, _Total], now_usec: int) -> None:
        """Read how long important sessions wait, if any task of the pool does, and adopted sessions
        in any case, whose cgroups lie beside the pool's. The adopted one that waits most counts as
        the pool. Where there are many, they have their turns, and the last share counts till then.
        """
        last, self._shares = self._shares, {}
        if self.pool_share is None:
            return
        asked = [
            session
            for session in self._sessions()
            if session.adopted
            or (self.pool_share and session.limits.priority >= IMPORTANT_PRIORITY)
        ]
        turn = self._turn % max(1, len(asked))
        self._turn = turn + SESSIONS_MOST
        for number, session in enumerate(asked[turn:] + asked[:turn]):
            key = f"s {session.id}"
            if number < SESSIONS_MOST:
                share = self._stalled(key, session.cgroup, before, now_usec) or 0.0
            else:
                share = last.get(session.id, 0.0)
                if key in before:
                    self._totals[key] = before[key]
            self._shares[session.id] = share
            if session.adopted:
                self.pool_share = max(self.pool_share, share)

    def _still_lowered(self) -> bool:
        """Tell whether something of an open call is held back."""
        for call_id, call in list(self._lowered.items()):
            if call_id not in self._calls or not call.disks.is_lowered:
                del self._lowered[call_id]
        return bool(self._lowered)

    def _stalled(
        self, key: str, cgroup: Cgroup, before: Mapping[str, _Total], now_usec: int
    ) -> float | None:
        try:
            total = cgroup.read_if(STALLED)
        except KnobError as error:
            if error.errno != errno.EOPNOTSUPP:
                log.debug("%s", error)
            return None
        if total is None:
            return None
        rate = self._rate(key, total, before, now_usec)
        return 0.0 if rate is None else min(1.0, rate / 1e6)

    def _rate(
        self, key: str, count: int, before: Mapping[str, _Total], now_usec: int
    ) -> float | None:
        """Give by how much a count has risen a second; None: it is read for the first time."""
        self._totals[key] = _Total(now_usec, count)
        seen = before.get(key)
        if seen is None:
            return None
        return max(0, count - seen.count) * 1e6 / max(1, now_usec - seen.at_usec)

    def _read_calls(self, before: Mapping[str, _Total], now_usec: int) -> Iterable[CallIo]:
        calls = [
            call
            for call in self._calls.values()
            if call.parent is None and call.state != pb.CALL_STATE_ENDING
        ]
        calls.sort(key=lambda call: (not call.disks.is_lowered, call.priority))
        for call in calls[:CALLS_MOST]:
            try:
                moved = call.cgroup.read_if(_MOVED)
            except KnobError:
                continue  # it has just ended
            rate = None if moved is None else self._rate(call.id, moved, before, now_usec)
            if rate or call.disks.is_lowered:
                yield CallIo(
                    id=call.id,
                    name=call.name,
                    session_id=call.session.id,
                    priority=call.priority,
                    bytes_per_s=rate or 0.0,
                    weight_lowered_usec=_since(now_usec, call.disks.weight_since_usec),
                    held_usec=_since(now_usec, call.disks.held_since_usec),
                )


def _since(now_usec: int, at_usec: int | None) -> int | None:
    return None if at_usec is None else max(0, now_usec - at_usec)
