"""Constants and structs that the programs and the daemon share.

Made from bpf/abi.h by `python -m agentcgroupd.bpf.generate`; do not edit.
"""

from __future__ import annotations

import ctypes
import enum

ABI_VERSION = 1
ABI_ARGV_BYTES = 512
ABI_COMM_BYTES = 16
ABI_PATH_BYTES = 256
ABI_PROTECTED_MAX = 64
ABI_SMALL_REQUEST_BYTES = 1114112
ABI_DEPTH_MAX = 8
ABI_DELAY_CAP_MS = 2000
ABI_GPU_MINORS = 256
ABI_GPU_SHARED_MINOR = 254
ABI_VRAM_GRAIN_BYTES = 512
ABI_SCHED_CGROUPS = 16384
ABI_SCHED_CPUS = 1024
ABI_LEVELS_MAX = 256
ABI_LEFT_MOST = 64
ABI_LOOK_CALLS = 16384
ABI_SCHED_REASON_BYTES = 64
ABI_SCHED_MESSAGE_BYTES = 256


class CgroupKind(enum.IntEnum):
    """enum cgroup_kind"""

    NONE = 0
    POOL = 1
    SESSION = 2
    AGENT = 3
    CALL = 4


class EventType(enum.IntEnum):
    """enum event_type"""

    NONE = 0
    FORK = 1
    EXEC = 2
    EXIT = 3
    OOM_VICTIM = 4
    MARK = 5
    HIGH = 6
    RATES = 7
    DENIED = 8
    URGENT = 9
    LEFT = 10
    TYPES = 11


class DenyMode(enum.IntEnum):
    """enum deny_mode"""

    NEVER = 0
    OVER_MARK = 1


class GpuMajorKind(enum.IntEnum):
    """enum gpu_major_kind"""

    NONE = 0
    DEVICES = 1
    SHARED = 2


class GpuEventType(enum.IntEnum):
    """enum gpu_event_type"""

    NONE = 0
    OPENED = 64
    CLOSED = 65
    MEMORY = 66
    ACTIVE = 67


class CudaCall(enum.IntEnum):
    """enum cuda_call"""

    NONE = 0
    ALLOC = 1
    ALLOC_PITCH = 2
    CREATE = 3
    ARRAY = 4
    ARRAY_3D = 5
    MIPMAP = 6
    FREE = 7
    RELEASE = 8
    ARRAY_DESTROY = 9
    MIPMAP_DESTROY = 10
    MAP = 11
    UNMAP = 12
    RETAIN = 13
    CTX_CREATE = 14
    CTX_SET = 15
    CTX_POP = 16
    CTX_DESTROY = 17
    PRIMARY_RETAIN = 18
    PRIMARY_RESET = 19
    CTX_PUSH = 20


class Managed(ctypes.Structure):
    """struct managed, 8 bytes"""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("left", ctypes.c_uint16),
        ("left_second", ctypes.c_uint16),
    )
    kind: int
    left: int
    left_second: int


class Event(ctypes.Structure):
    """struct event, 24 bytes"""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("size_bytes", ctypes.c_uint32),
        ("at_ns", ctypes.c_uint64),
        ("cgroup_id", ctypes.c_uint64),
    )
    type: int
    size_bytes: int
    at_ns: int
    cgroup_id: int


class Process(ctypes.Structure):
    """struct process, 32 bytes"""

    _fields_ = (
        ("start_ns", ctypes.c_uint64),
        ("pid", ctypes.c_int32),
        ("parent_pid", ctypes.c_int32),
        ("comm", ctypes.c_char * 16),
    )
    start_ns: int
    pid: int
    parent_pid: int
    comm: bytes


class ForkEvent(ctypes.Structure):
    """struct fork_event, 64 bytes"""

    _fields_ = (
        ("event", Event),
        ("child", Process),
        ("parent_start_ns", ctypes.c_uint64),
    )
    event: Event
    child: Process
    parent_start_ns: int


class ExecEvent(ctypes.Structure):
    """struct exec_event, 592 bytes"""

    _fields_ = (
        ("event", Event),
        ("process", Process),
        ("own_cgroup_id", ctypes.c_uint64),
        ("argv_bytes", ctypes.c_uint32),
        ("argv_cut", ctypes.c_uint32),
        ("at_startup", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("argv", ctypes.c_uint8 * 512),
    )
    event: Event
    process: Process
    own_cgroup_id: int
    argv_bytes: int
    argv_cut: int
    at_startup: int
    reserved: int
    argv: ctypes.Array[ctypes.c_uint8]


class ExitEvent(ctypes.Structure):
    """struct exit_event, 88 bytes"""

    _fields_ = (
        ("event", Event),
        ("process", Process),
        ("user_ns", ctypes.c_uint64),
        ("system_ns", ctypes.c_uint64),
        ("rss_peak_bytes", ctypes.c_uint64),
        ("wait_status", ctypes.c_uint32),
        ("executed", ctypes.c_uint32),
    )
    event: Event
    process: Process
    user_ns: int
    system_ns: int
    rss_peak_bytes: int
    wait_status: int
    executed: int


class OomEvent(ctypes.Structure):
    """struct oom_event, 56 bytes"""

    _fields_ = (
        ("event", Event),
        ("process", Process),
    )
    event: Event
    process: Process


class LeftEvent(ctypes.Structure):
    """struct left_event, 360 bytes"""

    _fields_ = (
        ("event", Event),
        ("process", Process),
        ("mover", Process),
        ("to_cgroup_id", ctypes.c_uint64),
        ("more", ctypes.c_uint32),
        ("made", ctypes.c_uint32),
        ("path", ctypes.c_uint8 * 256),
    )
    event: Event
    process: Process
    mover: Process
    to_cgroup_id: int
    more: int
    made: int
    path: ctypes.Array[ctypes.c_uint8]


class LifecycleCounters(ctypes.Structure):
    """struct lifecycle_counters, 176 bytes"""

    _fields_ = (
        ("sent", ctypes.c_uint64 * 11),
        ("lost", ctypes.c_uint64 * 11),
    )
    sent: ctypes.Array[ctypes.c_uint64]
    lost: ctypes.Array[ctypes.c_uint64]


class MemoryLimits(ctypes.Structure):
    """struct memory_limits, 80 bytes"""

    _fields_ = (
        ("parent_id", ctypes.c_uint64),
        ("soft_mark_bytes", ctypes.c_uint64),
        ("soft_low_bytes", ctypes.c_uint64),
        ("deny_mark_bytes", ctypes.c_uint64),
        ("faults_per_s", ctypes.c_uint64),
        ("refaults_per_s", ctypes.c_uint64),
        ("deny_mode", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("priority", ctypes.c_uint32),
        ("deny_round", ctypes.c_uint32),
        ("throttle_mark_bytes", ctypes.c_uint64),
        ("willing", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )
    parent_id: int
    soft_mark_bytes: int
    soft_low_bytes: int
    deny_mark_bytes: int
    faults_per_s: int
    refaults_per_s: int
    deny_mode: int
    kind: int
    priority: int
    deny_round: int
    throttle_mark_bytes: int
    willing: int
    reserved: int


class MemoryState(ctypes.Structure):
    """struct memory_state, 136 bytes"""

    _fields_ = (
        ("window_ns", ctypes.c_uint64),
        ("window_faults", ctypes.c_uint64),
        ("window_refaults", ctypes.c_uint64),
        ("faults", ctypes.c_uint64),
        ("major_faults", ctypes.c_uint64),
        ("refaults", ctypes.c_uint64),
        ("high_events", ctypes.c_uint64),
        ("high_told_ns", ctypes.c_uint64),
        ("marks_crossed", ctypes.c_uint64),
        ("denied", ctypes.c_uint64),
        ("denied_bytes", ctypes.c_uint64),
        ("above_mark", ctypes.c_uint32),
        ("above_rate", ctypes.c_uint32),
        ("told_round", ctypes.c_uint32),
        ("allowed_round", ctypes.c_uint32),
        ("allowed_bytes", ctypes.c_uint64),
        ("over_at_ns", ctypes.c_uint64),
        ("high_at_ns", ctypes.c_uint64),
        ("over_permille", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )
    window_ns: int
    window_faults: int
    window_refaults: int
    faults: int
    major_faults: int
    refaults: int
    high_events: int
    high_told_ns: int
    marks_crossed: int
    denied: int
    denied_bytes: int
    above_mark: int
    above_rate: int
    told_round: int
    allowed_round: int
    allowed_bytes: int
    over_at_ns: int
    high_at_ns: int
    over_permille: int
    reserved: int


class MarkEvent(ctypes.Structure):
    """struct mark_event, 48 bytes"""

    _fields_ = (
        ("event", Event),
        ("usage_bytes", ctypes.c_uint64),
        ("mark_bytes", ctypes.c_uint64),
        ("above", ctypes.c_uint32),
        ("pid", ctypes.c_int32),
    )
    event: Event
    usage_bytes: int
    mark_bytes: int
    above: int
    pid: int


class HighEvent(ctypes.Structure):
    """struct high_event, 48 bytes"""

    _fields_ = (
        ("event", Event),
        ("usage_bytes", ctypes.c_uint64),
        ("high_bytes", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    )
    event: Event
    usage_bytes: int
    high_bytes: int
    count: int


class RatesEvent(ctypes.Structure):
    """struct rates_event, 48 bytes"""

    _fields_ = (
        ("event", Event),
        ("faults_per_s", ctypes.c_uint64),
        ("refaults_per_s", ctypes.c_uint64),
        ("above", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )
    event: Event
    faults_per_s: int
    refaults_per_s: int
    above: int
    reserved: int


class DeniedEvent(ctypes.Structure):
    """struct denied_event, 56 bytes"""

    _fields_ = (
        ("event", Event),
        ("usage_bytes", ctypes.c_uint64),
        ("mark_bytes", ctypes.c_uint64),
        ("request_bytes", ctypes.c_uint64),
        ("urgent", ctypes.c_uint32),
        ("pid", ctypes.c_int32),
    )
    event: Event
    usage_bytes: int
    mark_bytes: int
    request_bytes: int
    urgent: int
    pid: int


class UrgentEvent(ctypes.Structure):
    """struct urgent_event, 48 bytes"""

    _fields_ = (
        ("event", Event),
        ("stalled_ns", ctypes.c_uint64),
        ("until_ns", ctypes.c_uint64),
        ("priority", ctypes.c_uint32),
        ("pid", ctypes.c_int32),
    )
    event: Event
    stalled_ns: int
    until_ns: int
    priority: int
    pid: int


class ProtectedSession(ctypes.Structure):
    """struct protected_session, 40 bytes"""

    _fields_ = (
        ("cgroup_id", ctypes.c_uint64),
        ("priority", ctypes.c_uint32),
        ("stalling", ctypes.c_uint32),
        ("stalling_since_ns", ctypes.c_uint64),
        ("window_ns", ctypes.c_uint64),
        ("stalled_ns", ctypes.c_uint64),
    )
    cgroup_id: int
    priority: int
    stalling: int
    stalling_since_ns: int
    window_ns: int
    stalled_ns: int


class MemoryControl(ctypes.Structure):
    """struct memory_control, 2712 bytes"""

    _fields_ = (
        ("allowance_bytes", ctypes.c_uint64),
        ("allowed_bytes", ctypes.c_uint64),
        ("stall_threshold_ns", ctypes.c_uint64),
        ("stall_window_ns", ctypes.c_uint64),
        ("urgent_lease_ns", ctypes.c_uint64),
        ("pool_id", ctypes.c_uint64),
        ("lifted_until_ns", ctypes.c_uint64),
        ("urgent_until_ns", ctypes.c_uint64),
        ("urgent_count", ctypes.c_uint64),
        ("lost", ctypes.c_uint64),
        ("untracked", ctypes.c_uint64),
        ("denying", ctypes.c_uint64),
        ("heartbeat_ns", ctypes.c_uint64),
        ("alone_after_ns", ctypes.c_uint64),
        ("alone_until_ns", ctypes.c_uint64),
        ("alone_beat_ns", ctypes.c_uint64),
        ("alone_count", ctypes.c_uint64),
        ("urgent_priority", ctypes.c_uint32),
        ("protected_count", ctypes.c_uint32),
        ("pool_above", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("protected_sessions", ProtectedSession * 64),
    )
    allowance_bytes: int
    allowed_bytes: int
    stall_threshold_ns: int
    stall_window_ns: int
    urgent_lease_ns: int
    pool_id: int
    lifted_until_ns: int
    urgent_until_ns: int
    urgent_count: int
    lost: int
    untracked: int
    denying: int
    heartbeat_ns: int
    alone_after_ns: int
    alone_until_ns: int
    alone_beat_ns: int
    alone_count: int
    urgent_priority: int
    protected_count: int
    pool_above: int
    reserved: int
    protected_sessions: ctypes.Array[ProtectedSession]


class LookPlace(ctypes.Structure):
    """struct look_place, 8 bytes"""

    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )
    slot: int
    reserved: int


class LookCall(ctypes.Structure):
    """struct look_call, 32 bytes"""

    _fields_ = (
        ("usage_bytes", ctypes.c_uint64),
        ("before_bytes", ctypes.c_uint64),
        ("told_bytes", ctypes.c_uint64),
        ("round", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )
    usage_bytes: int
    before_bytes: int
    told_bytes: int
    round: int
    reserved: int


class LookControl(ctypes.Structure):
    """struct look_control, 65560 bytes"""

    _fields_ = (
        ("root_id", ctypes.c_uint64),
        ("step_bytes", ctypes.c_uint64),
        ("round", ctypes.c_uint32),
        ("listed", ctypes.c_uint32),
        ("list", ctypes.c_uint32 * 16384),
    )
    root_id: int
    step_bytes: int
    round: int
    listed: int
    list: ctypes.Array[ctypes.c_uint32]


class SchedPlace(ctypes.Structure):
    """struct sched_place, 8 bytes"""

    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )
    slot: int
    reserved: int


class SchedCgroup(ctypes.Structure):
    """struct sched_cgroup, 120 bytes"""

    _fields_ = (
        ("cgroup_id", ctypes.c_uint64),
        ("boost_cap_ns", ctypes.c_uint64),
        ("boost_permille", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("hurry_until_ns", ctypes.c_uint64),
        ("run_ns", ctypes.c_uint64),
        ("wait_ns", ctypes.c_uint64),
        ("wait_max_ns", ctypes.c_uint64),
        ("slices", ctypes.c_uint64),
        ("boosts", ctypes.c_uint64),
        ("boosted_ns", ctypes.c_uint64),
        ("penalties", ctypes.c_uint64),
        ("penalty_ns", ctypes.c_uint64),
        ("stalls", ctypes.c_uint64),
        ("stalled_ns", ctypes.c_uint64),
        ("rescues", ctypes.c_uint64),
    )
    cgroup_id: int
    boost_cap_ns: int
    boost_permille: int
    kind: int
    hurry_until_ns: int
    run_ns: int
    wait_ns: int
    wait_max_ns: int
    slices: int
    boosts: int
    boosted_ns: int
    penalties: int
    penalty_ns: int
    stalls: int
    stalled_ns: int
    rescues: int


class SchedControl(ctypes.Structure):
    """struct sched_control, 144 bytes"""

    _fields_ = (
        ("slice_ns", ctypes.c_uint64),
        ("wait_max_ns", ctypes.c_uint64),
        ("boost_lead_ns", ctypes.c_uint64),
        ("penalty_most", ctypes.c_uint32),
        ("stall_on_purpose", ctypes.c_uint32),
        ("exec_hold_ns", ctypes.c_uint64),
        ("cgroups", ctypes.c_uint64),
        ("queues", ctypes.c_uint64),
        ("waiting", ctypes.c_uint64),
        ("in_lanes", ctypes.c_uint64),
        ("without_entry", ctypes.c_uint64),
        ("picks", ctypes.c_uint64),
        ("picks_empty", ctypes.c_uint64),
        ("preempted", ctypes.c_uint64),
        ("finishing", ctypes.c_uint64),
        ("left", ctypes.c_uint64),
        ("not_asked", ctypes.c_uint64),
        ("held_at_exec", ctypes.c_uint64),
        ("exec_holds_over", ctypes.c_uint64),
    )
    slice_ns: int
    wait_max_ns: int
    boost_lead_ns: int
    penalty_most: int
    stall_on_purpose: int
    exec_hold_ns: int
    cgroups: int
    queues: int
    waiting: int
    in_lanes: int
    without_entry: int
    picks: int
    picks_empty: int
    preempted: int
    finishing: int
    left: int
    not_asked: int
    held_at_exec: int
    exec_holds_over: int


class SchedExit(ctypes.Structure):
    """struct sched_exit, 344 bytes"""

    _fields_ = (
        ("at_ns", ctypes.c_uint64),
        ("code", ctypes.c_int64),
        ("kind", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("reason", ctypes.c_char * 64),
        ("message", ctypes.c_char * 256),
    )
    at_ns: int
    code: int
    kind: int
    reserved: int
    reason: bytes
    message: bytes


class SchedHurry(ctypes.Structure):
    """struct sched_hurry, 16 bytes"""

    _fields_ = (
        ("cgroup_id", ctypes.c_uint64),
        ("until_ns", ctypes.c_uint64),
    )
    cgroup_id: int
    until_ns: int


class SchedLetGo(ctypes.Structure):
    """struct sched_let_go, 16 bytes"""

    _fields_ = (
        ("pid", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("at_ns", ctypes.c_uint64),
    )
    pid: int
    reserved: int
    at_ns: int


class Protection(ctypes.Structure):
    """struct protection, 16 bytes"""

    _fields_ = (
        ("protect", ctypes.c_uint32),
        ("stalled", ctypes.c_uint32),
        ("delay_percent", ctypes.c_uint32),
        ("delay_cap_ms", ctypes.c_uint32),
    )
    protect: int
    stalled: int
    delay_percent: int
    delay_cap_ms: int


class MemcgOpsCounters(ctypes.Structure):
    """struct memcg_ops_counters, 40 bytes"""

    _fields_ = (
        ("online", ctypes.c_uint64),
        ("offline", ctypes.c_uint64),
        ("spared_low", ctypes.c_uint64),
        ("spared_min", ctypes.c_uint64),
        ("delayed", ctypes.c_uint64),
    )
    online: int
    offline: int
    spared_low: int
    spared_min: int
    delayed: int


class MemcgDecision(ctypes.Structure):
    """struct memcg_decision, 48 bytes"""

    _fields_ = (
        ("cgroup_id", ctypes.c_uint64),
        ("session_id", ctypes.c_uint64),
        ("usage_bytes", ctypes.c_uint64),
        ("high_bytes", ctypes.c_uint64),
        ("below_low", ctypes.c_uint32),
        ("below_min", ctypes.c_uint32),
        ("delay_ms", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )
    cgroup_id: int
    session_id: int
    usage_bytes: int
    high_bytes: int
    below_low: int
    below_min: int
    delay_ms: int
    reserved: int


class GpuMajor(ctypes.Structure):
    """struct gpu_major, 8 bytes"""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )
    kind: int
    reserved: int


class GpuAccess(ctypes.Structure):
    """struct gpu_access, 32 bytes"""

    _fields_ = (("minors", ctypes.c_uint64 * 4),)
    minors: ctypes.Array[ctypes.c_uint64]


class GpuDeviceEvent(ctypes.Structure):
    """struct gpu_device_event, 56 bytes"""

    _fields_ = (
        ("event", Event),
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("pid", ctypes.c_int32),
        ("reserved", ctypes.c_uint32),
        ("comm", ctypes.c_char * 16),
    )
    event: Event
    major: int
    minor: int
    pid: int
    reserved: int
    comm: bytes


class DeviceCounters(ctypes.Structure):
    """struct device_counters, 24 bytes"""

    _fields_ = (
        ("opened", ctypes.c_uint64),
        ("refused", ctypes.c_uint64),
        ("lost", ctypes.c_uint64),
    )
    opened: int
    refused: int
    lost: int


class VramQuota(ctypes.Structure):
    """struct vram_quota, 16 bytes"""

    _fields_ = (
        ("quota_bytes", ctypes.c_uint64),
        ("watch", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )
    quota_bytes: int
    watch: int
    reserved: int


class VramAccount(ctypes.Structure):
    """struct vram_account, 80 bytes"""

    _fields_ = (
        ("used_bytes", ctypes.c_uint64),
        ("peak_bytes", ctypes.c_uint64),
        ("allocations", ctypes.c_uint64),
        ("frees", ctypes.c_uint64),
        ("refused", ctypes.c_uint64),
        ("refused_bytes", ctypes.c_uint64),
        ("over", ctypes.c_uint64),
        ("untracked", ctypes.c_uint64),
        ("told_ns", ctypes.c_uint64),
        ("launches", ctypes.c_uint64),
    )
    used_bytes: int
    peak_bytes: int
    allocations: int
    frees: int
    refused: int
    refused_bytes: int
    over: int
    untracked: int
    told_ns: int
    launches: int


class VramProcess(ctypes.Structure):
    """struct vram_process, 24 bytes"""

    _fields_ = (
        ("start_ns", ctypes.c_uint64),
        ("account", ctypes.c_uint64),
        ("used_bytes", ctypes.c_uint64),
    )
    start_ns: int
    account: int
    used_bytes: int


class VramKey(ctypes.Structure):
    """struct vram_key, 24 bytes"""

    _fields_ = (
        ("start_ns", ctypes.c_uint64),
        ("handle", ctypes.c_uint64),
        ("tgid", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
    )
    start_ns: int
    handle: int
    tgid: int
    kind: int


class VramAllocation(ctypes.Structure):
    """struct vram_allocation, 32 bytes"""

    _fields_ = (
        ("size_bytes", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("context_serial", ctypes.c_uint64),
        ("refs", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )
    size_bytes: int
    context: int
    context_serial: int
    refs: int
    reserved: int


class VramEvent(ctypes.Structure):
    """struct vram_event, 56 bytes"""

    _fields_ = (
        ("event", Event),
        ("size_bytes", ctypes.c_uint64),
        ("used_bytes", ctypes.c_uint64),
        ("quota_bytes", ctypes.c_uint64),
        ("pid", ctypes.c_int32),
        ("refused", ctypes.c_uint32),
    )
    event: Event
    size_bytes: int
    used_bytes: int
    quota_bytes: int
    pid: int
    refused: int


class NetTraffic(ctypes.Structure):
    """struct net_traffic, 120 bytes"""

    _fields_ = (
        ("receive_bytes", ctypes.c_uint64),
        ("receive_packets", ctypes.c_uint64),
        ("apart", ctypes.c_uint64 * 8),
        ("send_bytes", ctypes.c_uint64),
        ("send_packets", ctypes.c_uint64),
        ("refused_packets", ctypes.c_uint64),
        ("send_bytes_per_s", ctypes.c_uint64),
        ("paid_until_ns", ctypes.c_uint64),
    )
    receive_bytes: int
    receive_packets: int
    apart: ctypes.Array[ctypes.c_uint64]
    send_bytes: int
    send_packets: int
    refused_packets: int
    send_bytes_per_s: int
    paid_until_ns: int


class NetControl(ctypes.Structure):
    """struct net_control, 8 bytes"""

    _fields_ = (
        ("first_level", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )
    first_level: int
    reserved: int
