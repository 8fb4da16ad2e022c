"""What holds the memory of a session, and cannot give it back without swap: its agent, its calls,
and files in memory that outlived the call that wrote them.

Page cache does not count: the kernel drops it before it kills. Files in tmpfs, /dev/shm among them,
are charged to the cgroup of their writer, and to the session alone once that is gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import CgroupGone, KnobError
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.state.ending import Held
from agentcgroupd.state.session import Call, Session
from agentcgroupd.units import show_bytes

HELD_INTERVAL_S = 1.0
_MATTERS_BYTES = 1 << 20


def _held(stat: Mapping[str, int]) -> int:
    return stat["anon"] + stat["shmem"] + stat.get("kernel", 0)


def _stat(cgroup: Cgroup) -> dict[str, int]:
    try:
        return cgroup.read(knobs.MEMORY_STAT)
    except CgroupGone:
        return {"anon": 0, "shmem": 0}


def _outermost(session: Session) -> list[Call]:
    """The calls of a session that are in no other: what those inside hold is in theirs."""
    return [call for call in session.calls.values() if call.parent is None]


def held_by(session: Session, besides: Call | None = None) -> Held:
    """What holds the memory of a session that has a memory controller now. `besides`: a call that
    has ended, whose files have outlived it. Raises KnobError."""
    whole, agent = session.cgroup.read(knobs.MEMORY_STAT), _stat(session.agent)
    calls = [_stat(call.cgroup) for call in _outermost(session) if call is not besides]
    files = whole["shmem"] - agent["shmem"] - sum(stat["shmem"] for stat in calls)
    return Held(_held(agent), sum(map(_held, calls)), max(0, files))


def held_beside_calls(session: Session) -> Held:
    """What the agent and files without a call hold; calls are not counted. Read at most once a
    second: memory.stat makes the kernel gather its per-CPU counters, and every call that begins
    asks for this. Nothing where there is no memory controller. Raises KnobError."""
    now = time.monotonic()
    if knobs.MEMORY_STAT.file in session.offered and now - session.held_at >= HELD_INTERVAL_S:
        session.held_at = now
        agent, whole = _stat(session.agent), session.cgroup.read(knobs.MEMORY_STAT)
        files = whole["shmem"] - agent["shmem"]
        if files >= _MATTERS_BYTES:
            calls = [call.cgroup for call in _outermost(session)]
            files -= sum(_stat(cgroup)["shmem"] for cgroup in calls)
        session.held = Held(_held(agent), 0, max(0, files))
    return session.held


def used_for_good(cgroup: Cgroup) -> int | None:
    """Bytes that a cgroup uses and the kernel cannot simply drop, as it does with page cache. None
    without a memory controller. Raises KnobError."""
    current = cgroup.read_if(knobs.MEMORY_CURRENT)
    if current is None:
        return None
    stat = cgroup.read(knobs.MEMORY_STAT)
    cache = stat["active_file"] + stat["inactive_file"] + stat.get("slab_reclaimable", 0)
    return max(0, current - cache)


def used_of_pool(pool: Pool) -> int | None:
    """Bytes that all sessions use and the kernel cannot simply drop, those of adopted ones as they
    were when these were last looked at. None without a memory controller. Raises KnobError."""
    used = used_for_good(pool.cgroup)
    return None if used is None else used + pool.adopted_for_good_bytes


def look_at_adopted(pool: Pool, sessions: Iterable[Session]) -> Iterator[None]:
    """Have the pool know what adopted sessions hold, one session a step."""
    held = for_good = 0
    for session in sessions:
        if session.adopted and not session.closing:
            try:
                held += session.cgroup.read_if(knobs.MEMORY_CURRENT) or 0
                for_good += used_for_good(session.cgroup) or 0
            except KnobError:  # its runtime has just removed it
                continue
            yield
    pool.adopted_bytes, pool.adopted_for_good_bytes = held, for_good


def agent_kills(session: Session) -> int | None:
    """How many processes of the agent itself, in no call, the kernel has killed for want of memory.
    None: it does not count them here. Raises KnobError."""
    events = session.agent.read_if(knobs.MEMORY_EVENTS)
    return None if events is None else events.get("oom_kill", 0)


def killed_in_words(session: Session, kills: int | None) -> str:
    """Say why the kernel has killed processes of the agent; empty where it has not."""
    if not kills:
        return ""
    what = "a process" if kills == 1 else f"{kills} processes"
    top = session.limits.memory_max_bytes
    limit = f"the session's limit is {show_bytes(top)}" if top else "the session has no own limit"
    return f"the kernel killed {what} of the agent itself for want of memory; {limit}"
