"""The ways into the daemon: the sockets of agents and of the operator, and the metrics' port."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial

from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from agentcgroupd.calls.admission import Admission
from agentcgroupd.config import Config
from agentcgroupd.errors import ConfigError
from agentcgroupd.host.listening import Listener, listen
from agentcgroupd.rpc.attach import AttachServer
from agentcgroupd.rpc.budgets import Budgets
from agentcgroupd.rpc.callers import Callers
from agentcgroupd.rpc.gate import Gate
from agentcgroupd.rpc.grpc_server import GrpcServer
from agentcgroupd.rpc.hook_verb import HookVerb
from agentcgroupd.rpc.messages import Messages
from agentcgroupd.rpc.relay import Relay
from agentcgroupd.rpc.sealed import SealedDoor
from agentcgroupd.rpc.service import Parts
from agentcgroupd.rpc.services import AdminService, AgentService
from agentcgroupd.rpc.verbs import PING, AgentVerbs, OperatorVerbs, Verb, pong
from agentcgroupd.running import Running
from agentcgroupd.stopping import bounded
from agentcgroupd.telemetry.metrics_server import MetricsServer


class Doors:
    """Lets agents, the operator and the metrics' reader in. Use: `await Doors(...).open()`."""

    def __init__(
        self,
        config: Config,
        undo: AsyncExitStack,
        parts: Parts,
        admission: Admission,
        running: Running,
        given: Mapping[str, socket.socket],
    ) -> None:
        """`undo`: closes what was opened; `given`: the sockets that systemd handed over."""
        self._config = config
        self._undo = undo
        self._parts = parts
        self._admission = admission
        self._running = running
        self._given = given

    async def open(self) -> None:
        """Open all doors. Raises OSError or ConfigError."""
        for role in ("agent", "admin"):
            self._running.memory.add(await self._open(role))
        self._serve_metrics()
        self._undo.callback(self._parts.notices.feed.end)

    async def _open(self, role: str) -> Budgets:
        run_dir, parts, undo = self._config.server.run_dir, self._parts, self._undo
        metrics, turns, find = parts.notices.metrics, parts.turns, parts.sessions.of_cgroup
        mode = 0o666 if role == "agent" else 0o600
        listener = self._listen(role, "grpc", socket.SOCK_STREAM, mode)
        attach_listener = self._listen(role, "attach", socket.SOCK_SEQPACKET, mode)
        budgets = Budgets(self._config.limits, self._config.sessions.connections_max, metrics)
        gate = Gate(metrics, turns)
        private = run_dir / f"private/{role}.sock"
        server = GrpcServer(private, f"agentcgroup.v1.{role.capitalize()}", gate)
        relay = Relay(listener, server.address, metrics, find, budgets, turns)
        gate.relay = relay
        if role == "agent":
            verbs, messages = self._for_agents(server, relay, budgets)
        else:
            verbs, messages = self._for_operator(server, relay)
        attach = AttachServer(attach_listener, verbs, messages, metrics, find, budgets, turns)
        # Undone from the last: nobody new is let in, requests under way get a moment to end, and
        # then connections are closed.
        undo.push_async_callback(bounded, f"the {role} relay", relay.stop)
        undo.push_async_callback(bounded, f"the {role} gRPC server", server.stop)
        undo.callback(relay.close_door)
        undo.callback(attach.stop)
        await server.start()
        await relay.start()
        attach.start()
        return budgets

    def _listen(self, role: str, name: str, kind: socket.SocketKind, mode: int) -> Listener:
        path = self._config.server.run_dir / role / f"{name}.sock"
        listener = listen(path, kind, mode, f"{role}-{name}", self._given)
        self._undo.callback(listener.close)
        return listener

    def _for_agents(
        self, server: GrpcServer, relay: Relay, budgets: Budgets
    ) -> tuple[dict[str, Verb], Messages]:
        """Make what answers agents: the verbs of packets, and messages in packets."""
        parts = self._parts
        service = AgentService(parts, relay)
        pb_grpc.add_AgentServicer_to_server(service, server.server)
        callers = Callers(parts.sessions, self._config.calls.tools_may)
        agent = AgentVerbs(callers, parts.calls, self._admission, self._config.calls.rightsize)
        verbs: dict[str, Verb] = {PING: pong, "attach": agent.attach, "begin": agent.begin}
        sealed = SealedDoor(dict(verbs), budgets, parts.turns, parts.notices)
        self._undo.callback(sealed.stop)
        self._running.observers.declared = sealed.declared
        verbs |= {"report": agent.report, "told": HookVerb(callers, parts.calls).told}
        metrics = parts.notices.metrics
        return verbs, Messages("Agent", service, parts.agent_calls, metrics, parts.turns)

    def _for_operator(self, server: GrpcServer, relay: Relay) -> tuple[dict[str, Verb], Messages]:
        """Make what answers the operator: the verbs of packets, and messages in packets."""
        parts = self._parts
        service = AdminService(parts, relay)
        pb_grpc.add_AdminServicer_to_server(service, server.server)
        enter = OperatorVerbs(parts.sessions, parts.calls).enter
        verbs: dict[str, Verb] = {PING: pong, "enter": enter}
        return verbs, Messages("Admin", service, None, parts.notices.metrics, parts.turns)

    def _serve_metrics(self) -> None:
        address = self._config.server.metrics_address
        if not address:
            return
        metrics, heartbeat = self._parts.notices.metrics, self._running.heartbeat
        metrics.tell_health(heartbeat)
        try:
            server = MetricsServer(address, metrics, heartbeat.wrong, heartbeat.unready)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            message = f"server.metrics_address: {address!r} cannot be used: {why}"
            raise ConfigError(message) from None
        close = partial(asyncio.to_thread, server.close)
        self._undo.push_async_callback(bounded, "the metrics server", close)
