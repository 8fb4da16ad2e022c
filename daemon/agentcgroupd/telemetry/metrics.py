"""What Prometheus scrapes: docs/metrics.md lists it, made from here.

Labels are bounded: words of `labels`, never names or ids, but for the sessions that the operator
has asked to see one by one.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from agentcgroup import __version__
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.telemetry import labels as known
from agentcgroupd.telemetry.labels import priority_label, word

_MICROSECONDS = (100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000)
SECONDS_BUCKETS = (*(usec / 1e6 for usec in _MICROSECONDS), 1.0, 5.0)
WALL_BUCKETS = (0.01, 0.03, 0.07, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 1800)
BYTES_BUCKETS = tuple(float(1 << shift) for shift in range(22, 37))
ANY: tuple[str, ...] = ()
"""The values of a label that are known only when they are seen."""


class _Labelled(Protocol):
    def labels(self, *values: str) -> object: ...


class Total:
    """A counter that follows a count which is kept elsewhere, such as in the kernel."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._last: dict[tuple[str, ...], float] = {}

    def follow(self, count: float, *values: str) -> None:
        """Count on to `count`, of the series with these values of its labels. A count that is lower
        than the last one has begun anew."""
        before = self._last.get(values, 0)
        child = self._counter.labels(*values) if values else self._counter
        child.inc(count - before if count >= before else count)
        self._last[values] = count


class Metrics:
    """All metrics of one daemon, in a registry of their own."""

    def __init__(self) -> None:
        # A series for each other one, that nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.values: dict[str, Mapping[str, Sequence[str]]] = {}
        """Labels and their values, by the name of the metric."""
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._add_pool()
        self._add_calls()
        self._add_usage()
        self._add_policy()
        self._add_programs()
        self._add_scheduler()
        self._add_gpu()
        self._add_requests()
        self._add_daemon()
        self._add_sessions()

    # Making them

    def _counter(self, name: str, text: str, **labels: Sequence[str]) -> Counter:
        made = Counter(f"agentcg_{name}", text, tuple(labels), registry=self.registry)
        self._begin(made, f"agentcg_{name}_total", labels)
        return made

    def _total(self, name: str, text: str, **labels: Sequence[str]) -> Total:
        return Total(self._counter(name, text, **labels))

    def _gauge(self, name: str, text: str, **labels: Sequence[str]) -> Gauge:
        made = Gauge(f"agentcg_{name}", text, tuple(labels), registry=self.registry)
        self._begin(made, f"agentcg_{name}", labels)
        return made

    def _histogram(
        self, name: str, text: str, buckets: Iterable[float], **labels: Sequence[str]
    ) -> Histogram:
        names, limits = tuple(labels), tuple(buckets)
        made = Histogram(f"agentcg_{name}", text, names, buckets=limits, registry=self.registry)
        self._begin(made, f"agentcg_{name}", labels)
        return made

    def _begin(self, made: _Labelled, name: str, labels: Mapping[str, Sequence[str]]) -> None:
        """Have every series there from the start whose labels are known."""
        self.values[name] = labels
        if labels and ANY not in labels.values():
            for values in product(*labels.values()):
                made.labels(*values)

    def _add_pool(self) -> None:
        gauge = self._gauge
        self.pool_memory_current = gauge(
            "pool_memory_bytes", "Memory charged to the pool and to adopted sessions"
        )
        self.pool_memory_held = gauge(
            "pool_memory_held_bytes",
            "Memory of the pool and of adopted sessions without file cache",
        )
        self.pool_memory_held.set(float("nan"))  # until it has been looked at
        self.pool_memory_max = gauge("pool_memory_max_bytes", "The pool's limit (NaN: none)")
        self.pool_memory_ratio = gauge(
            "pool_memory_used_ratio",
            "Memory without file cache, divided by the pool's limit (NaN: no limit)",
        )
        self.sessions_open = gauge("sessions_open", "Open sessions", priority=known.PRIORITIES)
        self.sessions_memory = gauge(
            "sessions_memory_bytes",
            "Memory charged to the open sessions of a priority",
            priority=known.PRIORITIES,
        )
        self.containers = self._counter(
            "containers",
            "Containers that asked to be sessions",
            runtime=known.RUNTIMES,
            result=("session", "refused"),
        )
        self.calls_open = gauge("calls_open", "Open calls", state=tuple(known.CALL_STATES))
        self.calls_waiting = gauge("calls_waiting", "Calls that wait to begin")
        self.calls_waited_longest = gauge(
            "calls_waiting_longest_seconds", "How long the first call of the queue has waited"
        )

    def _add_calls(self) -> None:
        counter, histogram = self._counter, self._histogram
        self.calls_begun = counter("calls_begun", "Calls granted")
        self.calls_refused = counter("calls_refused", "Calls refused", code=known.CODES)
        results = ("started", "refused")
        self.calls_waited = histogram(
            "call_waited_seconds", "Time that calls waited to begin", WALL_BUCKETS, result=results
        )
        self.calls_reduced = counter("calls_reduced", "Calls granted less than they asked for")
        self.calls_observed = counter(
            "calls_observed",
            "Calls that no agent declared; moved=no: they had ended before they had a cgroup",
            moved=("yes", "no"),
        )
        self.calls_ended = counter(
            "calls_ended", "Calls ended", verdict=known.VERDICTS, priority=known.PRIORITIES
        )
        self.feedback = counter("feedback", "Feedback given to agents", code=known.FEEDBACK_CODES)
        self.call_wall = histogram("call_wall_seconds", "Wall time of calls", WALL_BUCKETS)
        self.call_peak = histogram("call_memory_peak_bytes", "Peak memory of calls", BYTES_BUCKETS)
        self.throttled = counter(
            "throttled_seconds",
            "Time that ended calls were held back",
            resource=("cpu", "memory", "frozen"),
        )
        self.moved = histogram(
            "exec_to_moved_seconds",
            "From an exec in an agent leaf to its call's leaf",
            SECONDS_BUCKETS,
        )

    def _add_usage(self) -> None:
        """What ended calls took; those inside another call are a part of that."""
        counter, by = self._counter, {"priority": known.PRIORITIES}
        self.used_cpu = counter("calls_cpu_seconds", "CPU time of ended calls", **by)
        self.used_memory = counter(
            "calls_memory_byte_seconds", "Peak memory by wall time of ended calls", **by
        )
        self.used_io = counter(
            "calls_io_bytes",
            "Bytes read from and written to devices by ended calls",
            direction=("read", "write"),
            **by,
        )

        self.used_net = counter(
            "calls_network_bytes",
            "Bytes that ended calls received and sent, where that is counted",
            direction=("receive", "send"),
            **by,
        )

    def _add_policy(self) -> None:
        counter = self._counter
        self.actions = counter("actions", "Actions of the policy", action=known.ACTIONS)
        self.reclaimed = counter("reclaimed_bytes", "Memory taken back by the policy")
        self.policy_reloads = counter(
            "policy_reloads", "Policies read anew", result=("changed", "unchanged", "refused")
        )
        self.policy_wrong = self._gauge(
            "policy_wrong", "1: the policy's files cannot be used as they are"
        )
        self.reaction = self._histogram(
            "reaction_seconds",
            "From passing the pool's mark to the guard's decisions applied",
            SECONDS_BUCKETS,
        )
        self.file_systems_low = self._gauge(
            "file_systems_low", "File systems with less room than guard.disk_free asks for"
        )
        self.late_pauses = counter("late_pauses", "Pauses that had not stopped all tasks in 0.1 s")
        self.oom_victims = counter("oom_victims", "Processes that the kernel's OOM killer chose")

    def _add_programs(self) -> None:
        self.features = self._gauge(
            "feature", "1: the feature works in this kernel", feature=known.FEATURES
        )
        self.events_lost = self._counter(
            "events_lost", "Events that were lost in the kernel", type=known.LOST
        )
        self.bpf_failures = self._total("bpf_failures", "What the programs were asked and refused")
        self.signals = self._counter(
            "signals", "Signals from the kernel's programs", signal=known.SIGNALS
        )

    def _add_scheduler(self) -> None:
        self.scheduler = self._gauge(
            "scheduler", "What our CPU scheduler has now", state=known.SCHEDULER_STATES
        )
        self.scheduler_events = self._total(
            "scheduler_events",
            "What our CPU scheduler has counted",
            event=known.SCHEDULER_EVENTS,
        )
        self.scheduler_ejected = self._counter(
            "scheduler_ejected", "Times the kernel let go of our CPU scheduler"
        )
        of_tasks = "Of the pool's tasks under our CPU scheduler"
        self.cpu_seconds = self._total("pool_cpu_seconds", of_tasks, what=known.CPU_TIMES)
        self.cpu_events = self._total("pool_cpu_events", of_tasks, event=known.CPU_EVENTS)

    def _add_gpu(self) -> None:
        counter, gauge = self._counter, self._gauge
        self.gpu_busy = gauge("gpu_busy_ratio", "Busy time of a GPU (NaN: unknown)", device=ANY)
        self.gpu_memory = gauge(
            "gpu_memory_bytes", "Memory of a GPU in use (NaN: unknown)", device=ANY
        )
        self.gpu_calls = gauge("gpu_calls", "Open calls with a part of a GPU")
        self.gpu_strangers = gauge(
            "gpu_strangers", "Processes on a GPU that are of no call with a part of it"
        )
        self.gpu_refused = counter(
            "gpu_allocations_over_quota",
            "Allocations of GPU memory over a quota that probes told",
            how=("refused", "seen"),
        )
        self.gpu_faults = counter("gpu_faults", "Errors that the GPU driver reported", xid=ANY)
        self.gpu_energy = counter("gpu_energy_joules", "Energy that GPUs took for ended calls")
        self.gpu_held_back = counter(
            "gpu_held_back_seconds", "Time that calls waited for their turn on a GPU"
        )

    def _add_requests(self) -> None:
        counter = self._counter
        self.rpc = self._histogram(
            "rpc_seconds", "Time to answer a request", SECONDS_BUCKETS, method=known.METHODS
        )
        self.rpc_errors = counter(
            "rpc_errors",
            "Requests answered by an error",
            method=(*known.METHODS, *known.NO_METHODS),
            code=known.CODES,
        )
        self.peers_refused = counter("peers_refused", "Connections refused", reason=known.PEERS)
        self.refused = counter("refused", "Refused because a limit was reached", what=known.LIMITS)

    def _add_daemon(self) -> None:
        gauge, total = self._gauge, self._total
        build = gauge("build_info", "1; the labels say what runs", **dict.fromkeys(_BUILD, ANY))
        build.labels(__version__, platform.release(), platform.python_version()).set(1)
        self.ready = gauge("ready", "1: agents are served, as /readyz says")
        self.live = gauge("live", "1: the daemon lives and answers, as /healthz says")
        self.started = gauge("start_time_seconds", "When the daemon was started, since 1970")
        self.started.set(time.time())
        self.phase = self._histogram(
            "phase_seconds", "Time of the daemon's own steps", SECONDS_BUCKETS, phase=known.PHASES
        )
        self.loop_lag = self._histogram(
            "loop_lag_seconds", "Lateness of the event loop", SECONDS_BUCKETS
        )
        self.leftovers = self._counter(
            "leftovers_removed", "Cgroups found without an owner and removed"
        )
        self.cgroups_polled = gauge(
            "cgroups_polled", "Cgroups that are read at intervals: no inotify watch is left"
        )
        self.audit_lost = total("audit_entries_lost", "Audit entries that could not be written")
        self.audit_left_out = total(
            "audit_entries_left_out", "Audit entries of sessions beyond their share or rate"
        )
        self.history_lost = total("history_rows_lost", "Rows of history that could not be kept")
        self.history_bytes = gauge("history_bytes", "Size of the history that is kept")

    def _add_sessions(self) -> None:
        """Add those of as many sessions as `server.metrics_sessions` says, and of all others."""
        gauge, which = self._gauge, {"session": ANY}
        self.session_memory = gauge("session_memory_bytes", "Memory charged to a session", **which)
        self.session_memory_max = gauge(
            "session_memory_max_bytes", "A session's own limit (NaN: none)", **which
        )
        self.session_calls = gauge("session_calls_open", "Open calls of a session", **which)
        self.session_paused = gauge("session_calls_paused", "Paused calls of a session", **which)

    def tell_health(self, heartbeat: Heartbeat) -> None:
        """Have `live` and `ready` say what it says whenever they are read, so also when the loop
        does not run."""
        self.live.set_function(lambda: not heartbeat.wrong())
        self.ready.set_function(lambda: not heartbeat.unready())

    # Counting

    def count_end(self, report: pb.Report) -> None:
        """Count an ended call."""
        priority = priority_label(report.grant.priority)
        self.calls_ended.labels(word(pb.Verdict.Name(report.verdict), "VERDICT_"), priority).inc()
        self.call_wall.observe(report.wall_usec / 1e6)
        if report.HasField("memory_peak_bytes"):
            self.call_peak.observe(report.memory_peak_bytes)
        _add(self.throttled, report.cpu_throttled_usec / 1e6, "cpu")
        _add(self.throttled, report.memory_throttled_usec / 1e6, "memory")
        _add(self.throttled, report.frozen_usec / 1e6, "frozen")
        if report.HasField("gpu"):
            self.gpu_energy.inc(report.gpu.energy_mj / 1e3)
            self.gpu_held_back.inc(report.gpu.held_back_usec / 1e6)
        if not report.parent_call_id:
            self._count_usage(report, priority)

    def _count_usage(self, report: pb.Report, priority: str) -> None:
        _add(self.used_cpu, report.cpu_usage_usec / 1e6, priority)
        held = report.memory_peak_bytes * report.wall_usec / 1e6
        _add(self.used_memory, held, priority)
        _add(self.used_io, report.io_read_bytes, "read", priority)
        _add(self.used_io, report.io_write_bytes, "write", priority)
        _add(self.used_net, report.net.receive_bytes, "receive", priority)
        _add(self.used_net, report.net.send_bytes, "send", priority)

    def count_feedback(self, feedback: pb.Feedback) -> None:
        """Count one piece of feedback to an agent."""
        code = word(pb.FeedbackCode.Name(feedback.code), "FEEDBACK_CODE_")
        self.feedback.labels(code).inc()

    def time(self, phase: str) -> Any:
        """A context manager that times one of the daemon's own steps."""
        return self.phase.labels(phase).time()


def _add(counter: Counter, more: float, *labels: str) -> None:
    """Add to a series that is there already. Mostly there is nothing to add, and to find the series
    is most of the work."""
    if more:
        counter.labels(*labels).inc(more)


_BUILD = ("version", "kernel", "python")


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
