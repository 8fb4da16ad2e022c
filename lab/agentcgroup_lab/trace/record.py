"""Records a running session: what its cgroup holds and burns, and the calls that the daemon
reports.

Samples are taken at absolute deadlines, so that the recording does not drift; a deadline that was
missed is counted in the header, never filled in. The recording ends when the session closes, after
`duration_s`, or at SIGINT or SIGTERM, each time with a whole file.
"""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from agentcgroup_lab.trace.format import (
    COMMAND_CHARS,
    MEGABYTE_BYTES,
    Trace,
    TraceCall,
    TraceSample,
    write,
)
from agentcgroupd.cgroup.knobs import CPU_STAT, MEMORY_CURRENT
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.errors import CgroupGone, KnobError

if TYPE_CHECKING:
    from agentcgroup.v1 import agentcgroup_pb2 as pb

PERIOD_MIN_S, PERIOD_MAX_S = 0.005, 0.1
_RPC_S = 10.0
_LAST_REPORTS_S = 1.0


class RecordError(RuntimeError):
    """The session cannot be recorded; the message says why."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A sample as read: CLOCK_MONOTONIC seconds, bytes, CPU microseconds since the cgroup
    began."""

    at: float
    memory_bytes: int
    cpu_usec: int


@dataclass(frozen=True, slots=True)
class SeenCall:
    """A call as the daemon told of it. `ended_unix_usec` is None while it runs."""

    id: str
    name: str
    argv: tuple[str, ...]
    began_unix_usec: int
    ended_unix_usec: int | None


class CallLog:
    """Collects calls from the daemon's events; safe to feed from one thread and read from
    another."""

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id
        self._calls: dict[str, SeenCall] = {}
        self._lock = threading.Lock()
        self.closed = threading.Event()
        self.trouble: str | None = None

    def begun(self, call: pb.Call) -> None:
        """A call is open."""
        seen = SeenCall(call.id, call.name, tuple(call.argv), call.began_unix_usec, None)
        with self._lock:
            # Its end may have been told already, when this comes from ListCalls.
            self._calls.setdefault(call.id, seen)

    def event(self, event: pb.Event) -> None:
        """Anything the daemon told."""
        kind = event.WhichOneof("event")
        if kind == "begun" and event.begun.session_id == self._session_id:
            self.begun(event.begun)
        elif kind == "ended" and event.ended.session_id == self._session_id:
            report = event.ended
            end = report.began_unix_usec + report.wall_usec
            seen = SeenCall(
                report.call_id, report.name, tuple(report.argv), report.began_unix_usec, end
            )
            with self._lock:
                self._calls[report.call_id] = seen
        elif kind == "session_closed" and event.session_closed.id == self._session_id:
            self.closed.set()

    def calls(self) -> list[SeenCall]:
        """Calls so far, by their beginning."""
        with self._lock:
            return sorted(self._calls.values(), key=lambda call: call.began_unix_usec)


def sample_until(
    read: Callable[[], tuple[int, int]],
    period_s: float,
    duration_s: float | None,
    stopped: threading.Event,
    closed: threading.Event,
    begun: Callable[[], None] = lambda: None,
) -> tuple[list[Raw], int]:
    """Call `read` (bytes, CPU microseconds) every `period_s` until told to end or the cgroup is
    gone. `begun` is called after the first sample: all that happens from then on is recorded.

    Returns the samples, and how many deadlines were missed.
    """
    samples: list[Raw] = []
    missed = 0
    started = due = time.monotonic()
    while not stopped.is_set() and not closed.is_set():
        try:
            memory_bytes, cpu_usec = read()
        except CgroupGone:
            break
        now = time.monotonic()
        samples.append(Raw(now, memory_bytes, cpu_usec))
        if len(samples) == 1:
            begun()
        due += period_s
        if now >= due:
            late = int((now - due) / period_s) + 1
            missed += late
            due += late * period_s
        if duration_s is not None and due - started > duration_s:
            break
        stopped.wait(max(0.0, due - time.monotonic()))
    return samples, missed


def to_trace(
    session_id: str,
    raw: Sequence[Raw],
    calls: Sequence[SeenCall],
    period_s: float,
    missed: int,
    unix_at_zero: float,
) -> Trace:
    """Put samples and calls on one clock. `unix_at_zero`: Unix time at the first sample."""
    first = raw[0]
    samples: list[TraceSample] = []
    before = first
    for now in raw:
        passed_s, since_s = now.at - first.at, now.at - before.at
        cpu_pct = (now.cpu_usec - before.cpu_usec) / since_s / 1e4 if since_s else 0.0
        cum_pct = (now.cpu_usec - first.cpu_usec) / passed_s / 1e4 if passed_s else 0.0
        mem_mb = now.memory_bytes / MEGABYTE_BYTES
        samples.append(
            TraceSample(round(passed_s, 4), round(mem_mb, 3), round(cpu_pct, 2), round(cum_pct, 2))
        )
        before = now
    last_s = samples[-1].t_s
    traced: list[TraceCall] = []
    for call in calls:
        start_s = max(0.0, call.began_unix_usec / 1e6 - unix_at_zero)
        end_s = last_s
        if call.ended_unix_usec is not None:
            end_s = call.ended_unix_usec / 1e6 - unix_at_zero
        if end_s < 0.0 or start_s > last_s:
            continue
        command = shlex.join(call.argv)[:COMMAND_CHARS] if call.argv else None
        start_s = round(start_s, 4)
        traced.append(
            TraceCall(start_s, max(start_s, round(end_s, 4)), call.id, call.name, command)
        )
    return Trace(
        task=session_id,
        model="recorded",
        sample_period_s=period_s,
        samples=tuple(samples),
        calls=tuple(traced),
        extra={
            "missed_samples": missed,
            "calls_open_at_end": sum(call.ended_unix_usec is None for call in calls),
            "host_mem_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
            "host_cpus": os.cpu_count() or 1,
            "kernel": os.uname().release,
            "start_epoch": round(unix_at_zero, 3),
        },
    )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, while this context lasts."""
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reader(cgroup: Cgroup) -> Callable[[], tuple[int, int]]:
    def read() -> tuple[int, int]:
        return cgroup.read(MEMORY_CURRENT), cgroup.read(CPU_STAT)["usage_usec"]

    return read


def _pages(ask: Callable[..., Any], request: Any) -> Iterator[Any]:
    """Answers to a request for a list, page after page. Raises grpc.RpcError."""
    while True:
        page = ask(request, timeout=_RPC_S)
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


class _Watch:
    """The daemon's side of a recording: the session as it was found, and its calls as they come.

    A context manager, inside which events are collected by a thread.
    """

    def __init__(self, session_id: str, run_dir: str) -> None:
        import grpc

        from agentcgroup.paths import admin_socket
        from agentcgroup.v1 import agentcgroup_pb2_grpc as rpc

        self.log = CallLog(session_id)
        self._session_id = session_id
        self._channel = grpc.insecure_channel(f"unix:{admin_socket(run_dir)}")
        self._admin = rpc.AdminStub(self._channel)
        self._thread = threading.Thread(target=self._collect, name="watch-events", daemon=True)

    def __enter__(self) -> Cgroup:
        """Returns the session's cgroup."""
        import grpc

        from agentcgroup.v1 import agentcgroup_pb2 as pb

        # The stream first, then the list: a call that begins in between is seen twice, not never.
        request = pb.WatchEventsRequest(session_id=self._session_id)
        self._stream = self._admin.WatchEvents(request)
        self._thread.start()
        try:
            return self._find(pb)
        except grpc.RpcError as error:
            self.__exit__()
            raise RecordError(f"the daemon does not answer: {error.details()}") from error
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self._stream.cancel()
        self._thread.join(_RPC_S)
        self._channel.close()

    def _find(self, pb: ModuleType) -> Cgroup:
        listed = _pages(self._admin.ListSessions, pb.ListSessionsRequest())
        sessions = [session for page in listed for session in page.sessions]
        found = [session for session in sessions if session.id == self._session_id]
        if not found:
            known = ", ".join(sorted(session.id for session in sessions)) or "none"
            raise RecordError(f"no session {self._session_id!r} is open; open now: {known}")
        request = pb.ListCallsRequest(session_id=self._session_id)
        for page in _pages(self._admin.ListCalls, request):
            for call in page.calls:
                self.log.begun(call)
        return Cgroup.open(cgroup2_mount() / found[0].cgroup_path.lstrip("/"))

    def _collect(self) -> None:
        import grpc

        try:
            for event in self._stream:
                self.log.event(event)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.CANCELLED:
                self.log.trouble = f"the daemon's events ended early: {error.details()}"


def record(
    session_id: str,
    output: Path,
    *,
    run_dir: str,
    period_s: float = PERIOD_MAX_S,
    duration_s: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Trace:
    """Record a session into `output` and return what was written. Raises RecordError, OSError."""
    if not PERIOD_MIN_S <= period_s <= PERIOD_MAX_S:
        raise RecordError(
            f"the period is {period_s * 1000:g}ms; allowed: {PERIOD_MIN_S * 1000:g}ms to "
            f"{PERIOD_MAX_S * 1000:g}ms (a tool's burst is over in less than a second)"
        )
    if not output.parent.is_dir():
        raise RecordError(f"{output.parent} is not a directory")
    watch = _Watch(session_id, run_dir)
    log = watch.log
    with _stop_signals() as stopped, watch as cgroup:
        try:
            unix_at_zero = time.time()
            raw, missed = sample_until(
                _reader(cgroup),
                period_s,
                duration_s,
                stopped,
                log.closed,
                lambda: say(f"recording {session_id} to {output}; Ctrl-C ends it"),
            )
        except KnobError as error:
            raise RecordError(f"no memory controller for this session: {error}") from error
        finally:
            cgroup.close()
        if not stopped.is_set() and duration_s is None:
            # The cgroup is gone; the reports of calls that ended with it are still on their way.
            log.closed.wait(_LAST_REPORTS_S)
    if not raw:
        raise RecordError(f"session {session_id!r} closed before its first sample")
    if log.trouble:
        say(log.trouble)
    trace = to_trace(session_id, raw, log.calls(), period_s, missed, unix_at_zero)
    write(trace, output)
    return trace
