"""Cgroups that a runtime has made and goes on using: what it may have done to them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import FailedPrecondition
from agentcgroupd.sessions.limits import Read, as_found, millicores_of, read_limits
from agentcgroupd.state.session import AGENT_LEAF, Session, SessionLimits

DISK_WEIGHTS = (knobs.IO_BFQ_WEIGHT, knobs.IO_WEIGHT)
"""Weights for disks; of two that are there, runc sets the first."""
WEIGHT_FILES = frozenset((knobs.CPU_WEIGHT.file, *(knob.file for knob in DISK_WEIGHTS)))
RUNTIME_KNOBS = WEIGHT_FILES | {
    knobs.MEMORY_MAX.file,
    knobs.MEMORY_OOM_GROUP.file,
    knobs.CPU_MAX.file,
    knobs.PIDS_MAX.file,
}
"""What a runtime may change while a container runs. The guard changes none of these but cpu.weight,
while the session is slowed."""


def check_processes(cgroup: Cgroup, path: str) -> None:
    """Refuse a cgroup with processes below it, unless whoever started the container has split
    it for us before its first instruction: then all of them are in agent/. Closes the one that
    it refuses. Raises FailedPrecondition."""
    busy = [name for name in cgroup.children() if cgroup.child(name).populated()]
    if not busy or (busy == [AGENT_LEAF] and not cgroup.procs()):
        return
    cgroup.close()
    raise FailedPrecondition(
        f"cgroup {path} is split already: {busy[0]}/ below it has processes; only a cgroup can "
        f"be adopted whose processes are all its own, or all in {AGENT_LEAF}/"
    )


def agent_leaf(cgroup: Cgroup) -> Cgroup:
    """The agent leaf of a cgroup, made if it is not there. Raises KnobError."""
    has_leaf = AGENT_LEAF in set(cgroup.children())
    return cgroup.child(AGENT_LEAF) if has_leaf else cgroup.make_child(AGENT_LEAF)


def weights_left_to_runtime(spec: pb.SessionSpec) -> frozenset[str]:
    """Name the files of the weights that a request leaves to the runtime: those that it neither
    names nor gives a priority for."""
    if spec.priority:
        return frozenset()
    cpu = () if spec.cpu_weight else (knobs.CPU_WEIGHT.file,)
    disks = () if spec.io_weight else (knob.file for knob in DISK_WEIGHTS)
    return frozenset((*cpu, *disks))


def runtimes_weights(session: Session) -> frozenset[str]:
    """Name the files of the weights that an adopted session has from its runtime. `written` has
    only these files of weights."""
    theirs = with_weights(session.limits, as_found(session.found), WEIGHT_FILES)
    # A record of an earlier daemon has all of them, and the session had its own.
    own = set()
    if theirs.cpu_weight != session.limits.cpu_weight:
        own.add(knobs.CPU_WEIGHT.file)
    if theirs.io_weight != session.limits.io_weight:
        own.update(knob.file for knob in DISK_WEIGHTS)
    return WEIGHT_FILES & session.written.keys() - own


def with_weights(limits: SessionLimits, read: Read, files: Collection[str]) -> SessionLimits:
    """Limits with the weights that a runtime has set. `files`: which of them are its own."""
    if knobs.CPU_WEIGHT.file in files:
        limits = replace(limits, cpu_weight=read(knobs.CPU_WEIGHT) or limits.cpu_weight)
    disks = (read(knob) for knob in DISK_WEIGHTS if knob.file in files)
    return replace(limits, io_weight=next(filter(None, disks), limits.io_weight))


def runtimes_disk_weights(session: Session) -> dict[str, str]:
    """The text of the files of weights for disks that a session has from its runtime, by file."""
    files = runtimes_weights(session) - {knobs.CPU_WEIGHT.file}
    return {file: session.found[file] for file in files if file in session.found}


def as_written(cgroup: Cgroup, weights: Collection[str]) -> dict[str, str]:
    """The text of the interface files of an adopted session, by file, to be compared with later
    ones. `weights`: files of those that are its runtime's. Raises KnobError."""
    now = read_limits(cgroup)
    return {file: now[file] for file in now if file not in WEIGHT_FILES or file in weights}


def changed_by_runtime(session: Session) -> dict[str, str]:
    """The interface files that a runtime has set since we have written them, with their text.
    Raises KnobError."""
    ours = {
        **session.written,
        # We write nothing else to these, whatever was there when the files were read.
        knobs.MEMORY_OOM_GROUP.file: knobs.MEMORY_OOM_GROUP.format(False),
        knobs.CPU_WEIGHT.file: str(session.limits.cpu_weight),
    }
    if session.slowed:
        del ours[knobs.CPU_WEIGHT.file]
    now = read_limits(session.cgroup)
    return {
        file: text
        for file, text in now.items()
        if file in RUNTIME_KNOBS and file in ours and ours[file] != text
    }


def with_changed(limits: SessionLimits, texts: dict[str, str]) -> SessionLimits:
    """Limits with those that a runtime has set since. `texts`: text of files of RUNTIME_KNOBS."""
    read = as_found(texts)
    if knobs.MEMORY_MAX.file in texts:
        limits = replace(limits, memory_max_bytes=read(knobs.MEMORY_MAX))
    if knobs.PIDS_MAX.file in texts:
        limits = replace(limits, pids_max=read(knobs.PIDS_MAX))
    if knobs.CPU_MAX.file in texts:
        limits = replace(limits, cpu_max_millicores=millicores_of(read(knobs.CPU_MAX)))
    return limits
