"""The pool: the one cgroup below which everything of ours lives, made ready at start.

Under systemd the pool's parent is a unit's cgroup that was delegated to us; elsewhere it is the
root of the cgroup2 mount or whatever the configuration names.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount, move_all
from agentcgroupd.config import PoolConfig
from agentcgroupd.errors import ConfigError, KnobError
from agentcgroupd.host.flock import Locked, lock
from agentcgroupd.host.memory import host_memory_bytes
from agentcgroupd.host.zram import Zram, ZramError
from agentcgroupd.host.zram import prepare as prepare_zram
from agentcgroupd.state.records import RECORD_VERSION, foreign_version, read_record

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
    adopted_bytes: int = 0
    """What adopted sessions held when they were last looked at: their cgroups lie elsewhere, and
    share the pool's memory all the same."""
    adopted_for_good_bytes: int = 0
    """The part of it that the kernel cannot simply drop."""
    held_bytes: int | None = None
    """What all sessions hold that the kernel cannot simply drop, some seconds old; None: not known.
    """

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


def _mount() -> Path:
    """The directory where cgroup v2 is mounted. Raises ConfigError where it cannot be used."""
    try:
        return cgroup2_mount()
    except OSError as error:
        raise ConfigError(f"{error.strerror}; see `agentcg doctor`") from None


class PoolClaim:
    """The pool's cgroup, found or made, and held for this daemon alone.

    The lock is on an interface file that root alone may open: on one that others may read, any
    process could take the lock and keep the daemon from starting.
    """

    def __init__(self, config: PoolConfig) -> None:
        """Claim the pool. Where it is there and another daemon has it, nothing is written. Raises
        ConfigError when the path cannot be a pool, KnobError; then nothing of ours is left."""
        self.mount = _mount()
        self._config = config
        name = config.cgroup.strip("/")
        self.path = f"/{name}"
        """Below the mount, as /proc/<pid>/cgroup shows it."""
        directory = self.mount / name
        self._made = not directory.is_dir()
        if self._made:
            self._make(directory)
        self.cgroup = Cgroup.open(directory)
        self._lock = -1
        try:
            self._lock = self.cgroup.open_file(knobs.CGROUP_KILL, os.O_WRONLY)
            lock(self._lock)
        except Locked as error:
            self.release()
            raise self._taken(error) from None
        except (OSError, KnobError):
            self.release()
            raise

    def _make(self, directory: Path) -> None:
        with _parent_of_pool(self._config, self.mount, directory.parent) as parent:
            if directory.parent != self.mount:
                _clear_processes(parent)
            parent.enable((*CONTROLLERS, *ON_DEMAND))
            try:
                parent.make_child(directory.name)
            except KnobError as error:
                # Made by another daemon a moment ago: who has the lock decides.
                if error.errno != errno.EEXIST:
                    raise

    def prepare(self) -> Pool:
        """Enable controllers on the way to the pool, and set its limits. Raises ConfigError, or
        KnobError when the kernel refuses a limit."""
        with _parent_of_pool(self._config, self.mount, self.cgroup.path.parent) as parent:
            if parent.path != self.mount:
                _clear_processes(parent)
            parent.enable((*CONTROLLERS, *ON_DEMAND))
            memory_above = _memory_above(parent)
        return _pool_of(self._config, self.cgroup, self.mount, self.path, memory_above)

    def mark(self, run_dir: Path) -> None:
        """Put the daemon's record on the pool. Raises ConfigError where something else is there,
        or the record of a daemon that is newer."""
        record = {
            "v": RECORD_VERSION,
            "kind": "pool",
            "run_dir": str(run_dir),
            "memory_high_bytes": self._config.memory_high,
        }
        raw = self.cgroup.get_xattr()
        if raw is not None and (other := foreign_version(raw, "pool")) is not None:
            raise _unusable(
                self._config,
                f"it has records of version {other}, and this agentcgroupd knows version "
                f"{RECORD_VERSION}; start the one that made it, and close its sessions first",
            )
        if raw is not None and read_record(raw, "pool") is None:
            raise ConfigError(f"pool.cgroup: {self.path} is marked as something else: {raw!r}")
        self.cgroup.set_xattr(json.dumps(record).encode())

    def release(self) -> None:
        """Give the lock up; the pool stays, for the next daemon."""
        if self._lock >= 0:
            os.close(self._lock)
        self.cgroup.close()

    def keep(self) -> None:
        """Let the pool stay from now on, whatever comes: the daemon has started."""
        self._made = False

    def undo(self) -> None:
        """Remove a pool that was made here: the daemon did not start."""
        if not self._made:
            return
        try:
            os.rmdir(self.cgroup.path)
        except OSError as error:
            log.debug("%s stays: %s", self.cgroup.path, error)

    def _taken(self, by: Locked) -> ConfigError:
        who = f"with pid {by.pid}" if by.pid else "whose pid cannot be seen here"
        why = f"another daemon is running on it, {who}; stop that one, or name another pool"
        return _unusable(self._config, why)


def check_place(config: PoolConfig) -> None:
    """Check whether the pool is there or could be made, with nothing written. Raises ConfigError,
    OSError."""
    mount = cgroup2_mount()
    with _parent_of_pool(config, mount, (mount / config.cgroup.strip("/")).parent):
        return


@contextmanager
def _parent_of_pool(config: PoolConfig, mount: Path, directory: Path) -> Iterator[Cgroup]:
    """The cgroup that the pool lies in, checked. Raises ConfigError."""
    try:
        parent = Cgroup.open(directory)
    except OSError as error:
        why = f"its parent {directory}: {os.strerror(error.errno or 0)}"
        if error.errno == errno.ENOENT:
            why += (
                "; make it with mkdir, have systemd make it (agentcg-pool.service), or name a pool "
                "right below the mount, such as /agentcg"
            )
        raise _unusable(config, why) from None
    try:
        _refuse_nested(parent, mount)
        yield parent
    finally:
        parent.close()


def _unusable(config: PoolConfig, why: str) -> ConfigError:
    return ConfigError(f"pool.cgroup: {config.cgroup!r} cannot be used: {why}")


def _pool_of(config: PoolConfig, cgroup: Cgroup, mount: Path, path: str, memory_above: int) -> Pool:
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
    return Pool(
        cgroup=cgroup,
        mount=mount,
        path=path,
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
