"""What the programs can do here: asked of the kernel's types first, then of the kernel itself.

A feature is some programs of one object. It works when everything it needs is in the kernel's BTF,
the verifier takes its programs and they could be attached. A feature that is missing has a reason,
and what is done without it; the others of its object work on.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from agentcgroupd.bpf.btf import VMLINUX, Btf, kernel_btf
from agentcgroupd.bpf.loader import BpfObject, refusal
from agentcgroupd.errors import BpfError

log = logging.getLogger(__name__)

LIFECYCLE = "process lifecycle"
OOM_VICTIMS = "OOM victims"
MARKS = "memory marks"
DENY = "deny growth"
HIGH_EVENTS = "memory.high events"
RATES = "fault and refault rates"
URGENT = "urgent reaction"
RECLAIM_HOOKS = "reclaim hooks"
CPU_SCHEDULER = "CPU scheduler"


@dataclass(frozen=True, slots=True)
class Need:
    """One thing that must be in the kernel's BTF: a function, a tracepoint, or a struct with a
    member."""

    kind: str
    name: str
    member: str = ""

    def missing(self, btf: Btf) -> str:
        """Nothing, or what the kernel lacks."""
        if self.kind == "function":
            return "" if btf.has_function(self.name) else f"no function {self.name}()"
        if self.kind == "tracepoint":
            return "" if btf.has_tracepoint(self.name) else f"no tracepoint {self.name}"
        if not btf.has_struct(self.name):
            return f"no struct {self.name}"
        if not btf.has_struct(self.name, self.member):
            return f"no struct {self.name}.{self.member}"
        return ""

    @property
    def remedy(self) -> str:
        """What to do where it is missing."""
        return _REMEDIES.get(self.name, "use a newer kernel")


_REMEDIES = {
    **dict.fromkeys(
        ("mem_cgroup", "page_counter", "page_counter_try_charge", "__memcg_memory_event",
         "mem_cgroup_handle_over_high"), "use a kernel with CONFIG_MEMCG"),
    "security_vm_enough_memory_mm": "use a kernel with CONFIG_SECURITY",
    "psi_memstall_enter": "use a kernel with CONFIG_PSI",
    "psi_memstall_leave": "use a kernel with CONFIG_PSI",
    "sched_ext_ops": "use Linux 7.1 or newer with CONFIG_SCHED_CLASS_EXT and "
                     "CONFIG_EXT_GROUP_SCHED",
    "scx_bpf_dsq_reenq": "use Linux 7.1 or newer",
    "memcg_bpf_ops": "nothing yet: no release of Linux has it",
}  # fmt: skip
BTF_REMEDY = "use a kernel with CONFIG_DEBUG_INFO_BTF"


def _function(name: str) -> Need:
    return Need("function", name)


def _tracepoint(name: str) -> Need:
    return Need("tracepoint", name)


@dataclass(frozen=True, slots=True)
class Definition:
    """A feature as it is meant. `programs`: alternatives, the first whose needs are met counts."""

    name: str
    object: str
    alternatives: tuple[tuple[tuple[str, ...], tuple[Need, ...]], ...]
    fallback: str


_MEMCG = (Need("struct", "mem_cgroup", "memory"), Need("struct", "page_counter", "parent"))

DEFINITIONS = (
    Definition(
        LIFECYCLE, "lifecycle",
        ((("on_fork", "on_exec", "on_exit"),
          tuple(map(_tracepoint, ("sched_process_fork", "sched_process_exec",
                                  "sched_process_exit")))),),
        "only calls that the agent declares have a cgroup of their own",
    ),
    Definition(
        OOM_VICTIMS, "lifecycle", ((("on_oom_victim",), (_tracepoint("mark_victim"),)),),
        "which process was chosen is not told, only that one was",
    ),
    Definition(
        MARKS, "memory", ((("on_charge",), (_function("page_counter_try_charge"), *_MEMCG)),),
        "the pool's memory.high, set back when it is passed, wakes the guard",
    ),
    Definition(
        DENY, "memory",
        ((("on_enough_memory",), (_function("security_vm_enough_memory_mm"), *_MEMCG)),),
        "calls are paused instead",
    ),
    Definition(
        HIGH_EVENTS, "memory",
        ((("on_memory_event",), (_function("__memcg_memory_event"), *_MEMCG)),
         (("on_over_high",), (_function("mem_cgroup_handle_over_high"), *_MEMCG))),
        "memory.events is read at the end of a call",
    ),
    Definition(
        RATES, "memory",
        ((("on_charge", "on_refault"),
          (_function("workingset_refault"), _function("page_counter_try_charge"), *_MEMCG)),),
        "no rates",
    ),
    Definition(
        URGENT, "memory",
        ((("on_stall", "on_stall_end", "on_enough_memory", "on_charge"),
          (*map(_function, ("psi_memstall_enter", "psi_memstall_leave", "page_counter_try_charge",
                            "security_vm_enough_memory_mm")), *_MEMCG)),),
        "the guard reacts a tick later, by pausing",
    ),
    # Callbacks of a struct_ops: any of them is of use, and memcg_ops.load takes all there are.
    Definition(
        RECLAIM_HOOKS, "memcg_ops",
        tuple(((name,), (Need("struct", "memcg_bpf_ops"), Need("struct", "memcg_bpf_ops", name)))
              for name in ("below_low", "below_min", "get_high_delay_ms", "memcg_charged")),
        "memory.low and memory.high alone",
    ),
    # Attached as a whole, by cpu.CpuScheduling.
    Definition(
        CPU_SCHEDULER, "sched",
        ((("select_cpu", "enqueue", "dispatch", "cgroup_set_weight", "cgroup_set_bandwidth"),
          (Need("struct", "sched_ext_ops", "cgroup_init"),
           Need("struct", "sched_ext_ops", "cgroup_set_bandwidth"),
           # Since 7.1 a task that leaves its queue is told of.
           _function("scx_bpf_dsq_reenq"))),),
        "the kernel's own scheduler keeps cpu.weight and cpu.max",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FeatureState:
    """What became of a feature here. `reason` says why it is missing, in words."""

    name: str
    works: bool
    reason: str
    fallback: str
    programs: tuple[str, ...] = ()
    remedy: str = ""
    """What to do about it; empty where nothing is known, or where it works."""


def definitions_of(name: str) -> tuple[Definition, ...]:
    """The features of one object."""
    return tuple(d for d in DEFINITIONS if d.object == name)


def gate(definition: Definition, btf: Btf) -> FeatureState:
    """Whether the kernel's types allow it, and with which programs."""
    reasons: list[str] = []
    remedies: list[str] = []
    for programs, needs in definition.alternatives:
        lacking = [text for need in needs if (text := need.missing(btf))]
        remedies.extend(need.remedy for need in needs if need.missing(btf))
        if not lacking:
            return FeatureState(definition.name, True, "", definition.fallback, programs)
        reasons.extend(text for text in lacking if text not in reasons)
    return FeatureState(
        definition.name,
        False,
        f"the kernel has {', '.join(reasons)}",
        definition.fallback,
        remedy="; ".join(dict.fromkeys(remedies)),
    )


def missing(definition: Definition, reason: str, remedy: str = "") -> FeatureState:
    """A feature that is missing for a reason of the moment."""
    return FeatureState(definition.name, False, reason, definition.fallback, remedy=remedy)


def load(
    name: str, objects: Path | None = None, events_bytes: int | None = None
) -> tuple[BpfObject | None, list[FeatureState]]:
    """Load and attach all features of an object that this kernel can have; not for the reclaim
    hooks, which are attached to a cgroup: see memcg_ops.load.

    `events_bytes`: size of the ring buffer, a power of two; None: as compiled.
    Returns the object (None: not one of its features works) and what became of each feature.
    Never raises BpfError: what went wrong is in the states. Nothing of a missing feature stays.
    """
    definitions = definitions_of(name)
    try:
        btf = kernel_btf()
        states = [gate(definition, btf) for definition in definitions]
    except BpfError as error:
        remedy = "" if VMLINUX.exists() else BTF_REMEDY
        return None, [missing(d, one_line(error), remedy) for d in definitions]
    path = objects / f"{name}.bpf.o" if objects else None
    while any(state.works for state in states):
        try:
            bpf = _load_once(name, path, states, events_bytes)
        except BpfError as error:
            log.debug("%s", error)
            found = re.match(r"program (\w+):", error.detail)
            used = {program for state in states for program in state.programs}
            rejected = found[1] if found and found[1] in used else ""
            states = [_without(s, rejected, error) for s in states]
            continue
        try:
            return _attach(bpf, states)
        except BaseException:
            bpf.close()
            raise
    return None, states


def _load_once(
    name: str, path: Path | None, states: Iterable[FeatureState], events_bytes: int | None
) -> BpfObject:
    wanted = {program for state in states if state.works for program in state.programs}
    bpf = BpfObject.open(name, path)
    try:
        for program in bpf.programs():
            if program not in wanted:
                bpf.skip_program(program)
        if events_bytes is not None:
            bpf.resize("events", events_bytes)
        bpf.load()
    except BaseException:
        bpf.close()
        raise
    return bpf


def _without(state: FeatureState, rejected: str, error: BpfError) -> FeatureState:
    """The state after a load that failed at the program `rejected`, or as a whole."""
    if not state.works or (rejected and rejected not in state.programs):
        return state
    return replace(state, works=False, reason=one_line(error), programs=(),
                   remedy=remedy_of(error))  # fmt: skip


def _attach(
    bpf: BpfObject, states: list[FeatureState]
) -> tuple[BpfObject | None, list[FeatureState]]:
    """Attach each feature's programs once; one that fails takes its features with it."""
    for state in states:
        for program in state.programs if state.works else ():
            if program in bpf.attached():
                continue
            try:
                bpf.attach(program)
            except BpfError as error:
                log.debug("%s", error)
                states = [_without(s, program, error) for s in states]
                break
    needed = {program for state in states for program in state.programs}
    for program in bpf.attached():
        if program not in needed:
            bpf.detach(program)
    if not needed:
        bpf.close()
        return None, states
    return bpf, states


def one_line(error: BpfError) -> str:
    """An error in one line for people."""
    reason = str(error).partition("\n")[0]
    if "(" not in error.what and error.detail:
        reason = f"{reason}: {error.detail.strip().splitlines()[-1]}"
    return reason


def remedy_of(error: BpfError) -> str:
    """What to do about an error of loading or attaching, or nothing."""
    refused = refusal(error.errno)
    if refused is not None:
        return refused.remedy
    if error.errno in (errno.ENOENT, errno.ENOEXEC, errno.EPROTO):
        return "install the daemon and its programs again, from one release"
    return ""
