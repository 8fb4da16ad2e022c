"""Meetings: calls of several sessions that hold their peaks at the same moment, by agreement.

On a machine that is faster or slower than the recorded one, or busy, recorded peaks would meet by
luck. Here the calls themselves wait for each other (`tell` and `await` in their schedules): the
leader's call rises first and holds its peak, then the others rise one after the other, and nobody
lets go before each of them is at its peak, has ended, or is held back by somebody who watches the
pool. Were they to rise together, whom the kernel kills would be luck: it looks for a second one
before the first has given all of its memory back, and takes an agent while the calls are small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agentcgroup_lab.trace.plan import PlannedCall, Step

REACHED, ENDED, HELD = "reached its peak", "ended", "was held back"


@dataclass(frozen=True, slots=True)
class Meeting:
    """The index of one call of each session, in the order in which they rise, and whose is at its
    peak before the others rise.

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
        self._part = directory / "part"
        self.became: dict[str, str] = {}
        """What became of each session's call so far."""

    def _reached(self, session_id: str) -> Path:
        return self._directory / f"reached-{session_id}"

    def _rise(self, session_id: str) -> Path:
        return self._directory / f"rise-{session_id}"

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
            lines.insert(0, f"await {self._rise(session_id)}\n")
        return "".join(lines)

    def look(self, ended: Callable[[str, int], bool], is_held: Callable[[str, int], bool]) -> None:
        """Let the next one rise, or all part, once it is time.

        `ended`: whether a session's call has ended. `is_held`: whether somebody holds it back.
        """
        if self._part.exists():
            return
        for session_id in self._in_order():
            if session_id != self.meeting.leader:
                self._rise(session_id).touch()
            became = self._became(session_id, ended, is_held)
            if became is None:
                return
            self.became[session_id] = became
        self._part.touch()

    def _in_order(self) -> list[str]:
        others = [name for name in self.meeting.calls if name != self.meeting.leader]
        return [self.meeting.leader, *others]

    def _became(
        self,
        session_id: str,
        ended: Callable[[str, int], bool],
        is_held: Callable[[str, int], bool],
    ) -> str | None:
        """What became of a session's call, None while it rises."""
        index = self.meeting.calls[session_id]
        if session_id in self.became:
            return self.became[session_id]
        if self._reached(session_id).exists():
            return REACHED
        if ended(session_id, index):
            return ENDED
        # The leader is not held back for long: nobody rises before it is at its peak.
        return HELD if session_id != self.meeting.leader and is_held(session_id, index) else None

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
