"""agentcgroup: resource control for AI agents, one tool call at a time."""

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
    Feedback,
    FeedbackCode,
    Grant,
    Place,
    PoolInfo,
    Report,
    SessionInfo,
    Usage,
    Verdict,
)

__version__ = "0.1.0"

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
    "Feedback",
    "FeedbackCode",
    "Grant",
    "Intent",
    "InvalidIntent",
    "LauncherNotFound",
    "NotFound",
    "NotInSession",
    "PermissionDenied",
    "Place",
    "PoolInfo",
    "Refused",
    "Report",
    "ReportNotReady",
    "Result",
    "SessionInfo",
    "Unavailable",
    "Usage",
    "Verdict",
    "tool",
]
