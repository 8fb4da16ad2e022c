"""A lazily made connection to one of the daemon's sockets, safe to carry over fork()."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc

from agentcgroup.errors import from_rpc_error
from agentcgroup.flow import CHANNEL_OPTIONS, Flow

S = TypeVar("S")
T = TypeVar("T")


class Connection(Generic[S]):
    """The channel and stub for a socket, made at first use and once in each process.

    Args:
        target: gRPC target, "unix:/path".
        make_stub: the stub's class.
    """

    def __init__(self, target: str, make_stub: Callable[[grpc.Channel], S]) -> None:
        self._target = target
        self._make_stub = make_stub
        # By pid: a channel inherited over fork() must be neither used nor closed in the child.
        # dict.setdefault is atomic, so no lock is needed that a fork could leave held.
        self._by_pid: dict[int, tuple[grpc.Channel, S]] = {}

    @property
    def stub(self) -> S:
        """The stub of this process."""
        pid = os.getpid()
        found = self._by_pid.get(pid)
        if found is None:
            channel = grpc.insecure_channel(self._target, options=CHANNEL_OPTIONS)
            made = (channel, self._make_stub(channel))
            found = self._by_pid.setdefault(pid, made)
            if found is not made:
                channel.close()
        return found[1]

    def carry(self, flow: Flow[T]) -> T:
        """Carry a conversation's messages to the daemon and back; returns its outcome.

        Raises:
            AgentcgError: what the conversation let through.
        """
        stub: Any = self.stub
        try:
            rpc = next(flow)
            while True:
                if rpc.pause:
                    time.sleep(rpc.pause)
                try:
                    reply = getattr(stub, rpc.method)(
                        rpc.request, timeout=rpc.timeout, wait_for_ready=rpc.wait
                    )
                except grpc.RpcError as error:
                    rpc = flow.throw(from_rpc_error(error))
                else:
                    rpc = flow.send(reply)
        except StopIteration as stop:
            outcome: T = stop.value
            return outcome

    def close(self) -> None:
        """Close this process's channel; a later use opens a new one."""
        found = self._by_pid.pop(os.getpid(), None)
        if found is not None:
            found[0].close()
