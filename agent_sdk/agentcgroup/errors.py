"""Errors as types, and the one place where a gRPC error becomes one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from google.protobuf.message import DecodeError

from agentcgroup.v1 import agentcgroup_pb2 as pb

if TYPE_CHECKING:
    # Its import takes longer than a whole request by packet.
    import grpc

ERROR_TRAILER = "agentcg-error-bin"


class AgentcgWarning(UserWarning):
    """A tool ran without control, or its report was lost; the tool's own result is unaffected."""


class AgentcgError(Exception):
    """Base of all errors of this package. `str(error)` is one plain sentence.

    Attributes:
        code: gRPC status name, e.g. "INVALID_ARGUMENT"; empty where no daemon was involved.
        field: what was refused, as named in the protocol, e.g. "memory_max"; may be empty.
        value: what the caller wrote there; may be empty.
        allowed: what may be written there; may be empty.
    """

    default_code: ClassVar[str] = ""

    def __init__(
        self, sentence: str, *, code: str = "", field: str = "", value: str = "", allowed: str = ""
    ) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.code = code or self.default_code
        self.field = field
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own method would lose the keyword arguments in a process pool.
        return (_rebuild, (type(self), self.sentence, self.to_dict()))

    def to_dict(self) -> dict[str, str]:
        """Return the error in parts, keys as in the protocol's message Error."""
        return {
            "code": self.code,
            "field": self.field,
            "value": self.value,
            "allowed": self.allowed,
            "sentence": self.sentence,
        }


def _rebuild(kind: type[AgentcgError], sentence: str, parts: Mapping[str, str]) -> AgentcgError:
    rest = {key: value for key, value in parts.items() if key != "sentence"}
    return kind(sentence, **rest)


class Unavailable(AgentcgError):
    """The daemon is away, did not answer in time, or cannot do now what was asked."""

    default_code = "UNAVAILABLE"


class DaemonAway(Unavailable):
    """Nobody listens on the daemon's socket: it does not run. No other error says that."""


class Sealed(Unavailable):
    """A sandbox around this process refuses sockets, so that the daemon cannot be asked. A command
    is declared by its launcher all the same (docs/sealed.md)."""


class ConnectionLost(Unavailable):
    """The daemon ended the connection without an answer: it stops, or had no room for it."""


class NotInSession(AgentcgError):
    """The calling process is in no session, so a call has nothing to be part of."""

    default_code = "UNAUTHENTICATED"


class PermissionDenied(AgentcgError):
    """The calling process may not do that: it is not root, or it is inside a session."""

    default_code = "PERMISSION_DENIED"


class InvalidIntent(AgentcgError):
    """A value in an intent or in a session's limits makes no sense; `field` names it."""

    default_code = "INVALID_ARGUMENT"


class Refused(AgentcgError):
    """The intent makes sense but cannot be granted now (no room, too many calls, wrong state)."""

    default_code = "RESOURCE_EXHAUSTED"


class AlreadyExists(Refused):
    """A session of that name exists already."""

    default_code = "ALREADY_EXISTS"


class NotFound(AgentcgError):
    """A session or cgroup of that name does not exist."""

    default_code = "NOT_FOUND"


class CallNotFound(NotFound):
    """A call of that id is not in reach of the caller, or its report is not kept any more."""


class LauncherNotFound(AgentcgError):
    """The program agentcg-exec is not installed where it is looked for."""


class ReportNotReady(AgentcgError):
    """A report was asked for while its call is still open."""


_BY_CODE: dict[str, type[AgentcgError]] = {
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": Unavailable,
    "UNAUTHENTICATED": NotInSession,
    "PERMISSION_DENIED": PermissionDenied,
    "INVALID_ARGUMENT": InvalidIntent,
    "OUT_OF_RANGE": InvalidIntent,
    "RESOURCE_EXHAUSTED": Refused,
    "FAILED_PRECONDITION": Refused,
    "ABORTED": Refused,
    "ALREADY_EXISTS": AlreadyExists,
    "NOT_FOUND": NotFound,
}

# NOT_FOUND says no call, unless the daemon names another field.
_NOT_A_CALL = frozenset({"session_id", "id", "cgroup_path"})


def from_rpc_error(error: grpc.RpcError) -> AgentcgError:
    """Return the typed error for a failed RPC, sync or asyncio.

    The daemon's sentence is the status message; its parts come from the trailer. An error that no
    daemon wrote (nobody listens, no answer in time) gets a sentence of our own.
    """
    status = error.code()
    code: str = status.name if status is not None else "UNKNOWN"
    parts = _trailer(error)
    if parts is not None:
        parts.code = code
        parts.sentence = parts.sentence or error.details() or code
        return from_message(parts)
    details = error.details() or ""
    if code == "CANCELLED":
        # gRPC says so where the daemon stops while it is being asked; we cancel nothing here.
        code, details = "UNAVAILABLE", "it has just stopped"
    kind = CallNotFound if code == "NOT_FOUND" else _BY_CODE.get(code, AgentcgError)
    if code == "UNAVAILABLE":
        # grpc's word for a connect(2) that failed.
        kind = DaemonAway if "failed to connect" in details else ConnectionLost
        details = f"agentcgroupd cannot be reached: {details or 'no reason given'}"
    elif code == "DEADLINE_EXCEEDED":
        details = "agentcgroupd did not answer in time"
    return kind(details or code, code=code)


def from_message(parts: pb.Error) -> AgentcgError:
    """Return the typed error for an Error of the daemon."""
    kind = _BY_CODE.get(parts.code, AgentcgError)
    if kind is NotFound and parts.field not in _NOT_A_CALL:
        kind = CallNotFound
    elif kind in (PermissionDenied, Refused) and parts.field == "session":
        kind = NotInSession
    return kind(
        parts.sentence or parts.code,
        code=parts.code,
        field=parts.field,
        value=parts.value,
        allowed=parts.allowed,
    )


def _trailer(error: grpc.RpcError) -> pb.Error | None:
    trailer: Any = error.trailing_metadata() or ()
    for key, value in trailer:
        if key == ERROR_TRAILER:
            try:
                return pb.Error.FromString(value)
            except DecodeError:
                return None
    return None
