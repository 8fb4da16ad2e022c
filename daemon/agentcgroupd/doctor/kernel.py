"""What the kernel can do for cgroups, processes, memory and eBPF, each tried on the kernel itself.

A check reads a file, makes a trial cgroup and removes it, or loads a program and takes it back.
None goes by a version number.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentcgroupd.bpf import features, look, memcg_ops, net, pins, sched
from agentcgroupd.bpf.features import FeatureState
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import XATTR_NAME, Cgroup
from agentcgroupd.doctor.diagnosis import (
    AS_ROOT,
    CALL_CGROUPS,
    MEMORY_LIMITS,
    ONLY_ROOT,
    Check,
    Feature,
    State,
)
from agentcgroupd.errors import KnobError
from agentcgroupd.host import zram
from agentcgroupd.host.mounts import mounts
from agentcgroupd.host.syscalls import has_peer_pidfd, pidfd_exit_status
from agentcgroupd.units import show_bytes

# Cgroups

CONTROLLERS = {
    "memory": (
        MEMORY_LIMITS,
        "no memory limit or peak; OOM kills cannot be told from others; a pause does not stop a "
        "system call that takes memory",
    ),
    "cpu": ("cpu weights and limits", "the kernel's own fairness between processes"),
    "pids": ("process limits", "fork bombs are not stopped"),
    "io": ("io accounting", "no bytes read and written in reports"),
}
"""Controller -> (feature, what there is without it)."""
V1_NAMES = {"io": "blkio"}
"""Controllers that cgroup v1 has under another name."""

FILES: dict[knobs.Knob[Any], Check] = {
    knobs.CGROUP_KILL: Check(
        name="kill a whole cgroup",
        yes="cgroup.kill is there",
        no="cgroup.kill is not there",
        remedy="use a newer kernel",
        fallback="none: the daemon needs Linux 5.14",
    ),
    knobs.CGROUP_FREEZE: Check(
        name="freeze a whole cgroup",
        yes="cgroup.freeze is there",
        no="cgroup.freeze is not there",
        remedy="use a newer kernel",
        fallback="calls are not paused under pressure",
    ),
    knobs.MEMORY_PRESSURE: Check(
        name="pressure (PSI)",
        yes="memory.pressure is there",
        no="memory.pressure is not there",
        remedy="boot with psi=1",
        fallback="no time stalled in reports",
    ),
}
"""Interface files that a trial cgroup should have."""

OPTIONS = {
    b"memory_recursiveprot": Check(
        name="protection of whole sessions",
        yes="cgroup2 is mounted with memory_recursiveprot",
        no="cgroup2 is mounted without memory_recursiveprot",
        remedy="mount -o remount,memory_recursiveprot on cgroup2 (systemd does by itself)",
        fallback="memory.low of a session protects none of its calls",
    ),
    b"favordynmods": Check(
        name="quick moves into calls",
        yes="cgroup2 is mounted with favordynmods",
        no="cgroup2 is mounted without favordynmods",
        remedy="mount -o remount,favordynmods on cgroup2: forks and exits get slower by a little",
        fallback="moving a process into its call waits for a grace period",
    ),
}
"""Options of the cgroup2 mount, and what each means."""

XATTR = Check(
    name="state on the cgroup",
    yes=f"{XATTR_NAME} is kept",
    no=f"{XATTR_NAME} of 2,048 bytes was not kept",
    remedy="run as root with CAP_SYS_ADMIN",
    fallback="none: the daemon needs it to find its calls again",
)
XATTR_TRIAL = b"x" * 2048


def no_cgroups(error: OSError) -> Feature:
    """What there is to say where cgroup2_mount has raised an error."""
    reason = error.strerror or str(error)
    none_mounted = error.errno == errno.ENOENT
    remedy = "boot with systemd.unified_cgroup_hierarchy=1" if none_mounted else ""
    return Feature(CALL_CGROUPS, State.MISSING, reason, remedy)


def cgroup_features(mount: Path) -> Iterator[Feature]:
    """Controllers, and what a trial cgroup can do. `mount`: of cgroup2."""
    if os.geteuid() != 0:
        yield Feature(CALL_CGROUPS, State.UNKNOWN, ONLY_ROOT, AS_ROOT)
        return
    given = {option for m in mounts() if m.point == mount for option in m.options}
    for option, check in OPTIONS.items():
        yield check.answered(option in given)
    offered = knobs.CGROUP_CONTROLLERS.parse((mount / "cgroup.controllers").read_text())
    for controller in CONTROLLERS:
        yield _controller(controller, controller in offered)
    try:
        with _trial_cgroup(mount) as trial:
            yield Feature(CALL_CGROUPS, State.WORKS, "a trial cgroup was made and removed")
            for knob, check in FILES.items():
                yield check.answered(trial.has(knob))
            yield _xattr(trial)
    except (KnobError, OSError) as error:
        reason = f"a trial cgroup could not be made: {error}"
        remedy = "give the daemon a delegated cgroup (systemd: Delegate=yes)"
        if error.errno == errno.EROFS:
            remedy = (
                f"{mount} is mounted read-only: mount it writable for the daemon "
                "(Docker: --privileged, or -v /sys/fs/cgroup:/sys/fs/cgroup:rw)"
            )
        yield Feature(CALL_CGROUPS, State.MISSING, reason, remedy)


@contextmanager
def _trial_cgroup(mount: Path) -> Iterator[Cgroup]:
    root = Cgroup.open(mount)
    name = f"agentcg-doctor-{secrets.token_hex(4)}"
    try:
        trial = root.make_child(name)
        try:
            yield trial
        finally:
            trial.remove()
    finally:
        root.close()


def _controller(controller: str, offered: bool) -> Feature:
    name, fallback = CONTROLLERS[controller]
    if offered:
        reason = f"controller {controller} is offered at the root"
        return Feature(name, State.WORKS, reason)
    v1_mount = _v1_mount(controller)
    if v1_mount:
        reason = f"cgroup v1 holds controller {controller} ({v1_mount})"
        remedy = "boot with cgroup_no_v1=all (systemd.unified_cgroup_hierarchy=1)"
    else:
        reason = f"the kernel does not offer controller {controller} here"
        remedy = (
            "use a kernel with it (cgroup_enable=memory where it is off), or delegate it to this "
            "container"
        )
    return Feature(name, State.MISSING, reason, remedy, fallback)


def _v1_mount(controller: str) -> str:
    """Where a controller is mounted as cgroup v1; empty: nowhere."""
    name = V1_NAMES.get(controller, controller)
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").rstrip("\n").split("\n")
    for line in mounts:
        left, _, right = line.partition(" - ")
        kind, _source, options = right.split()[:3]
        if kind == "cgroup" and name in options.split(","):
            return left.split()[4]
    return ""


def _xattr(trial: Cgroup) -> Feature:
    try:
        trial.set_xattr(XATTR_TRIAL)
        kept = trial.get_xattr() == XATTR_TRIAL
        trial.remove_xattr()
    except KnobError as error:
        return XATTR.missing(str(error))
    return XATTR.answered(kept)


# Processes

PEER_PIDFD = Check(
    name="peer identity by pidfd",
    yes="SO_PEERPIDFD is there",
    no="no SO_PEERPIDFD",
    remedy="use Linux 6.5 or newer",
    fallback="peer pid, checked against its start time",
)
EXIT_STATUS = Check(
    name="exit status of any process",
    yes="PIDFD_GET_INFO tells it",
    no="PIDFD_GET_INFO does not tell it",
    remedy="use Linux 6.15 or newer",
    fallback="the status as the parent reports it, marked so in the report",
)
TRIAL_STATUS = 7


def process_features() -> Iterator[Feature]:
    """Whether a peer is known for sure, and whether a process's exit status is."""
    yield PEER_PIDFD.answered(has_peer_pidfd())
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"exit {TRIAL_STATUS}"], {})
    fd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    status = pidfd_exit_status(fd)
    os.close(fd)
    told = status is not None and os.WEXITSTATUS(status) == TRIAL_STATUS
    yield EXIT_STATUS.answered(told)


# Memory


def memory_features() -> Iterator[Feature]:
    """Whether cold pages can leave memory."""
    try:
        areas = zram.swaps()
    except OSError as error:
        reason = f"/proc/swaps: {os.strerror(error.errno or 0)}"
        yield Feature("swap", State.UNKNOWN, reason)
        return
    if areas:
        names = ", ".join(f"{a.path} ({show_bytes(a.size_bytes)})" for a in areas)
        yield Feature("swap", State.WORKS, f"cold pages can leave memory: {names}")
        return
    reason = (
        "none: memory.high is then a wall for anonymous memory, not a brake, and what waiting "
        "agents hold cannot leave memory"
    )
    why_no_zram = zram.unavailable()
    if why_no_zram:
        remedy = f"add swap: zram cannot be had, {why_no_zram}"
    else:
        remedy = (
            'set pool.zram = "auto" in the configuration: compressed memory, half of the pool\'s '
            "size"
        )
    fallback = "calls are paused rather than slowed"
    yield Feature("swap", State.MISSING, reason, remedy, fallback)


# Programs

PATHS = {
    "/sys/kernel/btf/vmlinux": Check(
        name="kernel types (BTF)",
        yes="/sys/kernel/btf/vmlinux is there",
        no="no /sys/kernel/btf/vmlinux",
        remedy="use a kernel with CONFIG_DEBUG_INFO_BTF",
        fallback="no eBPF programs",
    ),
    "/sys/kernel/sched_ext": Check(
        name="sched_ext",
        yes="/sys/kernel/sched_ext is there",
        no="the kernel has no sched_ext",
        remedy="use Linux 6.12 or newer with CONFIG_SCHED_CLASS_EXT",
        fallback="cpu.weight and cpu.max",
    ),
}
PINS = Check(
    name="denials outlive the daemon",
    yes=f"bpffs is mounted at {pins.MOUNT}",
    no=f"no bpffs at {pins.MOUNT}",
    remedy=f"mount -t bpf bpf {pins.MOUNT} (systemd does by itself)",
    fallback="what was denied may grow while a daemon that was killed is started again",
)


def bpf_features() -> Iterator[Feature]:
    """What programs need, and each feature of ours."""
    for path, check in PATHS.items():
        yield check.answered(Path(path).exists())
    yield PINS.answered(pins.is_bpffs(pins.MOUNT))
    if os.geteuid() == 0:
        yield from map(_program_feature, _tried())
        return
    for definition in features.DEFINITIONS:
        yield Feature(definition.name, State.UNKNOWN, ONLY_ROOT, AS_ROOT, definition.fallback)


def _program_feature(state: FeatureState) -> Feature:
    if not state.works:
        return Feature(state.name, State.MISSING, state.reason, state.remedy, state.fallback)
    reason = f"the kernel took {', '.join(state.programs)}"
    return Feature(state.name, State.WORKS, reason, fallback=state.fallback)


def _tried() -> Iterator[FeatureState]:
    """Every feature of the programs, loaded and attached, and taken back at once. Three are
    loaded only: the reclaim hooks, which belong to a pool, the scheduler, which would schedule, and
    the look, which is run."""
    for name in dict.fromkeys(definition.object for definition in features.DEFINITIONS):
        if name == sched.OBJECT:
            yield sched.try_here()
            continue
        if name == memcg_ops.OBJECT:
            hooks, states = memcg_ops.load()
            if hooks is not None:
                hooks.close()
        elif name == net.OBJECT:
            counts, states = net.load()
            if counts is not None:
                counts.close()
        elif name == look.OBJECT:
            program, states = look.load()
            if program is not None:
                program.close()
        else:
            programs, states = features.load(name)
            if programs is not None:
                programs.close()
        yield from states
