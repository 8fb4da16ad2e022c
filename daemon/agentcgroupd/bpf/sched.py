"""Daemon's side of sched.bpf.c: the CPU scheduler is loaded, attached, told of cgroups, and read.

    scheduler = Scheduler.load(settings, memory)
    scheduler.attach()
    scheduler.describe(cgroup_id, kind, boost_cap_ns=..., boost_permille=...)

The scheduler runs for as long as its link is open, so it ends with a daemon that is killed.
"""

from __future__ import annotations

import ctypes
import errno
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from agentcgroupd.bpf import abi, features
from agentcgroupd.bpf.btf import KIND_STRUCT, VMLINUX, kernel_btf
from agentcgroupd.bpf.features import FeatureState
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.errors import BpfError
from agentcgroupd.units import CgroupId

OBJECT = "sched"
MAP = "scheduler"
STRUCT = "sched_ext_ops___agentcg"
"""The object's struct with the callbacks and settings that are used."""
NAME = "agentcg"
"""Name of the scheduler in /sys/kernel/sched_ext/root/ops."""
SYSFS = Path("/sys/kernel/sched_ext")
NSEC_PER_USEC = 1000


@dataclass(frozen=True, slots=True)
class SchedSettings:
    """Settings of the scheduler, from the configuration (CpuConfig)."""

    slice_usec: int
    wait_max_usec: int
    boost_lead_usec: int
    penalty_most: int
    stall_timeout_usec: int = 30_000_000
    """The kernel detaches a scheduler that lets a task wait for longer; at most 30 s."""
    exec_hold_usec: int = 0
    """Longest time that a program in an agent leaf waits at its exec for `let_go` or a move, 0 for
    none."""
    name: str = NAME


@dataclass(frozen=True, slots=True)
class CpuNumbers:
    """Counts of the scheduler for a cgroup and all below it, since the later of two events: the
    cgroup was made, the scheduler was attached."""

    run_usec: int
    wait_usec: int
    wait_max_usec: int
    slices: int
    boosts: int
    boosted_usec: int
    penalties: int
    penalty_usec: int
    stalls: int
    stalled_usec: int
    rescues: int


@dataclass(frozen=True, slots=True)
class Ending:
    """Reason why the kernel has detached the scheduler."""

    kind: int
    """A value of enum scx_exit_kind."""
    code: int
    reason: str
    message: str

    @property
    def sentence(self) -> str:
        """Reason and message as one sentence."""
        return f"{self.reason}: {self.message}" if self.message else self.reason


class SchedObject(BpfObject):
    """The scheduler's object, with its optional struct_ops."""

    def share(self, name: str, fd: int) -> None:
        """Before the load: use the map of another object. Raises BpfError."""
        libbpf().check(f"map {name}", "bpf_map__reuse_fd", self._map(name), fd)

    def want_scheduler(self, settings: SchedSettings) -> None:
        """Before the load: ask for the scheduler too, which is left out otherwise, and write its
        settings into its struct. Raises BpfError."""
        libbpf().check(f"map {MAP}", "bpf_map__set_autocreate", self._map(MAP), True)
        types = self._types()
        flavor = types.find(STRUCT, KIND_STRUCT)
        value, _ = self._initial_value(MAP)
        timeout = types.member(flavor, "timeout_ms") if flavor else None
        name = types.member(flavor, "name") if flavor else None
        if timeout is None or name is None:
            raise BpfError(f"{self.path} has no struct {STRUCT} with these settings", errno.EPROTO)
        place = ctypes.c_uint32.from_address(value + timeout.offset_bits // 8)
        place.value = settings.stall_timeout_usec // 1000
        text = settings.name.encode() + b"\0"
        ctypes.memmove(value + name.offset_bits // 8, text, len(text))

    def attach_scheduler(self) -> None:
        """After the load: hand the scheduler to the kernel. Raises BpfError; EBUSY: the kernel has
        another scheduler."""
        with libbpf().messages() as said:
            try:
                link = libbpf().pointer(
                    f"attaching {self.name}", "bpf_map__attach_struct_ops", self._map(MAP)
                )
            except BpfError as error:
                raise BpfError(error.what, error.errno, "".join(said).strip()) from None
        self._links.append((MAP, link))


class Scheduler:
    """The loaded scheduler, which is not in force before `attach`."""

    def __init__(self, bpf: SchedObject, settings: SchedSettings) -> None:
        """Take over a loaded object and write the settings. Raises BpfError."""
        self._bpf = bpf
        self._places = bpf.map("places", abi.SchedPlace)
        self.control = bpf.shared("control", abi.SchedControl)
        self._ended = bpf.shared("ended", abi.SchedExit)
        kind: type[ctypes.Array[abi.SchedCgroup]] = abi.SchedCgroup * abi.ABI_SCHED_CGROUPS
        self._cgroups = bpf.shared("cgroups", kind)
        self.control.slice_ns = settings.slice_usec * NSEC_PER_USEC
        self.control.wait_max_ns = settings.wait_max_usec * NSEC_PER_USEC
        self.control.boost_lead_ns = settings.boost_lead_usec * NSEC_PER_USEC
        self.control.penalty_most = settings.penalty_most
        self.control.exec_hold_ns = settings.exec_hold_usec * NSEC_PER_USEC

    @classmethod
    def load(
        cls, settings: SchedSettings, states_fd: int | None = None, objects: Path | None = None
    ) -> Self:
        """Load the object. `states_fd` is the memory programs' map of what they have seen; without
        one (None) no call pays a penalty for its memory. Raises BpfError."""
        bpf = SchedObject.open(OBJECT, objects / f"{OBJECT}.bpf.o" if objects else None)
        try:
            bpf.want_scheduler(settings)
            if states_fd is not None:
                bpf.share("states", states_fd)
            bpf.load()
            return cls(bpf, settings)
        except BaseException:
            bpf.close()
            raise

    def attach(self) -> None:
        """Let the scheduler have all SCHED_EXT tasks from now on. Blocks while the kernel tells the
        scheduler of every task of the host. Raises BpfError."""
        self._bpf.attach_scheduler()
        self._bpf.attach("on_exec")

    def _entry(self, cgroup: CgroupId) -> abi.SchedCgroup | None:
        place = self._places.get(cgroup)
        if place is None:
            return None
        entry = self._cgroups[place.slot]
        return entry if entry.cgroup_id == cgroup else None

    def describe(
        self, cgroup: CgroupId, kind: abi.CgroupKind, boost_cap_usec: int, boost_permille: int
    ) -> bool:
        """Tell the scheduler a cgroup's kind, and its budget of CPU time to be taken ahead of
        others: at most `boost_cap_usec`, refilled at `boost_permille` of one CPU. Returns False if
        the scheduler knows no such cgroup. Raises BpfError."""
        entry = self._entry(cgroup)
        if entry is None:
            return False
        entry.boost_cap_ns = boost_cap_usec * NSEC_PER_USEC
        entry.boost_permille = boost_permille
        entry.kind = kind
        return True

    def hurry(self, cgroup: CgroupId, usec: int) -> None:
        """Let a cgroup's tasks go first for `usec`, out of a pause too. For a cgroup that is about
        to be frozen or killed, so that its tasks release what they hold in the kernel. Raises
        BpfError."""
        wish = abi.SchedHurry(cgroup_id=cgroup, until_ns=time.monotonic_ns() + usec * NSEC_PER_USEC)
        self._bpf.run("hurry", wish)

    def let_go(self, pid: int, at_ns: int) -> None:
        """Let a program run that waits at its exec for the daemon's decision, or that is just about
        to. `at_ns`: time of the event of that exec. Raises BpfError."""
        self._bpf.run("let_go", abi.SchedLetGo(pid=pid, at_ns=at_ns))

    def numbers(self, cgroup: CgroupId) -> CpuNumbers | None:
        """Counts of a cgroup; None: the scheduler knows no such cgroup. Raises BpfError."""
        entry = self._entry(cgroup)
        if entry is None:
            return None
        return CpuNumbers(
            run_usec=entry.run_ns // NSEC_PER_USEC,
            wait_usec=entry.wait_ns // NSEC_PER_USEC,
            wait_max_usec=entry.wait_max_ns // NSEC_PER_USEC,
            slices=entry.slices,
            boosts=entry.boosts,
            boosted_usec=entry.boosted_ns // NSEC_PER_USEC,
            penalties=entry.penalties,
            penalty_usec=entry.penalty_ns // NSEC_PER_USEC,
            stalls=entry.stalls,
            stalled_usec=entry.stalled_ns // NSEC_PER_USEC,
            rescues=entry.rescues,
        )

    def places(self) -> int:
        """Number of cgroups that have an entry of their own. Raises BpfError."""
        return sum(1 for _ in self._places.keys())

    def ending(self) -> Ending | None:
        """Reason why the kernel has detached the scheduler; None while it has not."""
        if not self._ended.kind:
            return None
        return Ending(
            self._ended.kind,
            self._ended.code,
            self._ended.reason.decode("utf-8", "replace"),
            self._ended.message.decode("utf-8", "replace"),
        )

    def close(self) -> None:
        """Detach and unload the scheduler; its tasks go on in the fair class."""
        self._bpf.close()


def gate() -> FeatureState:
    """Whether this kernel can have the scheduler: whether its types allow it and no other scheduler
    is attached. Raises no BpfError."""
    (definition,) = features.definitions_of(OBJECT)
    try:
        state = features.gate(definition, kernel_btf())
        if state.works and running():
            return features.missing(definition, *occupied())
    except BpfError as error:
        remedy = "" if VMLINUX.exists() else features.BTF_REMEDY
        return features.missing(definition, features.one_line(error), remedy)
    return state


def occupied() -> tuple[str, str]:
    """Reason why the attached scheduler keeps ours out, and what to do. Raises BpfError."""
    name = running()
    if name.partition("_")[0] == NAME:
        return "another agentcgroupd has attached it already", "run one daemon on a host"
    reason = f"another sched_ext scheduler runs here: {name or 'it has just gone'}"
    return reason, "stop it, or leave the CPU to it"


def try_here(objects: Path | None = None) -> FeatureState:
    """Load the scheduler without attaching it, and unload it: whether it would work here. Raises no
    BpfError."""
    state = gate()
    if not state.works:
        return state
    try:
        Scheduler.load(SchedSettings(4000, 10_000_000, 20_000, 8), None, objects).close()
    except BpfError as error:
        (definition,) = features.definitions_of(OBJECT)
        return features.missing(definition, features.one_line(error), features.remedy_of(error))
    return state


def running() -> str:
    """Name of the scheduler that is attached, with the suffix that the kernel shows; empty: there
    is none. Raises BpfError where the kernel has no sched_ext."""
    try:
        if (SYSFS / "state").read_text(encoding="ascii").strip() == "disabled":
            return ""
        return (SYSFS / "root/ops").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        if SYSFS.exists():
            return ""  # detached between the two reads
        raise BpfError("the kernel has no sched_ext", errno.ENOSYS) from None
