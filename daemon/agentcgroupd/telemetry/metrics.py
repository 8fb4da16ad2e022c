"""What Prometheus scrapes. Labels are bounded: verdicts, codes and phases, never names or ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from agentcgroup.v1 import agentcgroup_pb2 as pb

_MICROSECONDS = (100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000)
SECONDS_BUCKETS = (*(usec / 1e6 for usec in _MICROSECONDS), 1.0, 5.0)
WALL_BUCKETS = (0.01, 0.03, 0.07, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 1800)
BYTES_BUCKETS = tuple(float(1 << shift) for shift in range(22, 37))


class Metrics:
    """All metrics of one daemon, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"agentcg_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"agentcg_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            limits, registry = tuple(buckets), self.registry
            return Histogram(f"agentcg_{name}", text, labels, buckets=limits, registry=registry)

        self.pool_memory_current = gauge("pool_memory_bytes", "Memory charged to the pool")
        self.pool_memory_max = gauge("pool_memory_max_bytes", "The pool's limit (NaN: none)")
        self.sessions_open = gauge("sessions_open", "Open sessions")
        self.containers = counter(
            "containers", "Containers that asked to be sessions", "runtime", "result"
        )
        self.calls_open = gauge("calls_open", "Open calls", "state")
        self.calls_begun = counter("calls_begun", "Calls granted")
        self.calls_refused = counter("calls_refused", "Calls refused", "code")
        self.calls_waiting = gauge("calls_waiting", "Calls that wait to begin")
        self.calls_waited = histogram(
            "call_waited_seconds", "Time that calls waited to begin", WALL_BUCKETS, "result"
        )
        self.calls_reduced = counter("calls_reduced", "Calls granted less than they asked for")
        self.calls_ended = counter("calls_ended", "Calls ended", "verdict")
        self.feedback = counter("feedback", "Feedback given to agents", "code")
        self.actions = counter("actions", "Actions of the policy", "action")
        self.reclaimed = counter("reclaimed_bytes", "Memory taken back by the policy")
        self.policy_reloads = counter("policy_reloads", "Policies read anew", "result")
        self.policy_wrong = gauge(
            "policy_wrong", "1: the policy's files cannot be used as they are"
        )
        self.call_wall = histogram("call_wall_seconds", "Wall time of calls", WALL_BUCKETS)
        self.call_peak = histogram("call_memory_peak_bytes", "Peak memory of calls", BYTES_BUCKETS)
        self.throttled = counter("throttled_seconds", "Time calls were held back", "resource")
        self.phase = histogram(
            "phase_seconds", "Time of the daemon's own steps", SECONDS_BUCKETS, "phase"
        )
        self.moved = histogram(
            "exec_to_moved_seconds",
            "From an exec in an agent leaf to its call's leaf",
            SECONDS_BUCKETS,
        )
        self.reaction = histogram(
            "reaction_seconds",
            "From passing the pool's mark to the guard's decisions applied",
            SECONDS_BUCKETS,
        )
        self.late_pauses = counter("late_pauses", "Pauses that had not stopped all tasks in 0.1 s")
        self.calls_observed = counter("calls_observed", "Calls that no agent declared", "moved")
        self.features = gauge("feature", "1: the feature works in this kernel", "feature")
        self.events_lost = counter("events_lost", "Events that were lost in the kernel", "type")
        self.bpf_failures = gauge("bpf_failures", "What the programs were asked and refused")
        self._add_scheduler(counter, gauge)
        self.oom_victims = counter("oom_victims", "Processes that the kernel's OOM killer chose")
        self.signals = counter("signals", "Signals from the kernel's programs", "signal")
        self._add_gpu(counter, gauge)
        self.rpc = histogram("rpc_seconds", "Time to answer a request", SECONDS_BUCKETS, "method")
        self.rpc_errors = counter("rpc_errors", "Requests answered by an error", "method", "code")
        self._add_exhaustion(counter, gauge)
        self.leftovers = counter("leftovers_removed", "Cgroups found without an owner and removed")
        self.audit_lost = gauge("audit_entries_lost", "Audit entries that could not be written")
        self.audit_left_out = gauge(
            "audit_entries_left_out", "Audit entries of sessions beyond their share or rate"
        )
        self.history_lost = gauge("history_rows_lost", "Rows of history that could not be kept")
        self.history_bytes = gauge("history_bytes", "Size of the history that is kept")
        self.loop_lag = histogram("loop_lag_seconds", "Lateness of the event loop", SECONDS_BUCKETS)

    def _add_gpu(self, counter: Callable[..., Counter], gauge: Callable[..., Gauge]) -> None:
        self.gpu_busy = gauge("gpu_busy_percent", "Busy time of a GPU (NaN: unknown)", "device")
        self.gpu_memory = gauge(
            "gpu_memory_bytes", "Memory of a GPU in use (NaN: unknown)", "device"
        )
        self.gpu_calls = gauge("gpu_calls", "Open calls with a part of a GPU")
        self.gpu_strangers = gauge(
            "gpu_strangers", "Processes on a GPU that are of no call with a part of it"
        )
        self.gpu_refused = counter("gpu_allocations_over_quota", "Told by probes", "how")
        self.gpu_faults = counter("gpu_faults", "Errors that the driver reported", "xid")
        self.gpu_energy = counter("gpu_energy_joules", "Energy of ended calls")
        self.gpu_held_back = counter("gpu_held_back_seconds", "Time calls waited for their turn")

    def _add_scheduler(self, counter: Callable[..., Counter], gauge: Callable[..., Gauge]) -> None:
        self.scheduler = gauge(
            "scheduler", "What the CPU scheduler counts, since it was attached", "count"
        )
        self.scheduler_ejected = counter("scheduler_ejected", "Times the kernel let go of it")
        of_tasks = "Of the pool's tasks under our CPU scheduler"
        self.cpu_seconds = gauge("pool_cpu_seconds", of_tasks, "what")
        self.cpu_events = gauge("pool_cpu_events", of_tasks, "what")

    def _add_exhaustion(self, counter: Callable[..., Counter], gauge: Callable[..., Gauge]) -> None:
        self.peers_refused = counter("peers_refused", "Connections refused", "reason")
        self.refused = counter("refused", "Refused because a limit was reached", "what")
        self.cgroups_polled = gauge(
            "cgroups_polled", "Cgroups that are read at intervals: no inotify watch is left"
        )

    def count_end(self, report: pb.Report) -> None:
        """Count an ended call."""
        verdict = _word(pb.Verdict.Name(report.verdict), "VERDICT_")
        self.calls_ended.labels(verdict).inc()
        self.call_wall.observe(report.wall_usec / 1e6)
        if report.HasField("memory_peak_bytes"):
            self.call_peak.observe(report.memory_peak_bytes)
        self.throttled.labels("cpu").inc(report.cpu_throttled_usec / 1e6)
        self.throttled.labels("memory").inc(report.memory_throttled_usec / 1e6)
        self.throttled.labels("frozen").inc(report.frozen_usec / 1e6)
        if report.HasField("gpu"):
            self.gpu_energy.inc(report.gpu.energy_mj / 1e3)
            self.gpu_held_back.inc(report.gpu.held_back_usec / 1e6)

    def count_feedback(self, feedback: pb.Feedback) -> None:
        """Count one piece of feedback to an agent."""
        self.feedback.labels(_word(pb.FeedbackCode.Name(feedback.code), "FEEDBACK_CODE_")).inc()

    def time(self, phase: str) -> Any:
        """A context manager that times one of the daemon's own steps."""
        return self.phase.labels(phase).time()


def _word(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()


class Heartbeat:
    """When the event loop last ran, and when the daemon last answered itself: written by the loop,
    read by /healthz and /readyz from another thread."""

    def __init__(self, limit_s: float = 5.0, canary_limit_s: float = 15.0) -> None:
        """`limit_s`: how long the loop may be silent; `canary_limit_s`: how long the operator's
        sockets may."""
        self._limit_s, self._canary_limit_s = limit_s, canary_limit_s
        self._last = self._answered = time.monotonic()
        self._unready = "no request has been answered yet"

    def answered(self, role: str) -> None:
        """Note that the sockets of a role have answered."""
        if role == "admin":
            self._answered = time.monotonic()
        else:
            self._unready = ""

    def unanswered(self, role: str, why: str) -> None:
        """Note that the sockets of a role have not answered, and why."""
        if role == "agent":
            self._unready = f"the agents' sockets do not answer: {why}"

    def stopping(self) -> None:
        """Note that nothing new is to be asked of this daemon."""
        self._unready = "the daemon is stopping"

    def beat(self) -> None:
        """Note that the loop runs now."""
        self._last = time.monotonic()

    def wrong(self) -> str:
        """What is wrong with the daemon, as a sentence; empty while it lives and answers."""
        now = time.monotonic()
        silent_s, unanswered_s = now - self._last, now - self._answered
        if silent_s > self._limit_s:
            return f"the event loop has not run for {silent_s:.1f} s"
        if unanswered_s > self._canary_limit_s:
            return f"the operator's sockets have not answered for {unanswered_s:.1f} s"
        return ""

    def unready(self) -> str:
        """Why agents should not be sent here now, as a sentence; empty while they may come."""
        return self.wrong() or self._unready
