"""A lazily made connection to one of the daemon's sockets, safe to carry over fork().

`Client` is what the two synchronous clients share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.message import Message

from agentcgroup import packets
from agentcgroup.closing import Closing
from agentcgroup.errors import AgentcgError, ConnectionLost, Unavailable, from_rpc_error
from agentcgroup.flow import CHANNEL_OPTIONS, Flow, Rpc
from agentcgroup.queries import Query
from agentcgroup.v1 import agentcgroup_pb2 as pb

if TYPE_CHECKING:
    # Imported where it is needed: that takes longer than a whole request by packet.
    import grpc

S = TypeVar("S")
T = TypeVar("T")


class Connection(Generic[S]):
    """The channel and stub for a socket, made at first use and once in each process.

    Args:
        target: the gRPC target, "unix:/path".
        make_stub: the stub's class.
        attach_path: the attach socket, for what can go in a packet.
    """

    def __init__(
        self, target: str, make_stub: Callable[[grpc.Channel], S], attach_path: str
    ) -> None:
        self._target = target
        self._attach_path = attach_path
        self._make_stub = make_stub
        # By pid: a channel inherited over fork() must be neither used nor closed in the child.
        # dict.setdefault is atomic, so no lock is needed that a fork could leave held.
        self._by_pid: dict[int, tuple[grpc.Channel, S]] = {}

    @property
    def stub(self) -> S:
        """Return the stub of this process."""
        pid = os.getpid()
        found = self._by_pid.get(pid)
        if found is None:
            import grpc

            channel = grpc.insecure_channel(self._target, options=CHANNEL_OPTIONS)
            made = (channel, self._make_stub(channel))
            found = self._by_pid.setdefault(pid, made)
            if found is not made:
                channel.close()
        return found[1]

    def begin_early(self, rpc: Rpc) -> packets.Line | None:
        """Send a request and do not wait for its answer; None: it has to be carried in another
        way, which also tells whether the daemon is there."""
        data = packets.packet_for(rpc)
        if data is None:
            return None
        try:
            line = packets.Line(self._attach_path)
        except Unavailable:
            return None
        try:
            line.send(data, rpc.timeout)
        except BaseException as error:
            line.close()
            if isinstance(error, Unavailable):
                return None
            raise
        return line

    def carry(self, flow: Flow[T], line: packets.Line | None = None) -> T:
        """Carry a conversation's messages to the daemon and back; returns its outcome. `line`: the
        connection on which the call was begun, which is closed.

        Raises:
            AgentcgError: what the conversation let through.
        """
        try:
            rpc = next(flow)
            while True:
                if rpc.pause:
                    time.sleep(rpc.pause)
                try:
                    with_line, line = line, None
                    reply = self._send(rpc, with_line)
                except AgentcgError as error:
                    rpc = flow.throw(error)
                else:
                    rpc = flow.send(reply)
        except StopIteration as stop:
            outcome: T = stop.value
            return outcome

    def _send(self, rpc: Rpc, line: packets.Line | None = None) -> Any:
        data = packets.packet_for(rpc)
        if data is not None and line is not None:
            try:
                with line:
                    return line.end(data, rpc.timeout, _ended_well(rpc.request))
            except (ConnectionLost, packets.TooLong):
                pass  # the daemon that held this connection is gone, or has more to say
        if data is not None:
            try:
                return packets.ask(self._attach_path, rpc.method, data, rpc.timeout)
            except packets.TooLong:
                return self._send_over_grpc(rpc)
        return self._send_over_grpc(rpc)

    def _send_over_grpc(self, rpc: Rpc) -> Any:
        import grpc

        stub: Any = self.stub
        try:
            return getattr(stub, rpc.method)(
                rpc.request, timeout=rpc.timeout + rpc.queued, wait_for_ready=rpc.wait
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def close(self) -> None:
        """Close this process's channel; a later use opens a new one."""
        found = self._by_pid.pop(os.getpid(), None)
        if found is not None:
            found[0].close()


def _ended_well(request: Message) -> bool:
    """Tell whether a request is for the end of a call whose command has ended with status 0."""
    if not isinstance(request, pb.EndCallRequest):
        return False
    return request.HasField("wait_status") and not request.wait_status


class Client(Closing, Generic[S]):
    """A client of one socket.

    Attributes:
        connection: the connection to it.
    """

    def __init__(self, connection: Connection[S]) -> None:
        self.connection = connection

    def close(self) -> None:
        """Close the connection; a later use opens a new one."""
        self.connection.close()

    def _ask(self, query: Query[T]) -> T:
        """Ask the daemon and return what it answers. Raises AgentcgError."""
        return self.connection.carry(query.flow())
