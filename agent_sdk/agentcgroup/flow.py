"""The beginning and the end of a call, written once for the sync and the asyncio client.

Each function is a generator that yields an `Rpc` and is sent its reply, or thrown the typed error;
what it returns is the outcome. None does I/O, so both clients only carry the messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from google.protobuf.message import Message

from agentcgroup.errors import (
    AgentcgError,
    CallNotFound,
    ConnectionLost,
    DaemonAway,
    Sealed,
    Unavailable,
)
from agentcgroup.v1 import agentcgroup_pb2 as pb

OnUnavailable = Literal["run", "refuse"]
T = TypeVar("T")

RPC_TIMEOUT_S = 5.0
BEGIN_TIMEOUT_S = 60.0
WAIT_MOST_S = 3600.0
"""How long a call may be in the daemon's queue before it begins."""
BEGIN_ATTEMPTS = 5
BEGIN_PAUSE_S = 0.2
RETURN_TIMEOUT_S = 2.0
"""How long a begin waits for a daemon that was there before, e.g. while it is being restarted."""
END_TIMEOUT_S = 10.0
"""How long an end waits altogether for its report."""
END_PAUSE_S = 0.05
"""Between attempts: a daemon that is shutting down answers "unavailable" at once."""

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    # Without this a new Agent would wait for the back-off of another channel to the same daemon.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(slots=True)
class Rpc:
    """A request to the daemon.

    method: its name in the protocol. timeout, pause: seconds, the latter slept before it is sent.
    wait: wait within the timeout for a daemon that is away. queued: seconds besides that the daemon
    may keep it in its queue (over the attach socket its answer says so itself).
    """

    method: str
    request: Message
    timeout: float = RPC_TIMEOUT_S
    wait: bool = False
    pause: float = 0.0
    queued: float = 0.0


Flow = Generator[Rpc, Any, T]


def begin(
    request: pb.BeginCallRequest, on_unavailable: OnUnavailable, seen: bool
) -> Flow[pb.Call | Unavailable]:
    """Begin a call. The outcome is the call, or why it has to run without control.

    Without control is only what finds nobody on the daemon's socket; in a sandbox that refuses
    sockets the outcome is Sealed, and the launcher declares the call. Every other error is raised.

    Args:
        request: what to begin.
        on_unavailable: "refuse" raises DaemonAway instead of returning it.
        seen: this client has reached the daemon before, so it may be about to return.
    """
    try:
        return (yield from _begin(request, seen))
    except DaemonAway as away:
        if on_unavailable == "refuse":
            raise
        return away
    except Sealed as sealed:
        return sealed


def _begin(request: pb.BeginCallRequest, seen: bool) -> Flow[pb.Call]:
    """Begin a call, with a new attempt after a connection that ended without an answer. A second
    BeginCall is safe: a call that the first one made is ended as abandoned."""
    pause = 0.0
    for left in reversed(range(BEGIN_ATTEMPTS)):
        try:
            rpc = Rpc("BeginCall", request, BEGIN_TIMEOUT_S, pause=pause, queued=WAIT_MOST_S)
            call: pb.Call = yield rpc
            return call
        except DaemonAway:
            if not seen or not left:
                raise
            yield from _return()
        except ConnectionLost:
            if not left:
                raise
        pause = BEGIN_PAUSE_S
    raise AssertionError("the last attempt returns or raises")


def _return() -> Flow[None]:
    """Wait for a daemon that is away to return. Raises DaemonAway."""
    try:
        yield Rpc("GetSession", pb.GetSessionRequest(), RETURN_TIMEOUT_S, wait=True)
    except Unavailable as away:
        raise DaemonAway(str(away)) from None


def end_command(request: pb.EndCallRequest) -> Flow[None]:
    """Have the daemon kill the command of a call that stays open. An error is no matter: the caller
    kills it as well."""
    try:
        yield Rpc("EndCall", request)
    except AgentcgError:
        return


def end(
    request: pb.EndCallRequest, when_away: Callable[[], None] | None = None
) -> Flow[pb.Report | AgentcgError]:
    """End a call, over a restart of the daemon if need be.

    The outcome is the report, or why there is none: an error here must not cost the caller the
    tool's own result. `when_away`: called when the daemon does not answer at once, so that somebody
    ends the process.
    """
    deadline = time.monotonic() + END_TIMEOUT_S
    message: Message = request
    method, left, wait, pause = "EndCall", END_TIMEOUT_S, False, 0.0
    while True:
        try:
            reply = yield Rpc(method, message, left, wait, pause)
            return reply  # type: ignore[no-any-return]
        except Unavailable as away:
            if when_away is not None:
                when_away()
            left, wait, pause = deadline - time.monotonic() - END_PAUSE_S, True, END_PAUSE_S
            if left <= 0 or away.code != "UNAVAILABLE":
                return away
        except CallNotFound as error:
            # The call ended by itself, or by an EndCall whose answer was lost with the daemon.
            if method == "GetReport":
                return error
            method, message = "GetReport", pb.GetReportRequest(call_id=request.call_id)
        except AgentcgError as error:
            return error
