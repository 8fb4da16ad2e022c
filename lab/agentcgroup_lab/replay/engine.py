"""Runs the plans of several sessions at once, as real processes, under one strategy.

The engine stands outside every session. Each session has one driver (see `driver`) inside it, which
holds the agent's memory and starts the calls, each an `agentcg-load` that follows its schedule. The
engine samples the pool, reads what the drivers log, and ends everything that it started.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentcgroup_lab.replay import outcome
from agentcgroup_lab.replay.backends import Backend, Place, ReplayError, current_bytes, make_backend
from agentcgroup_lab.replay.result import SessionResult, SessionState, StrategyResult, Timeline
from agentcgroup_lab.trace.plan import Plan
from agentcgroupd.cgroup.knobs import MEMORY_EVENTS, MEMORY_PEAK
from agentcgroupd.errors import CgroupGone, KnobError

LOAD = "agentcg-load"
_DRIVER = Path(__file__).with_name("driver.py")
_PROGRESS_S = 1.0
_SETTLE_S = 3.0
_UP_S = 30.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """A session to replay; it starts `delay_s` after the others' time 0."""

    id: str
    recording: str
    plan: Plan
    important: bool = False
    delay_s: float = 0.0

    @property
    def planned_s(self) -> float:
        """Seconds until its end when nothing is in its way, the delay included."""
        return self.delay_s + self.plan.duration_s


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of a replay. `timeout_s`: None is five times the longest plan and a minute.
    `memory_scale`: of the plans; the daemon's policy is scaled alike."""

    sample_period_s: float = 0.05
    timeout_s: float | None = None
    memory_scale: float = 1.0


class _Session:
    """A running session as the engine sees it."""

    def __init__(self, spec: SessionSpec, place: Place, work: Path) -> None:
        self.spec, self.place = spec, place
        self.work = work / spec.id
        self.work.mkdir()
        self.events: list[dict[str, Any]] = []
        self.driver: subprocess.Popen[bytes] | None = None
        self.state: SessionState | None = None
        self.ended = 0.0
        self.peak_bytes: int | None = None
        self.oom_kills: int | None = None
        self.measured = False
        self._log = self.work / "events.jsonl"
        self._read_to = 0

    def write_job(self, backend: Backend, load: str, gate: Path) -> Path:
        """Write all that the driver needs, so that it need compute nothing."""
        delay_s = self.spec.delay_s
        calls = []
        for call in self.spec.plan.calls:
            schedule = self.work / f"call-{call.index}.schedule"
            schedule.write_text(
                "".join(
                    f"{step.duration_ms} {step.memory_bytes} {step.cpu_pct}\n"
                    for step in call.steps
                ),
                encoding="ascii",
            )
            latency = outcome.latency_file(self.work, call.index)
            calls.append(
                {
                    "index": call.index,
                    "start_s": call.start_s + delay_s,
                    "end_s": call.end_s + delay_s,
                    "background": call.background,
                    "schedule": str(schedule),
                    "argv": [
                        *backend.call_prefix(call.tool),
                        load,
                        "--alloc-latency",
                        str(latency),
                    ],
                }
            )
        first, *rest = self.spec.plan.agent
        agent = [(0.0, first.memory_bytes, 0 if delay_s else first.cpu_pct)]
        agent += [(step.at_s + delay_s, step.memory_bytes, step.cpu_pct) for step in rest]
        self._log.touch()
        job = self.work / "job.json"
        job.write_text(
            json.dumps(
                {
                    "enter": self.place.enter,
                    "events": str(self._log),
                    "gate": str(gate),
                    "duration_s": self.spec.planned_s,
                    "agent": agent,
                    "calls": calls,
                }
            ),
            encoding="utf-8",
        )
        return job

    def start(self, job: Path, environment: dict[str, str]) -> None:
        """Start the driver inside the session."""
        with (self.work / "stderr").open("wb") as stderr:
            self.driver = subprocess.Popen(
                [*self.place.prefix, sys.executable, "-I", "-S", str(_DRIVER), str(job)],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env={**os.environ, **environment},
            )

    def poll(self, now: float) -> None:
        """Read what the driver logged, and see whether it has ended."""
        assert self.driver is not None
        status = self.driver.poll()
        with self._log.open("rb") as stream:
            stream.seek(self._read_to)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read_to += len(whole)
        self.events += [json.loads(line) for line in whole.splitlines()]
        if status is not None and self.state is None:
            done = bool(self.events) and self.events[-1]["e"] == "done"
            self.state = "finished" if done else "lost"
            self.ended = self.events[-1]["t"] if done else now

    def measure(self) -> None:
        """Read what is known only while the cgroup is there."""
        self.measured = True
        try:
            self.peak_bytes = self.place.cgroup.read_if(MEMORY_PEAK)
            events = self.place.cgroup.read_if(MEMORY_EVENTS)
            self.oom_kills = None if events is None else events.get("oom_kill")
        except CgroupGone:
            pass  # closed by someone else: the timeline still has its highest sample

    def stop(self, backend: Backend) -> None:
        """End the session and its driver."""
        backend.close(self.spec.id)
        if self.driver is not None:
            try:
                self.driver.wait(_SETTLE_S)
            except subprocess.TimeoutExpired:
                self.driver.kill()
                self.driver.wait()

    def line(self) -> str:
        """The session's part of the progress line."""
        ends = [event for event in self.events if event["e"] == "end"]
        killed = sum(os.WIFSIGNALED(event["status"]) for event in ends)
        text = f"{self.spec.id} {len(ends) - killed}/{len(self.spec.plan.calls)}"
        if killed:
            text += f" ({killed} killed)"
        return text if self.state in (None, "finished") else f"{text} {self.state}"


def find_load() -> str:
    """Absolute path of agentcg-load: $AGENTCG_LOAD, beside this interpreter's scripts, or in
    $PATH. Raises ReplayError."""
    places = [
        os.environ.get("AGENTCG_LOAD", ""),
        os.path.join(sysconfig.get_path("scripts"), LOAD),
        shutil.which(LOAD) or "",
    ]
    for place in places:
        if place and os.access(place, os.X_OK):
            return os.path.abspath(place)
    raise ReplayError(
        f"{LOAD} is not here: it comes with 'pip install agentcgroup[lab]', or set AGENTCG_LOAD to "
        "where it is"
    )


class _Sampler:
    """memory.current of the pool and the sessions, at absolute deadlines."""

    def __init__(self, backend: Backend, sessions: Sequence[_Session], started: float) -> None:
        self._backend, self._sessions, self._started = backend, sessions, started
        self.at_s: list[float] = []
        self.pool_bytes: list[int] = []
        self.series: dict[str, list[int | None]] = {session.spec.id: [] for session in sessions}

    def sample(self) -> None:
        """Take one sample; none where the pool itself is gone."""
        at_s = round(time.monotonic() - self._started, 4)
        pool_bytes = current_bytes(self._backend.pool)
        if pool_bytes is None:
            return
        self.at_s.append(at_s)
        self.pool_bytes.append(pool_bytes)
        for session in self._sessions:
            self.series[session.spec.id].append(current_bytes(session.place.cgroup))

    def highest(self, session_id: str) -> int | None:
        """The highest sample of a session; None where its cgroup was never seen."""
        seen = [held for held in self.series[session_id] if held is not None]
        return max(seen, default=None)

    def timeline(self) -> Timeline:
        series = {name: tuple(values) for name, values in self.series.items()}
        return Timeline(tuple(self.at_s), tuple(self.pool_bytes), series)


def _wait_until_up(sessions: Sequence[_Session], sampler: _Sampler, options: EngineOptions) -> None:
    """Wait until every agent holds its first memory, has ended, or is late: that one starts
    late."""
    deadline = time.monotonic() + _UP_S
    while time.monotonic() < deadline:
        sampler.sample()
        for session in sessions:
            session.poll(time.monotonic())
        if all(session.events or session.state is not None for session in sessions):
            return
        time.sleep(options.sample_period_s)


def _run_until_done(
    sessions: Sequence[_Session],
    sampler: _Sampler,
    options: EngineOptions,
    started: float,
    progress: Callable[[float], None],
) -> None:
    longest_s = max(session.spec.planned_s for session in sessions)
    limit_s = options.timeout_s or 5 * longest_s + 60
    next_sample = started
    next_progress = started + _PROGRESS_S
    while any(session.state is None for session in sessions):
        sampler.sample()
        now = time.monotonic()
        for session in sessions:
            if session.state is None:
                session.poll(now)
        for session in sessions:
            if session.state is not None and not session.measured:
                session.measure()
        if now >= next_progress:
            progress(now - started)
            next_progress += _PROGRESS_S
        if now - started > limit_s:
            for session in sessions:
                if session.state is None:
                    session.state, session.ended = "timed out", now
                    session.measure()
        next_sample = max(next_sample + options.sample_period_s, now)
        time.sleep(max(0.0, next_sample - time.monotonic()))
    sampler.sample()


def _left_in_sessions(sessions: Sequence[_Session]) -> tuple[str, ...]:
    """Calls' cgroups that are still there a while after every driver has ended."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        left: list[str] = []
        for session in sessions:
            # A lost or timed-out session's calls may still run: closing it is what ends them.
            if session.state != "finished":
                continue
            try:
                names = [name for name in session.place.cgroup.children() if name != "agent"]
                left += [str(session.place.cgroup.path / name) for name in names]
            except CgroupGone:
                continue
        if not left or time.monotonic() > deadline:
            return tuple(left)
        time.sleep(0.05)


def run_strategy(
    strategy: str,
    specs: Sequence[SessionSpec],
    pool_bytes: int,
    options: EngineOptions | None = None,
    say: Say = lambda line: None,
) -> StrategyResult:
    """Run all sessions at once under one strategy. Raises ReplayError where that is impossible
    here.

    Whatever happens, every process and cgroup made for it is ended before this returns.
    """
    options = options or EngineOptions()
    load = find_load()
    with tempfile.TemporaryDirectory(prefix="agentcg-replay-") as directory:
        work = Path(directory)
        backend = make_backend(strategy, pool_bytes, len(specs), work, options.memory_scale)
        sessions: list[_Session] = []
        left: tuple[str, ...] = ()
        stopped = False
        try:
            for spec in specs:
                place = backend.open(spec.id, spec.important)
                sessions.append(_Session(spec, place, work))
            gate = work / "gate"
            os.mkfifo(gate)
            jobs = [session.write_job(backend, load, gate) for session in sessions]
            # Readers of the gate wait for as long as it is open for writing.
            gate_fd = os.open(gate, os.O_RDWR | os.O_CLOEXEC)
            started = time.monotonic()
            unix_started = time.time()
            sampler = _Sampler(backend, sessions, started)
            for session, job in zip(sessions, jobs, strict=True):
                session.start(job, backend.environment())

            def progress(passed_s: float) -> None:
                used = f"{sampler.pool_bytes[-1] / 1e6:4.0f}" if sampler.pool_bytes else "   -"
                states = "  ".join(session.line() for session in sessions)
                pool = f"pool {used}/{pool_bytes / 1e6:.0f} MB"
                say(f"{strategy:>6} {passed_s:5.1f} s  {pool}  calls {states}")

            try:
                _wait_until_up(sessions, sampler, options)
            finally:
                gate.unlink()
                os.close(gate_fd)
            _run_until_done(sessions, sampler, options, started, progress)
            progress(time.monotonic() - started)
            seconds = max(session.ended for session in sessions) - started
            left = _left_in_sessions(sessions)
            for session in sessions:
                session.stop(backend)
            events = list(backend.events())
            results = tuple(
                _session_result(session, events, started, unix_started, sampler)
                for session in sessions
            )
            stopped = True
            left += backend.stop()
        finally:
            if not stopped:
                _abort(backend, sessions)
        return StrategyResult(
            strategy=strategy,
            limit_bytes=pool_bytes,
            seconds=seconds,
            sessions=results,
            timeline=sampler.timeline(),
            leaks=tuple(dict.fromkeys(left)),
            notes=backend.notes(),
        )


def _abort(backend: Backend, sessions: Sequence[_Session]) -> None:
    """End the drivers and the backend as far as possible: an error or Ctrl-C is on its way up."""
    for session in sessions:
        if session.driver is not None and session.driver.poll() is None:
            session.driver.kill()
            session.driver.wait()
    try:
        for session in sessions:
            session.place.cgroup.kill()
    except KnobError:
        pass  # gone already; the backend removes what is left
    backend.stop()


def _session_result(
    session: _Session,
    events: Sequence[Any],
    started: float,
    unix_started: float,
    sampler: _Sampler,
) -> SessionResult:
    spec = session.spec
    ups = [event["t"] for event in session.events if event["e"] == "ready"]
    reports = outcome.reports(events, spec.id, unix_started)
    calls = outcome.call_results(spec.plan, session.events, reports, started, session.ended)
    return SessionResult(
        id=spec.id,
        recording=spec.recording,
        important=spec.important,
        state=session.state or "lost",
        began_s=(ups[0] if ups else started) - started + spec.delay_s,
        ended_s=session.ended - started,
        planned_s=spec.plan.duration_s,
        planned_peak_bytes=spec.plan.peak_bytes,
        peak_bytes=session.peak_bytes or sampler.highest(spec.id),
        oom_kills=session.oom_kills,
        calls=calls,
        alloc_latency=outcome.alloc_latency(session.work),
    )
