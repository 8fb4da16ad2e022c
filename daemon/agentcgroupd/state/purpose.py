"""The purpose of a call, as its agent's model knows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Purpose:
    """The command that a call was begun for, as far as it can be told; empty: it cannot."""

    command: str = ""
    """Without what the agent puts around it; the head of a long one ends in an ellipsis."""
    tool_use_id: str = ""
    """The agent's own name for the tool call."""
    in_call_id: str = ""
    """The observed call from inside which this one was declared: both are of one tool call."""
    parents: tuple[int, ...] = ()
    """Pids of the processes above the one that entered, where it came from no call: what started
    it may be found to be a call a moment later."""
