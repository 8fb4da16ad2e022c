"""Features that the programs give the daemon on this kernel.

A feature is some programs of one object. It works if everything that it needs is in the kernel's
BTF, the verifier accepts its programs and they could be attached. A missing feature has a reason,
and a text that says what is done instead; the other features of its object work on.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from agentcgroupd.bpf.btf import VMLINUX, Btf, kernel_btf
from agentcgroupd.bpf.loader import BpfObject, refusal
from agentcgroupd.errors import BpfError

log = logging.getLogger(__name__)

LIFECYCLE = "process lifecycle"
OOM_VICTIMS = "OOM victims"
LEAVING = "processes that leave a call"
MARKS = "memory marks"
DENY = "deny growth"
HIGH_EVENTS = "memory.high events"
RATES = "fault and refault rates"
URGENT = "urgent reaction"
RECLAIM_HOOKS = "reclaim hooks"
LOOK = "look at all calls at once"
CPU_SCHEDULER = "CPU scheduler"
NET = "network counts"


@dataclass(frozen=True, slots=True)
class Need:
    """Something that must be in the kernel's BTF: a function, a tracepoint, or a struct with a
    member."""

    kind: str
    name: str
    member: str = ""

    def missing(self, btf: Btf) -> str:
        """Words for what the kernel lacks; empty if it lacks nothing."""
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
        """Advice for a kernel without it."""
        return _REMEDIES.get(self.name, "use a newer kernel")


_NO_MEMCG = "use a kernel with CONFIG_MEMCG"
_REMEDIES = {
    "mem_cgroup": _NO_MEMCG,
    "page_counter": _NO_MEMCG,
    "page_counter_try_charge": _NO_MEMCG,
    "__memcg_memory_event": _NO_MEMCG,
    "mem_cgroup_handle_over_high": _NO_MEMCG,
    "security_vm_enough_memory_mm": "use a kernel with CONFIG_SECURITY",
    "bpf_cgroup_from_id": "use Linux 6.10 or newer",
    "bpf_iter_css_new": "use Linux 6.10 or newer",
    "bpf_rcu_read_lock": "use Linux 6.10 or newer",
    "psi_memstall_enter": "use a kernel with CONFIG_PSI",
    "psi_memstall_leave": "use a kernel with CONFIG_PSI",
    "sock_cgroup_data": "use a kernel with CONFIG_SOCK_CGROUP_DATA and CONFIG_CGROUP_BPF",
    "sched_ext_ops": (
        "use Linux 7.1 or newer with CONFIG_SCHED_CLASS_EXT and CONFIG_EXT_GROUP_SCHED"
    ),
    "scx_bpf_dsq_reenq": "use Linux 7.1 or newer",
    "memcg_bpf_ops": "nothing yet: no release of Linux has it",
}
BTF_REMEDY = "use a kernel with CONFIG_DEBUG_INFO_BTF"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to have a feature: programs of its object, and what they need of the kernel."""

    programs: tuple[str, ...]
    needs: tuple[Need, ...]


@dataclass(frozen=True, slots=True)
class Definition:
    """A feature as it is meant. The first of its ways that the kernel has what it needs for is
    taken."""

    name: str
    object: str
    ways: tuple[Way, ...]
    fallback: str


def _functions(*names: str) -> tuple[Need, ...]:
    return tuple(Need("function", name) for name in names)


def _tracepoints(*names: str) -> tuple[Need, ...]:
    return tuple(Need("tracepoint", name) for name in names)


_MEMCG = (Need("struct", "mem_cgroup", "memory"), Need("struct", "page_counter", "parent"))


def _charged(*functions: str) -> tuple[Need, ...]:
    """Needs of a program that runs at these functions and reads memory cgroups."""
    return (*_functions(*functions), *_MEMCG)


def _callback(name: str) -> Way:
    """A callback of memcg_bpf_ops: a program of the same name."""
    return Way((name,), (Need("struct", "memcg_bpf_ops"), Need("struct", "memcg_bpf_ops", name)))


_PROCESS_EVENTS = _tracepoints("sched_process_fork", "sched_process_exec", "sched_process_exit")
_REFAULTS = _charged("workingset_refault", "page_counter_try_charge")
_STALLS = _charged(
    "psi_memstall_enter",
    "psi_memstall_leave",
    "page_counter_try_charge",
    "security_vm_enough_memory_mm",
)
_SCHED_PROGRAMS = (
    "select_cpu",
    "enqueue",
    "dispatch",
    "cgroup_set_weight",
    "cgroup_set_bandwidth",
)
_SCHED_EXT = (
    Need("struct", "sched_ext_ops", "cgroup_init"),
    Need("struct", "sched_ext_ops", "cgroup_set_bandwidth"),
    # Came with 7.1, the first release that tells a scheduler of every task that leaves its queue.
    Need("function", "scx_bpf_dsq_reenq"),
)

DEFINITIONS = (
    Definition(
        LIFECYCLE,
        "lifecycle",
        (Way(("on_fork", "on_exec", "on_exit"), _PROCESS_EVENTS),),
        "only calls that the agent declares have a cgroup of their own",
    ),
    Definition(
        OOM_VICTIMS,
        "lifecycle",
        (Way(("on_oom_victim",), _tracepoints("mark_victim")),),
        "which process was chosen is not told, only that one was",
    ),
    Definition(
        LEAVING,
        "lifecycle",
        (Way(("on_fork", "on_move"), _tracepoints("sched_process_fork", "cgroup_attach_task")),),
        "a main process that leaves is found out by looking, another one only at the call's end",
    ),
    Definition(
        MARKS,
        "memory",
        (Way(("on_charge",), _charged("page_counter_try_charge")),),
        "the pool's memory.high, set back when it is passed, wakes the guard",
    ),
    Definition(
        DENY,
        "memory",
        (Way(("on_enough_memory",), _charged("security_vm_enough_memory_mm")),),
        "calls are paused instead",
    ),
    Definition(
        HIGH_EVENTS,
        "memory",
        (
            Way(("on_memory_event",), _charged("__memcg_memory_event")),
            Way(("on_over_high",), _charged("mem_cgroup_handle_over_high")),
        ),
        "memory.events is read at the end of a call",
    ),
    Definition(
        RATES,
        "memory",
        (Way(("on_charge", "on_refault"), _REFAULTS),),
        "no rates",
    ),
    Definition(
        URGENT,
        "memory",
        (Way(("on_stall", "on_stall_end", "on_enough_memory", "on_charge"), _STALLS),),
        "the guard reacts a tick later, by pausing",
    ),
    # Run by the daemon and attached nowhere, by bpf.look.
    Definition(
        LOOK,
        "look",
        (
            Way(
                ("look",),
                (
                    *_functions("bpf_cgroup_from_id", "bpf_iter_css_new", "bpf_rcu_read_lock"),
                    *_MEMCG,
                ),
            ),
        ),
        "memory.current of each call that grows is read, and of some others in turn",
    ),
    # Any callback of the struct_ops is of use alone; memcg_ops.load takes all that there are.
    Definition(
        RECLAIM_HOOKS,
        "memcg_ops",
        tuple(map(_callback, ("below_low", "below_min", "get_high_delay_ms", "memcg_charged"))),
        "memory.low and memory.high alone",
    ),
    # Attached to the pool, by bpf.net.
    Definition(
        NET,
        "net",
        (Way(("on_receive", "on_send"), (Need("struct", "sock_cgroup_data", "cgroup"),)),),
        "what calls receive and send is not counted",
    ),
    # Attached as a whole, by cpu.scheduling.
    Definition(
        CPU_SCHEDULER,
        "sched",
        (Way(_SCHED_PROGRAMS, _SCHED_EXT),),
        "the kernel's own scheduler keeps cpu.weight and cpu.max",
    ),
)


@dataclass(frozen=True, slots=True)
class FeatureState:
    """State of a feature on this kernel. `reason` says in words why it is missing."""

    name: str
    works: bool
    reason: str
    fallback: str
    programs: tuple[str, ...] = ()
    remedy: str = ""
    """Advice on how to get it; empty if there is none, or if it works."""


def definitions_of(name: str) -> tuple[Definition, ...]:
    """The features of an object."""
    return tuple(d for d in DEFINITIONS if d.object == name)


def gate(definition: Definition, btf: Btf) -> FeatureState:
    """Whether the kernel's types allow a feature, and with which programs."""
    reasons: list[str] = []
    remedies: list[str] = []
    for way in definition.ways:
        lacking = [text for need in way.needs if (text := need.missing(btf))]
        remedies.extend(need.remedy for need in way.needs if need.missing(btf))
        if not lacking:
            return FeatureState(definition.name, True, "", definition.fallback, way.programs)
        reasons.extend(text for text in lacking if text not in reasons)
    return FeatureState(
        definition.name,
        False,
        f"the kernel has {', '.join(reasons)}",
        definition.fallback,
        remedy="; ".join(dict.fromkeys(remedies)),
    )


def missing(definition: Definition, reason: str, remedy: str = "") -> FeatureState:
    """State of a feature that is missing for the given reason."""
    return FeatureState(definition.name, False, reason, definition.fallback, remedy=remedy)


def load(
    name: str,
    objects: Path | None = None,
    events_bytes: int | None = None,
    lend: Callable[[BpfObject], object] = lambda bpf: None,
) -> tuple[BpfObject | None, list[FeatureState]]:
    """Load and attach all features of an object that this kernel can have. (The reclaim hooks are
    attached to a cgroup instead, by memcg_ops.load, and the look is run, by look.load.)

    `events_bytes`: size of the ring buffer, a power of two; None: as compiled. `lend`: called with
    the object before its load, to have it use maps that are there.
    Returns the object (None: none of its features works) and the state of each feature. Raises no
    BpfError: what went wrong is in the states. No program of a missing feature stays loaded.
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
            bpf = _load_once(name, path, states, events_bytes, lend)
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
    name: str,
    path: Path | None,
    states: Iterable[FeatureState],
    events_bytes: int | None,
    lend: Callable[[BpfObject], object],
) -> BpfObject:
    wanted = {program for state in states if state.works for program in state.programs}
    bpf = BpfObject.open(name, path)
    try:
        for program in bpf.programs():
            if program not in wanted:
                bpf.skip_program(program)
        if events_bytes is not None:
            bpf.resize("events", events_bytes)
        lend(bpf)
        bpf.load()
    except BaseException:
        bpf.close()
        raise
    return bpf


def _without(state: FeatureState, rejected: str, error: BpfError) -> FeatureState:
    """State of a feature after a failure of the program `rejected`; empty: of the whole object."""
    if not state.works or (rejected and rejected not in state.programs):
        return state
    reason, remedy = one_line(error), remedy_of(error)
    return replace(state, works=False, reason=reason, programs=(), remedy=remedy)


def _attach(
    bpf: BpfObject, states: list[FeatureState]
) -> tuple[BpfObject | None, list[FeatureState]]:
    """Attach the programs of each feature, every program once. A feature with a program that cannot
    be attached is missing."""
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
    """Text of an error in one line, for people."""
    reason = str(error).partition("\n")[0]
    if "(" not in error.what and error.detail:
        _, _, last = error.detail.strip().rpartition("\n")
        reason = f"{reason}: {last}"
    return reason


def remedy_of(error: BpfError) -> str:
    """Advice on an error of loading or attaching; empty: there is none."""
    refused = refusal(error.errno)
    if refused is not None:
        return refused.remedy
    if error.errno in (errno.ENOENT, errno.ENOEXEC, errno.EPROTO):
        return "install the daemon and its programs again, from one release"
    return ""
