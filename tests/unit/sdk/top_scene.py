"""A pool as `top` may find it: four agents, one important, two calls paused, two that wait."""

from __future__ import annotations

from agentcgroup.cli.live import Look, Rates
from agentcgroup.types import CallInfo, PoolInfo, SessionInfo
from agentcgroup.v1 import agentcgroup_pb2 as pb

GIB, MIB = 1 << 30, 1 << 20
AT_UNIX_USEC = 1_767_261_845_000_000


def usage(held: int, cpu_s: float, io: int = 0, net: int | None = None) -> pb.Usage:
    """Use of something; `io` and `net` in bytes so far."""
    made = pb.Usage(
        memory_current_bytes=held,
        cpu_usage_usec=int(cpu_s * 1e6),
        io_read_bytes=io,
        io_write_bytes=0,
    )
    if net is not None:
        made.net.receive_bytes = net
    return made


def session(name: str, priority: int, use: pb.Usage, most: int | None = None) -> pb.Session:
    """A session."""
    return pb.Session(
        id=name, cgroup_id=sum(name.encode()), priority=priority, memory_max_bytes=most, usage=use
    )


def call(
    number: int,
    owner: str,
    name: str,
    use: pb.Usage,
    priority: int = 50,
    most: int | None = None,
    **rest: object,
) -> pb.Call:
    """An open call."""
    made = pb.Call(
        id=f"{number:012x}",
        session_id=owner,
        name=name,
        argv=[name, "-q"],
        state=pb.CALL_STATE_RUNNING,
        cgroup_id=number,
        usage=use,
        memory_high_bytes=use.memory_current_bytes + 64 * MIB,
    )
    made.grant.priority = priority
    if most is not None:
        made.grant.memory_max_bytes = most
    for field, value in rest.items():
        setattr(made, field, value)
    return made


def waiting(number: int, owner: str, name: str, position: int, expects: int) -> pb.Call:
    """A call in the queue."""
    made = pb.Call(
        id=f"{number:012x}", session_id=owner, name=name, state=pb.CALL_STATE_WAITING, argv=[name]
    )
    made.place.position, made.place.waiting = position, 2
    made.place.waited_usec = 41_000_000 // position
    made.place.expected_bytes, made.place.room_bytes = expects, 900 * MIB
    return made


def look(later_s: float) -> Look:
    """Look at the pool, so many seconds after the scene began."""
    t = later_s
    sessions = [
        session("planner", 80, usage(3 * GIB, 40 + 1.4 * t, int(20 * MIB * t), int(300 * t))),
        session("refactor-7", 50, usage(5 * GIB + 200 * MIB, 90 + 1.1 * t, int(90 * MIB * t))),
        session("nightly", 20, usage(4 * GIB, 10 + 0.2 * t, 0, 0), 4 * GIB + 100 * MIB),
        session("scratch", 20, usage(600 * MIB, 1, 0, 0)),
    ]
    paused = (
        "Paused: the pool is 93 % full, and pytest of planner is more important and still grows."
    )
    calls = [
        call(0xA1, "planner", "pytest", usage(2700 * MIB, 30 + 1.4 * t), 80, 4 * GIB),
        call(0xB1, "refactor-7", "cargo", usage(5 * GIB, 80 + 1.1 * t, int(90 * MIB * t))),
        call(
            0xC1,
            "nightly",
            "make",
            usage(3600 * MIB, 9),
            20,
            state=pb.CALL_STATE_FROZEN,
            paused_why=paused,
            frozen_usec=12_400_000,
        ),
        call(0xC2, "nightly", "ld", usage(200 * MIB, 1 + 0.2 * t), 20),
        call(
            0xD1,
            "scratch",
            "python3",
            usage(400 * MIB, 1),
            20,
            state=pb.CALL_STATE_FROZEN,
            paused_why="The operator paused it: lunch",
            frozen_usec=75_000_000,
            held=True,
        ),
        waiting(0xE1, "refactor-7", "link", 1, 2 * GIB),
        waiting(0xE2, "scratch", "npm", 2, 1500 * MIB),
    ]
    pool = pb.Pool(
        memory_max_bytes=14 * GIB,
        memory_current_bytes=13 * GIB,
        cpu_millicores=4000,
        sessions_open=4,
        calls_open=5,
        usage=usage(13 * GIB, 141 + 2.7 * t),
        memory_some_percent=6,
        cpu_some_percent=11,
        io_some_percent=3,
    )
    return Look(
        PoolInfo.from_proto(pool),
        [SessionInfo.from_proto(each) for each in sessions],
        [CallInfo.from_proto(each) for each in calls],
        later_s,
    )


def scene() -> tuple[Look, Rates]:
    """Two looks, two seconds apart."""
    before, now = look(0), look(2)
    return now, Rates.between(before, now)
