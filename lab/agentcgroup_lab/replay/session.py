"""A session of a replay, as the engine sees it from outside: its driver, its log, its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentcgroup_lab.replay import outcome
from agentcgroup_lab.replay.backends import AGENT_LEAF, Backend, Place, ReplayError
from agentcgroup_lab.replay.meeting import Place as MeetingPlace
from agentcgroup_lab.replay.meeting import schedule_text
from agentcgroup_lab.replay.progress import SessionProgress
from agentcgroup_lab.replay.result import SessionResult, SessionState
from agentcgroup_lab.trace.plan import Plan
from agentcgroupd.cgroup.knobs import CGROUP_FREEZE, MEMORY_EVENTS, MEMORY_PEAK
from agentcgroupd.errors import CgroupGone

_DRIVER = Path(__file__).with_name("driver.py")
_SETTLE_S = 3.0
_CANNOT_RUN = (1, 2, 126, 127)
"""What agentcg-load ends with where it fails or does not understand its schedule, and what the
launcher says of a program that cannot be executed, or is not there."""
_LAST_LINES = 3


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


class Session:
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
        self._read_to = self._looked_at = 0

    def write_job(
        self, backend: Backend, load: str, gate: Path, meeting: MeetingPlace | None = None
    ) -> Path:
        """Write all that the driver needs, so that it need compute nothing."""
        delay_s = self.spec.delay_s
        calls = []
        for call in self.spec.plan.calls:
            schedule = self.work / f"call-{call.index}.schedule"
            text = meeting.schedule(self.spec.id, call) if meeting else schedule_text(call.steps)
            schedule.write_text(text, encoding="utf-8")
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
        """Read what the driver logged, and see whether it has ended.

        Raises ReplayError where it, or a call, could not even start: that says nothing about the
        strategy.
        """
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
            if self.state == "lost" and not self.events and not self._killed_for_memory():
                raise ReplayError(
                    f"session {self.spec.id} could not start (status {status}): {self.last_words()}"
                )
        self._refuse_calls_that_cannot_run()

    def _killed_for_memory(self) -> bool:
        try:
            events = self.place.cgroup.read_if(MEMORY_EVENTS)
        except CgroupGone:
            return False
        return events is not None and events.get("oom_kill", 0) > 0

    def _refuse_calls_that_cannot_run(self) -> None:
        for event in self.events[self._looked_at :]:
            self._looked_at += 1
            if event["e"] != "end" or os.WIFSIGNALED(event["status"]):
                continue
            if os.waitstatus_to_exitcode(event["status"]) not in _CANNOT_RUN:
                continue
            if event.get("no_memory"):
                continue
            why = event.get("why") or self.last_words()
            raise ReplayError(f"call {event['i']} of session {self.spec.id} cannot run: {why}")

    def last_words(self) -> str:
        """The last lines that the driver and its calls wrote to standard error."""
        text = (self.work / "stderr").read_text(encoding="utf-8", errors="replace")
        return " / ".join(text.splitlines()[-_LAST_LINES:]) or "it said nothing"

    def call_ended(self, index: int) -> bool:
        """Whether a call has ended, or never will because the session has."""
        if self.state is not None:
            return True
        return any(event["e"] == "end" and event["i"] == index for event in self.events)

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

    def is_paused(self) -> bool:
        """Whether one of its calls is frozen right now."""
        try:
            names = [name for name in self.place.cgroup.children() if name != AGENT_LEAF]
            states = [self.place.cgroup.child(name).read_if(CGROUP_FREEZE) for name in names]
            return True in states
        except CgroupGone:
            return False

    def is_waiting(self, index: int) -> bool:
        """Whether a call's program does not run yet: it waits to be let in, or calls before it did
        and made it late."""
        return not outcome.latency_file(self.work, index).exists()

    def progress(self, held_bytes: int, paused: bool) -> SessionProgress:
        """How far it is."""
        ends = [event for event in self.events if event["e"] == "end"]
        killed = sum(os.WIFSIGNALED(event["status"]) for event in ends)
        open_calls = {event["i"] for event in self.events if event["e"] == "begin"}
        open_calls -= {event["i"] for event in ends}
        running = max(open_calls, default=None) if self.state is None else None
        return SessionProgress(
            id=self.spec.id,
            important=self.spec.important,
            held_bytes=held_bytes,
            finished=len(ends) - killed,
            lost=killed,
            planned=len(self.spec.plan.calls),
            state=self.state or "",
            tool="" if running is None else self.spec.plan.calls[running].tool,
            paused=paused and running is not None,
        )

    def result(
        self,
        events: Sequence[Any],
        started: float,
        unix_started: float,
        highest_bytes: int | None,
    ) -> SessionResult:
        """Put together what became of it. `highest_bytes`: its highest sample."""
        spec = self.spec
        ups = [event["t"] for event in self.events if event["e"] == "ready"]
        reports = outcome.reports(events, spec.id, unix_started)
        calls = outcome.call_results(spec.plan, self.events, reports, started, self.ended)
        return SessionResult(
            id=spec.id,
            recording=spec.recording,
            important=spec.important,
            state=self.state or "lost",
            began_s=(ups[0] if ups else started) - started + spec.delay_s,
            ended_s=self.ended - started,
            planned_s=spec.plan.duration_s,
            planned_peak_bytes=spec.plan.peak_bytes,
            peak_bytes=self.peak_bytes or highest_bytes,
            oom_kills=self.oom_kills,
            calls=calls,
            alloc_latency=outcome.alloc_latency(self.work),
        )
