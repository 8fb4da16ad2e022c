"""What this kernel can enforce, found out by looking, with the reason and what to do where it
cannot.

Every probe asks the kernel itself (a file, a controller, an ioctl on a trial cgroup), never a
version number. A probe that needs a cgroup makes one of its own and removes it.
"""

from __future__ import annotations

import enum
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentcgroupd.bpf import features, memcg_ops, sched
from agentcgroupd.bpf.features import FeatureState
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import XATTR_NAME, Cgroup, cgroup2_mount
from agentcgroupd.doctor import gpu
from agentcgroupd.errors import KnobError
from agentcgroupd.host import zram
from agentcgroupd.host.syscalls import has_peer_pidfd, pidfd_exit_status
from agentcgroupd.units import show_bytes


class State(enum.Enum):
    """Of one feature."""

    WORKS = "works"
    MISSING = "missing"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that the kernel may enforce or tell."""

    name: str
    state: State
    reason: str
    remedy: str = ""
    fallback: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All features of one host."""

    kernel: str
    cgroup_mount: str
    features: tuple[Feature, ...]

    @property
    def ok(self) -> bool:
        """Whether the daemon can give calls their own cgroups at all."""
        return any(f.name == "call cgroups" and f.state is State.WORKS for f in self.features)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        rows = [{**asdict(f), "state": f.state.value} for f in self.features]
        return {"kernel": self.kernel, "cgroup_mount": self.cgroup_mount, "ok": self.ok,
                "features": rows}  # fmt: skip

    def render(self, color: bool = False) -> str:
        """A table for people."""
        marks = {
            State.WORKS: ("ok", "32"),
            State.MISSING: ("--", "31"),
            State.UNKNOWN: ("??", "33"),
        }
        width = max(len(f.name) for f in self.features)
        lines = [f"kernel {self.kernel}, cgroup2 at {self.cgroup_mount or 'nowhere'}", ""]
        for feature in self.features:
            mark, code = marks[feature.state]
            shown = f"\x1b[{code}m{mark}\x1b[0m" if color else mark
            lines.append(f"{shown}  {feature.name:<{width}}  {feature.reason}")
            for label, text in (("instead", feature.fallback), ("to do", feature.remedy)):
                if text and feature.state is not State.WORKS:
                    lines.append(f"    {'':<{width}}  {label}: {text}")
        return "\n".join(lines)


def run() -> Diagnosis:
    """Probe this host. Needs root for most answers; without it they are unknown, not missing."""
    mount: Path | None = None
    why = remedy = ""
    try:
        mount = cgroup2_mount()
    except OSError as error:
        why = error.strerror or ""
        if error.errno == errno.ENOENT:
            remedy = "boot with systemd.unified_cgroup_hierarchy=1"
    rows: list[Feature] = []
    if mount is None:
        rows.append(Feature("call cgroups", State.MISSING, why, remedy))
    elif os.geteuid() != 0:
        rows.append(Feature("call cgroups", State.UNKNOWN, "only root can try",
                                "run `agentcg doctor` as root"))  # fmt: skip
    else:
        rows.extend(_cgroup_features(mount))
    rows.extend(_process_features())
    rows.extend(_memory_features())
    rows.extend(_bpf_features())
    rows.extend(_gpu_features())
    return Diagnosis(os.uname().release, str(mount or ""), tuple(rows))


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


_CONTROLLERS = {
    "memory": ("memory limits", "no memory limit or peak; OOM kills cannot be told from others"),
    "cpu": ("cpu weights and limits", "the kernel's own fairness between processes"),
    "pids": ("process limits", "fork bombs are not stopped"),
    "io": ("io accounting", "no bytes read and written in reports"),
}


def _cgroup_features(mount: Path) -> Iterator[Feature]:
    offered = knobs.CGROUP_CONTROLLERS.parse((mount / "cgroup.controllers").read_text())
    for controller, (name, fallback) in _CONTROLLERS.items():
        if controller in offered:
            yield Feature(name, State.WORKS, f"controller {controller} is offered at the root")
        else:
            yield _missing_controller(controller, name, fallback)
    try:
        with _trial_cgroup(mount) as trial:
            yield Feature("call cgroups", State.WORKS, "a trial cgroup was made and removed")
            yield from _trial_features(trial)
    except (KnobError, OSError) as error:
        yield Feature("call cgroups", State.MISSING, f"a trial cgroup could not be made: {error}",
                      "give the daemon a delegated cgroup (systemd: Delegate=yes)")  # fmt: skip


def _missing_controller(controller: str, name: str, fallback: str) -> Feature:
    held = _held_by_v1(controller)
    if held:
        return Feature(name, State.MISSING, f"cgroup v1 holds controller {controller} ({held})",
                       "boot with cgroup_no_v1=all (systemd.unified_cgroup_hierarchy=1)",
                       fallback)  # fmt: skip
    return Feature(name, State.MISSING, f"the kernel does not offer controller {controller} here",
                   "use a kernel with it (cgroup_enable=memory where it is off), or delegate it to "
                   "this container", fallback)  # fmt: skip


def _held_by_v1(controller: str) -> str:
    name = {"io": "blkio"}.get(controller, controller)
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        kind, _source, options = right.split()[:3]
        if kind == "cgroup" and name in options.split(","):
            return left.split()[4]
    return ""


def _trial_features(trial: Cgroup) -> Iterator[Feature]:
    for knob, name, fallback in (
        (knobs.CGROUP_KILL, "kill a whole cgroup", "none: the daemon needs Linux 5.14"),
        (knobs.CGROUP_FREEZE, "freeze a whole cgroup", "calls are not paused under pressure"),
        (knobs.MEMORY_PRESSURE, "pressure (PSI)", "no time stalled in reports"),
    ):
        if trial.has(knob):
            yield Feature(name, State.WORKS, f"{knob.file} is there")
        else:
            yield Feature(name, State.MISSING, f"{knob.file} is not there",
                          "boot with psi=1" if "pressure" in knob.file else "use a newer kernel",
                          fallback)  # fmt: skip
    try:
        trial.set_xattr(b"x" * 2048)
        kept = trial.get_xattr() == b"x" * 2048
        trial.remove_xattr()
    except KnobError as error:
        kept, why = False, str(error)
    else:
        why = f"{XATTR_NAME} of 2,048 bytes was not kept"
    if kept:
        yield Feature("state on the cgroup", State.WORKS, f"{XATTR_NAME} is kept")
    else:
        yield Feature("state on the cgroup", State.MISSING, why, "run as root with CAP_SYS_ADMIN",
                      "none: the daemon needs it to find its calls again")  # fmt: skip


def _process_features() -> Iterator[Feature]:
    if has_peer_pidfd():
        yield Feature("peer identity by pidfd", State.WORKS, "SO_PEERPIDFD is there")
    else:
        yield Feature("peer identity by pidfd", State.MISSING, "no SO_PEERPIDFD",
                      "use Linux 6.5 or newer",
                      "peer pid, checked against its start time")  # fmt: skip
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], {})
    fd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    status = pidfd_exit_status(fd)
    os.close(fd)
    if status is not None and os.WEXITSTATUS(status) == 7:
        yield Feature("exit status of any process", State.WORKS, "PIDFD_GET_INFO tells it")
    else:
        yield Feature("exit status of any process", State.MISSING,
                      "PIDFD_GET_INFO does not tell it", "use Linux 6.15 or newer",
                      "the status as the parent reports it, marked so in the report")  # fmt: skip


def _memory_features() -> Iterator[Feature]:
    try:
        areas = zram.swaps()
    except OSError as error:
        yield Feature("swap", State.UNKNOWN, f"/proc/swaps: {os.strerror(error.errno or 0)}")
        return
    if areas:
        names = ", ".join(f"{a.path} ({show_bytes(a.size_bytes)})" for a in areas)
        yield Feature("swap", State.WORKS, f"cold pages can leave memory: {names}")
        return
    why = zram.unavailable()
    yield Feature(
        "swap", State.MISSING,
        "none: memory.high is then a wall for anonymous memory, not a brake, and what waiting "
        "agents hold cannot leave memory",
        f"add swap: zram cannot be had, {why}" if why else
        'set pool.zram = "auto" in the configuration: compressed memory, half of the pool\'s size',
        "calls are paused rather than slowed",
    )  # fmt: skip


def _bpf_features() -> Iterator[Feature]:
    def probe(name: str, path: str, why: str, remedy: str, fallback: str) -> Feature:
        if Path(path).exists():
            return Feature(name, State.WORKS, f"{path} is there")
        return Feature(name, State.MISSING, why, remedy, fallback)

    probes: tuple[Callable[[], Feature], ...] = (
        lambda: probe("kernel types (BTF)", "/sys/kernel/btf/vmlinux", "no /sys/kernel/btf/vmlinux",
                      "use a kernel with CONFIG_DEBUG_INFO_BTF", "no eBPF programs"),
        lambda: probe("sched_ext", "/sys/kernel/sched_ext", "the kernel has no sched_ext",
                      "use Linux 6.12 or newer with CONFIG_SCHED_CLASS_EXT",
                      "cpu.weight and cpu.max"),
    )  # fmt: skip
    for make in probes:
        yield make()
    if os.geteuid() == 0:
        yield from map(_bpf_row, _tried())
        return
    for definition in features.DEFINITIONS:
        yield Feature(definition.name, State.UNKNOWN, "only root can try",
                      "run `agentcg doctor` as root", definition.fallback)  # fmt: skip


def _gpu_features() -> Iterator[Feature]:
    states = {True: State.WORKS, False: State.MISSING, None: State.UNKNOWN}
    for row in gpu.rows():
        yield Feature(row.name, states[row.works], row.reason, row.remedy, row.fallback)


def _tried() -> Iterator[FeatureState]:
    """Every feature of the programs, really loaded and attached, and taken back at once. The
    reclaim hooks are loaded only, for they are attached to a pool, and the scheduler is, because
    it would schedule."""
    for name in dict.fromkeys(definition.object for definition in features.DEFINITIONS):
        if name == sched.OBJECT:
            yield sched.try_here()
            continue
        if name == memcg_ops.OBJECT:
            hooks, states = memcg_ops.load()
            if hooks is not None:
                hooks.close()
        else:
            programs, states = features.load(name)
            if programs is not None:
                programs.close()
        yield from states


def _bpf_row(state: FeatureState) -> Feature:
    if state.works:
        return Feature(state.name, State.WORKS, f"the kernel took {', '.join(state.programs)}",
                       "", state.fallback)  # fmt: skip
    return Feature(state.name, State.MISSING, state.reason, state.remedy, state.fallback)


def main() -> int:
    """`python -m agentcgroupd.doctor`."""
    diagnosis = run()
    print(diagnosis.render())
    return 0 if diagnosis.ok else 1
