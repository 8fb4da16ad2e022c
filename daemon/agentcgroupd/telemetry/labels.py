"""What labels of metrics can be, so that every series is there from the start: a rate or an alert
over one that appears with its first event would miss that event.

Values are words without spaces. Of a label that has none here, the values are known when they are
seen (a device, the number of a driver's error, a session).
"""

from __future__ import annotations

import re

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import features
from agentcgroupd.policy.snapshot import Action
from agentcgroupd.units import IMPORTANT_PRIORITY, PRIORITY_WORDS


def word(name: str, prefix: str) -> str:
    """Turn the name of a value of an enumeration into a label: `OOM_CALL` into `oom_call`."""
    return name.removeprefix(prefix).lower()


def feature_label(name: str) -> str:
    """Turn the name of a feature into a label: `memory.high events` into `memory_high_events`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def priority_label(priority: int) -> str:
    """Tell which class a priority is in: `important` (80 and above), `batch` (below 50) or
    `normal`."""
    if priority >= IMPORTANT_PRIORITY:
        return "important"
    return "batch" if priority < PRIORITY_WORDS["normal"] else "normal"


PRIORITIES = tuple(PRIORITY_WORDS)
VERDICTS = tuple(word(name, "VERDICT_") for name, n in pb.Verdict.items() if n)
FEEDBACK_CODES = tuple(word(name, "FEEDBACK_CODE_") for name, n in pb.FeedbackCode.items() if n)
CALL_STATES = {
    "pending": pb.CALL_STATE_PENDING,
    "running": pb.CALL_STATE_RUNNING,
    "frozen": pb.CALL_STATE_FROZEN,
    "ending": pb.CALL_STATE_ENDING,
}
"""States of open calls by their labels."""
_DONE = tuple(action.value for action in Action)
ACTIONS = (
    *_DONE,
    *(f"dry_{action}" for action in _DONE),
    "confirm_urgent",
    "lift_urgent",
    "hold",
    "unhold",
    "disk_hold",
    "disk_unhold",
    "disk_kill",
)
FEATURES = tuple(
    feature_label(name)
    for name in (
        features.LIFECYCLE,
        features.OOM_VICTIMS,
        features.LEAVING,
        features.MARKS,
        features.DENY,
        features.HIGH_EVENTS,
        features.RATES,
        features.URGENT,
        features.RECLAIM_HOOKS,
        features.LOOK,
        features.CPU_SCHEDULER,
        features.NET,
    )
)
LOST = ("exec", "exit", "fork", "left", "memory", "memory_state", "oom_victim")
"""Events whose losses are counted."""
CODES = (
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "INTERNAL",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "UNKNOWN",
)
"""Codes of errors: those of the classes in `errors`."""
METHODS = tuple(
    sorted({m.name for s in pb.DESCRIPTOR.services_by_name.values() for m in s.methods})
)
RUNTIMES = ("cri", "docker", "nri", "podman")
"""The ways by which containers become sessions."""
NO_METHODS = ("attach", "gate", "packet", "sealed")
"""What stands for the method where a request was refused before it had one."""
LIMITS = (
    "answers",
    "answers_all",
    "attaching",
    "backend",
    "connections",
    "connections_all",
    "connections_strangers",
    "connects",
    "descriptors",
    "frames",
    "memory",
    "packets",
    "silent",
    "streams",
    "streams_strangers",
    "unfinished",
    "unread",
    "watchers",
)
"""What a caller can have too much of."""
PEERS = ("connections", "connects", "identity")
SIGNALS = (
    "alone",
    "denied",
    "denied_urgent",
    "high",
    "mark_above",
    "mark_below",
    "rates_above",
    "rates_below",
    "urgent",
)
PHASES = ("attach", "begin", "finish")
SCHEDULER_STATES = ("cgroups", "queues", "waiting", "in_lanes")
SCHEDULER_EVENTS = (
    "without_entry",
    "picks",
    "picks_empty",
    "preempted",
    "finishing",
    "left",
    "not_asked",
    "held_at_exec",
    "exec_holds_over",
)
CPU_TIMES = ("run", "wait", "boosted", "penalty", "stalled")
CPU_EVENTS = ("slices", "boosts", "penalties", "stalls", "rescues")
