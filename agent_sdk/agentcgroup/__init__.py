"""agentcgroup: resource control for AI agents, one tool call at a time."""

from typing import TYPE_CHECKING

from agentcgroup.admin import Admin
from agentcgroup.aio import AsyncAgent, AsyncCall
from agentcgroup.client import Agent, Call
from agentcgroup.decorator import tool
from agentcgroup.errors import (
    AgentcgError,
    AgentcgWarning,
    AlreadyExists,
    CallNotFound,
    InvalidIntent,
    LauncherNotFound,
    NotFound,
    NotInSession,
    PermissionDenied,
    Refused,
    ReportNotReady,
    Unavailable,
)
from agentcgroup.intent import Intent
from agentcgroup.results import CallPopen, CheckFailed, Result
from agentcgroup.types import (
    Budget,
    CallInfo,
    CallState,
    Event,
    Evidence,
    Fact,
    Feedback,
    FeedbackCode,
    Grant,
    Level,
    PastSession,
    Place,
    PoolInfo,
    Report,
    SessionInfo,
    SessionSums,
    Step,
    Story,
    Usage,
    Usages,
    Verdict,
)

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """Read `__version__` when it is first asked for: importlib.metadata is slow to import."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version

        globals()[name] = found = version("agentcgroup")
        return found


__all__ = [
    "Admin",
    "Agent",
    "AgentcgError",
    "AgentcgWarning",
    "AlreadyExists",
    "AsyncAgent",
    "AsyncCall",
    "Budget",
    "Call",
    "CallInfo",
    "CallNotFound",
    "CallPopen",
    "CallState",
    "CheckFailed",
    "Event",
    "Evidence",
    "Fact",
    "Feedback",
    "FeedbackCode",
    "Grant",
    "Intent",
    "InvalidIntent",
    "LauncherNotFound",
    "Level",
    "NotFound",
    "NotInSession",
    "PastSession",
    "PermissionDenied",
    "Place",
    "PoolInfo",
    "Refused",
    "Report",
    "ReportNotReady",
    "Result",
    "SessionInfo",
    "SessionSums",
    "Step",
    "Story",
    "Unavailable",
    "Usage",
    "Usages",
    "Verdict",
    "tool",
]
