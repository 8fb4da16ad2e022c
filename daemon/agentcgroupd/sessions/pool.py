"""The pool: the one cgroup below which everything of ours lives, made ready at start.

Under systemd the pool's parent is a unit's cgroup that was delegated to us; elsewhere it is the
root of the cgroup2 mount or whatever the configuration names.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount, move_all
from agentcgroupd.config import PoolConfig
from agentcgroupd.errors import ConfigError, KnobError
from agentcgroupd.host.memory import host_memory_bytes
from agentcgroupd.host.zram import Zram, ZramError
from agentcgroupd.host.zram import prepare as prepare_zram
from agentcgroupd.units import show_bytes

log = logging.getLogger(__name__)

CONTROLLERS = ("memory", "cpu", "pids", "io")
"""What is enabled for sessions and calls, and no more: each controller makes the making and
removing of a leaf dearer."""
ON_DEMAND = ("cpuset",)
"""What sessions have, and give to their calls as soon as one asks for it."""
SUPERVISOR_LEAF = "supervisor"
DELEGATE_XATTRS = ("trusted.delegate", "user.delegate")
"""Set by systemd on a cgroup it has delegated (systemd.resource-control(5), Delegate=)."""
ALIVE_XATTR = "trusted.agentcgroup.alive"
"""On the pool: clock ticks since boot, written by a running daemon again and again."""
DEFAULT_SHARE = 0.85
"""Share of the memory above that the pool has; the rest is the host's own."""


FILES_OF_CONTROLLER = {
    "memory": ("memory.low", "memory.high", "memory.max"),
    "cpu": ("cpu.weight", "cpu.max"),
    "pids": ("pids.max",),
    "io": ("io.stat",),
}
"""Interface files of a session that come with each controller."""


@dataclass(slots=True)
class Pool:
    """The pool's cgroup and what can be limited below it."""

    cgroup: Cgroup
    mount: Path
    path: str
    """Below the mount, as /proc/<pid>/cgroup shows it."""
    controllers: tuple[str, ...]
    memory_max_bytes: int | None
    cpu_millicores: int
    zram: Zram | None = None
    """The swap in compressed memory that is ours."""
    settled_ticks: int = 0
    """When a daemon was last there to see processes begin, in clock ticks since boot."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Controllers that this kernel or parent does not give us."""
        return tuple(name for name in CONTROLLERS if name not in self.controllers)

    def not_enforced(self) -> list[str]:
        """Limits of a session that cannot be kept here, by interface file."""
        return [file for name in self.missing for file in FILES_OF_CONTROLLER[name]]


def offered_controllers(cgroup: Cgroup) -> tuple[str, ...]:
    """The CONTROLLERS that a cgroup can give to its children. Raises KnobError."""
    offered = cgroup.read(knobs.CGROUP_CONTROLLERS)
    return tuple(name for name in CONTROLLERS if name in offered)


def _memory_above(parent: Cgroup) -> int:
    """The nearest memory limit above the pool, or the host's memory, in bytes."""
    total = host_memory_bytes()
    path = parent.path
    while (path / knobs.MEMORY_MAX.file).exists():
        limit = knobs.MEMORY_MAX.parse((path / knobs.MEMORY_MAX.file).read_text())
        total = min(total, limit) if limit is not None else total
        path = path.parent
    return total


def _clear_processes(parent: Cgroup) -> None:
    """A cgroup that has processes of its own cannot give controllers to its children. In one that
    systemd has delegated to us those are ours to move (the unit's main process among them)."""
    if not any(name in parent.list_xattrs() for name in DELEGATE_XATTRS) or not parent.procs():
        return
    names = set(parent.children())
    leaf = parent.child(SUPERVISOR_LEAF) if SUPERVISOR_LEAF in names else None
    moved = move_all(parent, leaf or parent.make_child(SUPERVISOR_LEAF))
    log.info("moved %d processes of %s into %s/", moved, parent.path, SUPERVISOR_LEAF)


def prepare_pool(config: PoolConfig) -> Pool:
    """Make or find the pool's cgroup, enable controllers on the way to it, set its limits.

    Raises ConfigError when the path cannot be a pool, KnobError when the kernel refuses a limit.
    """
    mount = cgroup2_mount()
    name = config.cgroup.strip("/")
    if not name or ".." in name.split("/"):
        raise ConfigError(
            f"pool.cgroup: {config.cgroup!r} cannot be used; allowed is a path below the cgroup2 "
            f"mount {mount}, such as /agentcg"
        )
    parent_path = (mount / name).parent
    try:
        parent = Cgroup.open(parent_path)
    except OSError as error:
        why = f"its parent {parent_path}: {os.strerror(error.errno or 0)}"
        raise ConfigError(f"pool.cgroup: {config.cgroup!r} cannot be used: {why}") from None
    try:
        if parent_path != mount:
            _clear_processes(parent)
        _refuse_nested(parent, mount)
        parent.enable((*CONTROLLERS, *ON_DEMAND))
        leaf = Path(name).name
        if leaf not in set(parent.children()):
            parent.make_child(leaf)
        memory_above = _memory_above(parent)
    finally:
        parent.close()

    cgroup = Cgroup.open(mount / name)
    refused = cgroup.enable(offered_controllers(cgroup))
    if refused:
        raise ConfigError(
            f"pool.cgroup: {config.cgroup!r} cannot be used: its controllers {', '.join(refused)} "
            "cannot be given to sessions; does it hold processes of its own?"
        )
    controllers = cgroup.read(knobs.CGROUP_SUBTREE_CONTROL)
    cgroup.enable(ON_DEMAND)
    memory_max = None
    if "memory" in controllers:
        memory_max = config.memory_max or int(memory_above * DEFAULT_SHARE)
        cgroup.write(knobs.MEMORY_MAX, memory_max)
        cgroup.write(knobs.MEMORY_HIGH, config.memory_high)
        memory_max = cgroup.read(knobs.MEMORY_MAX)
        log.info("pool %s has %s", cgroup.path, show_bytes(memory_max or 0))
    return Pool(
        cgroup=cgroup,
        mount=mount,
        path=f"/{name}",
        controllers=controllers,
        memory_max_bytes=memory_max,
        cpu_millicores=len(os.sched_getaffinity(0)) * 1000,
        zram=_swap(config, memory_max),
    )


def _swap(config: PoolConfig, memory_max_bytes: int | None) -> Zram | None:
    """Make the swap that the configuration asks for; a host without it is worse off, but works."""
    if memory_max_bytes is None:
        return None
    try:
        return prepare_zram(config.zram, memory_max_bytes)
    except ZramError as error:
        log.warning("%s; see `agentcg doctor`", error)
        return None


def _refuse_nested(parent: Cgroup, mount: Path) -> None:
    """Refuse a pool inside a pool: the outer daemon would sweep it away. Raises ConfigError."""
    path = parent.path
    while path != mount and path != path.parent:
        above = Cgroup.open(path)
        try:
            if above.get_xattr() is not None:
                raise ConfigError(f"pool.cgroup: {path} belongs to another agentcgroup pool")
        except KnobError:
            log.debug("%s has no extended attributes", path)
        finally:
            above.close()
        path = path.parent
