"""agentcgroup: resource control for AI agents, one tool call at a time.

Each name is imported when it is first asked for: a command that asks one question needs neither
gRPC nor asyncio, whose imports take longer than the question.
"""

from typing import TYPE_CHECKING, Any

_HOMES = {
    "admin": "Admin",
    "aio": "AsyncAgent AsyncCall",
    "client": "Agent Call",
    "decorator": "tool",
    "errors": (
        "AgentcgError AgentcgWarning AlreadyExists CallNotFound InvalidIntent "
        "LauncherNotFound NotFound NotInSession PermissionDenied Refused ReportNotReady "
        "Unavailable"
    ),
    "intent": "Intent",
    "results": "CallPopen CheckFailed Result",
    "types": (
        "Budget CallInfo CallState Event Evidence Fact Feedback FeedbackCode Grant Level "
        "PastSession Place PoolInfo Report SessionEnd SessionInfo SessionSums Step Story "
        "TryNext Usage Usages Verdict"
    ),
}
"""Public names by the module that has them."""

if TYPE_CHECKING:
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
        SessionEnd,
        SessionInfo,
        SessionSums,
        Step,
        Story,
        TryNext,
        Usage,
        Usages,
        Verdict,
    )

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        """Import a public name, or read the version, when it is first asked for."""
        if name == "__version__":
            from importlib.metadata import version

            found = version("agentcgroup")
        else:
            home = next((home for home, names in _HOMES.items() if name in names.split()), None)
            if home is None:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            from importlib import import_module

            found = getattr(import_module(f"agentcgroup.{home}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """List the public names, imported or not."""
        return sorted({*globals(), *__all__})


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
    "SessionEnd",
    "SessionInfo",
    "SessionSums",
    "Step",
    "Story",
    "TryNext",
    "Unavailable",
    "Usage",
    "Usages",
    "Verdict",
    "tool",
]
