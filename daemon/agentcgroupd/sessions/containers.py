"""Cgroups that a runtime has made and goes on using: what it may have done to them."""

from __future__ import annotations

from dataclasses import replace

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import FailedPrecondition
from agentcgroupd.sessions.limits import as_found, millicores_of, read_limits
from agentcgroupd.state.session import AGENT_LEAF, SessionLimits

RUNTIME_KNOBS = (knobs.MEMORY_MAX.file, knobs.CPU_MAX.file, knobs.PIDS_MAX.file)
"""What a runtime may change while a container runs and the guard never does."""


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


def changed_by_runtime(cgroup: Cgroup, written: dict[str, str]) -> dict[str, str]:
    """The interface files that a runtime has set since we have written them, with their text.
    Raises KnobError."""
    now = read_limits(cgroup)
    return {
        file: text
        for file, text in now.items()
        if file in RUNTIME_KNOBS and file in written and written[file] != text
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
