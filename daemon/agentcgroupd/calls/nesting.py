"""Calls inside calls, as cgroups inside cgroups.

When the first call is begun in another one, the cgroup of that is split in place: its processes go
to `main` below it, and the call inside gets a cgroup beside that. So the kernel itself holds the
sum of both within the outer call's limits, freezes and kills them together, and accounts for both.
"""

from __future__ import annotations

import errno
import logging

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.evidence import main_status
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup, move_all
from agentcgroupd.enforce.kill import ask_end
from agentcgroupd.errors import FailedPrecondition, KnobError, ResourceExhausted
from agentcgroupd.intents.inner import Room
from agentcgroupd.state.ending import Asker
from agentcgroupd.state.session import (
    INNER_IDS_MOST,
    MAIN_LEAF,
    Call,
    boottime_usec,
    frozen_usec,
)

log = logging.getLogger(__name__)

SPLIT_MOST = 256
"""Processes that a call may have and be split: the loop is held while they are moved, some 30 us
each."""
SPLIT_TRIES = 8
"""How often the processes of a call are moved and its controllers enabled, while it forks."""
IDS_SHOWN = 5
INSIDE_SHARE = 0.75
"""Part of a session's calls_max for calls inside others: the rest is its agent's."""


def check(outer: Call, depth_max: int) -> None:
    """Refuse a call inside one that is ending, too deep, or where so many calls of the session are
    inside others that few are left for its agent. Raises FailedPrecondition or
    ResourceExhausted."""
    if outer.state == pb.CALL_STATE_ENDING:
        raise FailedPrecondition(f"call {outer.id}, in which it would begin, is ending")
    if outer.depth >= depth_max:
        sentence = (
            f"calls: call {outer.id} is {outer.depth} calls deep already, so none can begin in it; "
            "run the command without a call of its own"
        )
        allowed = f"at most {depth_max} calls in one another"
        raise ResourceExhausted(sentence, "depth", str(outer.depth + 1), allowed)
    session = outer.session
    inside = sum(call.parent is not None for call in session.calls.values())
    most = int(session.limits.calls_max * INSIDE_SHARE)
    if inside >= max(1, most):
        sentence = (
            f"calls: {inside} calls of this session are open inside others, which is all that may "
            "be; end one first"
        )
        raise ResourceExhausted(sentence, "calls_max", str(inside + 1), f"at most {most}")


def room_in(outer: Call, inner: Call | None = None) -> Room:
    """Read what is left of a call for one inside it: a new one, or an open one. Raises
    KnobError."""
    grant, now = outer.grant, boottime_usec()
    memory, pids = grant.memory_max_bytes, grant.pids_max
    if memory is not None:
        memory -= _held_bytes(outer) - (_held_bytes(inner) if inner is not None else 0)
    if pids is not None:
        # The process that enters is one of the outer call's already.
        pids = max(1, pids + 1 - _pids(outer) + (_pids(inner) if inner is not None else 0))
        pids = min(pids, grant.pids_max or pids)
    timeout = grant.timeout_usec
    if timeout is not None:
        began = now if inner is None else inner.began_boot_usec
        timeout -= began - outer.began_boot_usec - frozen_usec(outer, now)
        timeout = max(1, timeout)
    return Room(outer.id, grant, memory, pids, timeout)


def _held_bytes(call: Call) -> int:
    """Memory of a call that cannot be given back: the kernel drops page cache before it kills."""
    stat = call.cgroup.read(knobs.MEMORY_STAT) if _offers(call, knobs.MEMORY_STAT.file) else {}
    return stat.get("anon", 0) + stat.get("shmem", 0) + stat.get("kernel", 0)


def _pids(call: Call) -> int:
    file = knobs.PIDS_CURRENT
    return call.cgroup.read(file) if _offers(call, file.file) else 1


def _offers(call: Call, file: str) -> bool:
    return file in call.session.offered


def above(outer: Call | None) -> list[Cgroup]:
    """List the cgroups of a call and of those that it is in, the outermost first."""
    found = []
    while outer is not None:
        found.append(outer.cgroup)
        outer = outer.parent
    return found[::-1]


# Splitting


def split(outer: Call) -> None:
    """Make room for calls below a call's cgroup: its processes move to `main`, and what its session
    gives to calls is given to those inside. Raises FailedPrecondition, with the cgroup as it
    was."""
    try:
        if outer.main_leaf is not None:
            # An earlier daemon may have been killed half-way.
            _move_and_enable(outer, outer.main_leaf)
            return
        made = list(outer.cgroup.children())
        if made:
            raise FailedPrecondition(
                f"call {outer.id} has cgroups that its tool made, {made[0][:64]!r} among them, so "
                "no call can begin in it; run the command without a call of its own"
            )
        _check_processes(outer)
        main = outer.main_leaf = outer.cgroup.make_child(MAIN_LEAF)
    except KnobError as error:
        raise _unsplit(outer, error) from None
    try:
        # Before anything is moved: a daemon that is started again has to know where processes are.
        outer.cgroup.set_xattr(outer.record())
        _move_and_enable(outer, main)
    except KnobError as error:
        outer.main_leaf = None
        _join(outer, main)
        raise _unsplit(outer, error) from None


def _check_processes(outer: Call) -> None:
    """Refuse to split a call of too many processes. Raises ResourceExhausted, or KnobError."""
    count = len(outer.cgroup.procs())
    if count > SPLIT_MOST:
        sentence = (
            f"call {outer.id} has {count} processes, which are too many to make room for a call "
            "inside it; begin the first call inside earlier, or run the command without a call of "
            "its own"
        )
        allowed = f"at most {SPLIT_MOST} processes when the first call inside begins"
        raise ResourceExhausted(sentence, "processes", str(count), allowed)


def _unsplit(outer: Call, error: KnobError) -> FailedPrecondition:
    return FailedPrecondition(
        f"the cgroup of call {outer.id} cannot be split for a call inside it: {error}"
    )


def _move_and_enable(outer: Call, main: Cgroup) -> None:
    wanted = outer.cgroup_above.read(knobs.CGROUP_SUBTREE_CONTROL)
    for _ in range(SPLIT_TRIES):
        move_all(outer.cgroup, main, most=2 * SPLIT_MOST)
        refused = outer.cgroup.enable(wanted)
        if not refused:
            return
    what = f"its controllers {', '.join(refused)} cannot be given on"
    raise KnobError(OSError(errno.EBUSY, what), str(outer.cgroup.path), "cgroup.subtree_control")


def _join(outer: Call, main: Cgroup) -> None:
    """Undo a split that failed half-way."""
    try:
        for name in outer.cgroup.read(knobs.CGROUP_SUBTREE_CONTROL):
            outer.cgroup.write_text(knobs.CGROUP_SUBTREE_CONTROL.file, f"-{name}")
        move_all(main, outer.cgroup)
        main.remove()
        outer.cgroup.set_xattr(outer.record())
    except KnobError as error:
        log.error("call %s: its cgroup stays split: %s", outer.id, error)


# Going on, and ending


def begun(inner: Call) -> None:
    """Take down for a call that another one has begun in it. Raises KnobError."""
    outer = inner.parent
    if outer is not None and len(outer.inner_ids) < INNER_IDS_MOST:
        outer.inner_ids.append(inner.id)
        outer.cgroup.set_xattr(outer.record())


def went_on(call: Call) -> None:
    """Take down, at the end of a call, that its main process went on as a call inside it and how
    that ended; where it was ended by something else, that counts."""
    if not call.went_on_as or any(asked.main_ran for asked in call.account.asked):
        return
    report = call.session.report(call.went_on_as)
    how = "" if report is None else f" Of that: {report.sentence}"
    ask_end(call, Asker.WENT_ON, f"It went on as call {call.went_on_as}.{how}")


def inner_ends(inner: Call) -> None:
    """Tell a call that one inside it ends, whose cgroup is still there."""
    outer = inner.parent
    if outer is None:
        return
    if _reached_own_limit(inner) or inner.inner_oom:
        outer.inner_oom = inner.inner_oom or inner
    if any(asked.by is Asker.OUTER for asked in inner.account.asked):
        outer.ended_inside_count += 1
        if len(outer.ended_inside) < IDS_SHOWN:
            outer.ended_inside.append(inner.id)
    if outer.went_on_as == inner.id and outer.exit_status is None:
        status, evidence = main_status(inner)
        if evidence == pb.EVIDENCE_KERNEL:
            outer.exit_status = status
            keep_record(outer)


def keep_record(call: Call) -> None:
    """Write a call's record anew, unless its cgroup cannot be written to any more."""
    try:
        call.cgroup.set_xattr(call.record())
    except KnobError as error:
        log.debug("call %s: %s", call.id, error)


def _reached_own_limit(call: Call) -> bool:
    try:
        local = knobs.MEMORY_EVENTS_LOCAL
        return _offers(call, local.file) and call.cgroup.read(local)["oom"] > 0
    except KnobError as error:
        log.debug("call %s: %s", call.id, error)
        return False


def tell(report: pb.Report, call: Call) -> None:
    """Add to a report which calls its call was in and which were in it, and what followed from
    that."""
    report.inner_call_ids.extend(call.inner_ids)
    report.went_on_as = call.went_on_as
    told = list[str]()
    if call.parent is not None:
        report.parent_call_id = call.parent.id
        told += call.cut
        told += [f"{a.why}." for a in call.account.asked if a.by is Asker.OUTER]
    if call.ended_inside_count:
        told.append(_ended_inside(call.ended_inside, call.ended_inside_count))
    for sentence in told:
        said = sentence[0].upper() + sentence[1:] if sentence.startswith("it ") else sentence
        report.feedback.add(code=pb.FEEDBACK_CODE_NESTED, sentence=said)


def _ended_inside(ids: list[str], count: int) -> str:
    shown = ", ".join(ids)
    if count == 1:
        return f"A call inside was ended with it: {shown}."
    more = f" and {count - len(ids)} more" if count > len(ids) else ""
    return f"{count} calls inside were ended with it: {shown}{more}."
