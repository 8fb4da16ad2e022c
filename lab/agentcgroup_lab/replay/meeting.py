"""Meetings: calls of several sessions that hold their peaks at the same moment, by agreement.

On a machine that is faster or slower than the recorded one, or busy, recorded peaks would meet by
luck. Here the calls themselves wait for each other (`tell` and `await` in their schedules): the
leader's call rises first and holds its peak, then the others rise, and nobody lets go before each
of them is at its peak, has ended, or is held back by somebody who watches the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agentcgroup_lab.trace.plan import PlannedCall, Step

REACHED, ENDED, HELD = "reached its peak", "ended", "was held back"


@dataclass(frozen=True, slots=True)
class Meeting:
    """The index of one call of each session, and whose is at its peak before the others rise.

    `hold_s`: how long the leader holds its peak at least, also where it is alone.
    """

    leader: str
    calls: Mapping[str, int]
    hold_s: float

    def alone(self) -> Meeting:
        """The same for the leader without the others."""
        return Meeting(self.leader, {self.leader: self.calls[self.leader]}, self.hold_s)


class Place:
    """The files by which the calls of a meeting and the engine know of each other."""

    def __init__(self, meeting: Meeting, directory: Path) -> None:
        self.meeting, self._directory = meeting, directory
        self._rise, self._part = directory / "rise", directory / "part"
        self.became: dict[str, str] = {}
        """What became of each session's call so far."""

    def _reached(self, session_id: str) -> Path:
        return self._directory / f"reached-{session_id}"

    def schedule(self, session_id: str, call: PlannedCall) -> str:
        """The text of a call's schedule, with its part in the meeting where it has one."""
        if self.meeting.calls.get(session_id) != call.index:
            return schedule_text(call.steps)
        peak = max(range(len(call.steps)), key=lambda at: call.steps[at].memory_bytes)
        rise, fall = call.steps[: peak + 1], call.steps[peak + 1 :]
        lines = [
            schedule_text(rise),
            f"tell {self._reached(session_id)}\n",
            f"await {self._part}\n",
            schedule_text(fall),
        ]
        if session_id == self.meeting.leader:
            hold = Step(round(self.meeting.hold_s * 1000), rise[-1].memory_bytes, 0)
            lines.insert(2, schedule_text((hold,)))
        else:
            lines.insert(0, f"await {self._rise}\n")
        return "".join(lines)

    def look(self, ended: Callable[[str, int], bool], is_held: Callable[[str, int], bool]) -> None:
        """Let the others rise, and all part, once it is time.

        `ended`: whether a session's call has ended. `is_held`: whether somebody holds it back.
        """
        if self._part.exists():
            return
        leader = self.meeting.leader
        if not self._rise.exists():
            if not (self._reached(leader).exists() or ended(leader, self.meeting.calls[leader])):
                return
            self._rise.touch()
        for session_id, index in self.meeting.calls.items():
            if session_id in self.became:
                continue
            if self._reached(session_id).exists():
                self.became[session_id] = REACHED
            elif ended(session_id, index):
                self.became[session_id] = ENDED
            elif is_held(session_id, index):
                self.became[session_id] = HELD
        if len(self.became) == len(self.meeting.calls):
            self._part.touch()

    def waited_s(self) -> float:
        """Seconds for which the leader waited for the others after it had held its peak for as long
        as planned; 0 where it never held it."""
        try:
            reached = self._reached(self.meeting.leader).stat().st_mtime
            return max(0.0, self._part.stat().st_mtime - reached - self.meeting.hold_s)
        except FileNotFoundError:
            return 0.0


def schedule_text(steps: tuple[Step, ...]) -> str:
    """Steps as agentcg-load reads them."""
    return "".join(f"{step.duration_ms} {step.memory_bytes} {step.cpu_pct}\n" for step in steps)
