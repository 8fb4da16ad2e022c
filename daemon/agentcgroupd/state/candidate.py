"""Calls that have been granted and have not begun."""

from __future__ import annotations

from dataclasses import dataclass

from agentcgroupd.intents.grant import Grant
from agentcgroupd.intents.request import CallRequest
from agentcgroupd.state.session import Call, Session


@dataclass(frozen=True, slots=True)
class Candidate:
    """A call before it has a cgroup: what was asked for, and what it is to get."""

    id: str
    session: Session
    request: CallRequest
    grant: Grant
    likely_bytes: int
    """What it will take: as its intent says, corrected by the last ones of its shape; 0: nothing
    is known."""
    outer: Call | None = None
    """The call that it is to begin in; None: in none, beside the agent."""
    cut: tuple[str, ...] = ()
    """What it gets less of than it asked for, because of `outer`; a sentence each."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The terms on which a call waits for one resource. Times are those of `boottime_usec`."""

    candidate: Candidate
    since_usec: int
    deadline_usec: int
    refused_late: bool
    """At its deadline the call is refused; else it starts then whatever there is."""

    @property
    def id(self) -> str:
        """The id of the call."""
        return self.candidate.id

    @property
    def patience_usec(self) -> int:
        """How long the call waits at most."""
        return self.deadline_usec - self.since_usec
