"""Runs the plans of several sessions at once, as real processes, under one strategy.

The engine stands outside every session. Each session has one driver (see `driver`) inside it, which
holds the agent's memory and starts the calls, each an `agentcg-load` that follows its schedule. The
engine samples the pool, reads what the drivers log, and ends everything that it started.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentcgroup_lab.replay.backends import Backend, ReplayError, current_bytes, make_backend
from agentcgroup_lab.replay.meeting import Meeting
from agentcgroup_lab.replay.meeting import Place as MeetingPlace
from agentcgroup_lab.replay.progress import Progress
from agentcgroup_lab.replay.result import SessionResult, StrategyResult, Timeline
from agentcgroup_lab.replay.session import Session, SessionSpec
from agentcgroupd.errors import CgroupGone, KnobError

LOAD = "agentcg-load"
_LINE_S = 1.0
_WATCH_S = 0.5
_SETTLE_S = 3.0
_UP_S = 30.0

Say = Callable[[str], None]
Watch = Callable[[Progress], None]

__all__ = [
    "EngineOptions",
    "Meeting",
    "NotTogetherError",
    "Progress",
    "SessionSpec",
    "find_load",
    "run_strategy",
    "wait_for_others",
]


class NotTogetherError(ReplayError):
    """Another replay that was to start at the same moment did not."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of a replay. `timeout_s`: None is five times the longest plan and a minute.
    `memory_scale`: of the plans; the daemon's policy is scaled alike. `meeting`: calls that hold
    their peaks together. `together`: passed by each of the replays that are to start at the same
    moment, once its agents are up."""

    sample_period_s: float = 0.05
    timeout_s: float | None = None
    memory_scale: float = 1.0
    meeting: Meeting | None = None
    together: threading.Barrier | None = None


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

    def __init__(self, backend: Backend, sessions: Sequence[Session], started: float) -> None:
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

    def last(self, session_id: str) -> int:
        """The last sample of a session; 0 where there is none, or its cgroup is gone."""
        series = self.series[session_id]
        return (series[-1] or 0) if series else 0

    def highest(self, session_id: str) -> int | None:
        """The highest sample of a session; None where its cgroup was never seen."""
        seen = [held for held in self.series[session_id] if held is not None]
        return max(seen, default=None)

    def timeline(self) -> Timeline:
        series = {name: tuple(values) for name, values in self.series.items()}
        return Timeline(tuple(self.at_s), tuple(self.pool_bytes), series)


def _wait_until_up(sessions: Sequence[Session], sampler: _Sampler, options: EngineOptions) -> None:
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


def wait_for_others(options: EngineOptions) -> None:
    """Wait until each replay that is to start at the same moment is as far as this one. Raises
    NotTogetherError where one of them never will be."""
    if options.together is None:
        return
    try:
        options.together.wait()
    except threading.BrokenBarrierError as error:
        raise NotTogetherError("the replay beside this one did not start") from error


def _run_until_done(
    run: _Run, options: EngineOptions, started: float, tell: Callable[[], None]
) -> None:
    sessions = run.sessions
    longest_s = max(session.spec.planned_s for session in sessions)
    limit_s = options.timeout_s or 5 * longest_s + 60
    next_sample = started
    while any(session.state is None for session in sessions):
        run.sampler.sample()
        now = time.monotonic()
        for session in sessions:
            if session.state is None:
                session.poll(now)
        run.look_at_meeting()
        for session in sessions:
            if session.state is not None and not session.measured:
                session.measure()
        tell()
        if now - started > limit_s:
            for session in sessions:
                if session.state is None:
                    session.state, session.ended = "timed out", now
                    session.measure()
        next_sample = max(next_sample + options.sample_period_s, now)
        time.sleep(max(0.0, next_sample - time.monotonic()))
    run.sampler.sample()


def _left_in_sessions(sessions: Sequence[Session]) -> tuple[str, ...]:
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


class _Run:
    """The sessions of one strategy, while they run."""

    def __init__(
        self,
        strategy: str,
        backend: Backend,
        sessions: Sequence[Session],
        sampler: _Sampler,
        meeting: MeetingPlace | None,
        limit_bytes: int,
    ) -> None:
        self.sessions, self.sampler = sessions, sampler
        self._strategy, self._backend, self._limit_bytes = strategy, backend, limit_bytes
        self._meeting = meeting
        self._by_id = {session.spec.id: session for session in sessions}

    def look_at_meeting(self) -> None:
        """Let the meeting go on once those who are in it are as far as that."""
        if self._meeting is not None:
            self._meeting.look(
                lambda session_id, index: self._by_id[session_id].call_ended(index),
                self._is_held,
            )

    def _is_held(self, session_id: str, index: int) -> bool:
        """Whether a session's call is paused, or has not been let in."""
        if not self._backend.holds_back:
            return False
        session = self._by_id[session_id]
        return session.is_paused() or session.is_waiting(index)

    def progress(self, passed_s: float) -> Progress:
        """How far all are."""
        sampler = self.sampler
        return Progress(
            self._strategy,
            passed_s,
            sampler.pool_bytes[-1] if sampler.pool_bytes else None,
            self._limit_bytes,
            tuple(
                session.progress(sampler.last(session.spec.id), session.is_paused())
                for session in self.sessions
            ),
        )

    def result(
        self, started: float, sessions: tuple[SessionResult, ...], left: tuple[str, ...]
    ) -> StrategyResult:
        """What came of it, when all have ended. `left`: cgroups that are still there."""
        meeting = self._meeting
        return StrategyResult(
            strategy=self._strategy,
            limit_bytes=self._limit_bytes,
            seconds=max(session.ended for session in self.sessions) - started,
            sessions=sessions,
            timeline=self.sampler.timeline(),
            leaks=tuple(dict.fromkeys(left)),
            notes=self._backend.notes(),
            met=dict(meeting.became) if meeting else {},
            meeting_waited_s=meeting.waited_s() if meeting else 0.0,
        )


def _teller(run: _Run, started: float, say: Say, watch: Watch | None) -> Callable[[], None]:
    """Tell about progress when it is time: in lines, and to who watches."""
    next_s = {"line": _LINE_S, "watch": 0.0}

    def tell() -> None:
        passed_s = time.monotonic() - started
        if watch is not None and passed_s >= next_s["watch"]:
            next_s["watch"] = passed_s + _WATCH_S
            watch(run.progress(passed_s))
        if passed_s >= next_s["line"]:
            next_s["line"] += _LINE_S
            say(run.progress(passed_s).text())

    return tell


def run_strategy(
    strategy: str,
    specs: Sequence[SessionSpec],
    pool_bytes: int,
    options: EngineOptions | None = None,
    say: Say = lambda line: None,
    watch: Watch | None = None,
) -> StrategyResult:
    """Run all sessions at once under one strategy. Raises ReplayError where that is impossible
    here, or where a session or a call could not even start.

    `say` gets a line a second, `watch` the same as values, more often. Whatever happens, every
    process and cgroup made for it is ended before this returns.
    """
    options = options or EngineOptions()
    load = find_load()
    with tempfile.TemporaryDirectory(prefix="agentcg-replay-") as directory:
        work = Path(directory)
        backend = make_backend(strategy, pool_bytes, len(specs), work, options.memory_scale)
        sessions: list[Session] = []
        stopped = False
        try:
            for spec in specs:
                place = backend.open(spec.id, spec.important)
                sessions.append(Session(spec, place, work))
            meeting = MeetingPlace(options.meeting, work) if options.meeting else None
            gate = work / "gate"
            os.mkfifo(gate)
            jobs = [session.write_job(backend, load, gate, meeting) for session in sessions]
            # Readers of the gate wait for as long as it is open for writing.
            gate_fd = os.open(gate, os.O_RDWR | os.O_CLOEXEC)
            started, unix_started = time.monotonic(), time.time()
            sampler = _Sampler(backend, sessions, started)
            run = _Run(strategy, backend, sessions, sampler, meeting, pool_bytes)
            for session, job in zip(sessions, jobs, strict=True):
                session.start(job, backend.environment())
            try:
                _wait_until_up(sessions, sampler, options)
                wait_for_others(options)
            finally:
                gate.unlink()
                os.close(gate_fd)
            _run_until_done(run, options, started, _teller(run, started, say, watch))
            say(run.progress(time.monotonic() - started).text())
            left = _left_in_sessions(sessions)
            for session in sessions:
                session.stop(backend)
            events = list(backend.events())
            results = tuple(
                session.result(events, started, unix_started, sampler.highest(session.spec.id))
                for session in sessions
            )
            stopped = True
            left += backend.stop()
        finally:
            if not stopped:
                _abort(backend, sessions)
        return run.result(started, results, left)


def _abort(backend: Backend, sessions: Sequence[Session]) -> None:
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
