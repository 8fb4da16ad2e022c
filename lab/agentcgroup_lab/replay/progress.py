"""How far a replay is, as values to show while it runs."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
"""Sizes are shown in the units that --pool takes."""


@dataclass(frozen=True, slots=True)
class SessionProgress:
    """A session right now. `state`: empty while it runs. `paused`: one of its calls is."""

    id: str
    important: bool
    held_bytes: int
    finished: int
    lost: int
    planned: int
    state: str
    tool: str
    paused: bool

    def text(self) -> str:
        """The session's part of a line."""
        text = f"{self.id} {self.finished}/{self.planned}"
        if self.lost:
            text += f" ({self.lost} killed)"
        return text if self.state in ("", "finished") else f"{text} {self.state}"


@dataclass(frozen=True, slots=True)
class Progress:
    """A strategy right now. `pool_bytes`: None before the first sample."""

    strategy: str
    passed_s: float
    pool_bytes: int | None
    limit_bytes: int
    sessions: tuple[SessionProgress, ...]

    def text(self) -> str:
        """Return it as a line of text."""
        used = "   -" if self.pool_bytes is None else f"{self.pool_bytes / MIB:4.0f}"
        states = "  ".join(session.text() for session in self.sessions)
        pool = f"pool {used}/{self.limit_bytes / MIB:.0f} MiB"
        return f"{self.strategy:>6} {self.passed_s:5.1f} s  {pool}  calls {states}"
