"""The asyncio client: `AsyncAgent`, of the same shape as `Agent`."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from agentcgroup import flow, packets, packets_async, queries
from agentcgroup.call import (
    AgentSettings,
    CallBase,
    RunArguments,
    reason_of_error,
    split_run_arguments,
)
from agentcgroup.errors import AgentcgError, ConnectionLost, Unavailable, from_rpc_error
from agentcgroup.intent import INTENT_FIELDS, Intent, command, name_of
from agentcgroup.keywords import popen_keywords, refuse_unknown, seconds
from agentcgroup.launch import Launch
from agentcgroup.packets import Line
from agentcgroup.process import CallProcess, communicate, start
from agentcgroup.queries import Query
from agentcgroup.results import Result
from agentcgroup.streams import AsyncStream
from agentcgroup.types import Budget, CallInfo, Feedback, Grant, Report, SessionInfo, Story
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1.agentcgroup_pb2_grpc import AgentStub

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

T = TypeVar("T")


class AsyncCall(CallBase):
    """A tool call, made by `AsyncAgent.tool_call`; `async with` begins and ends it."""

    def __init__(self, agent: AsyncAgent, name: str, intent: Intent, argv: tuple[str, ...]) -> None:
        super().__init__(agent.settings, name, intent, argv)
        self._agent = agent
        self._returncode: int | None = None
        self._last: CallProcess | None = None
        self._popened: list[CallProcess] = []
        self._single = False  # whether the call is for one command: `AsyncAgent.run`
        self._line: Line | None = None  # the connection on which such a call was begun

    async def begin(self) -> Self:
        """Begin the call, as `async with` does. Raises what `Call.begin` raises."""
        launcher = self._launcher()
        self._begun(launcher, await self._agent.carry(self._begin_flow()))
        return self

    async def end(self) -> Report | None:
        """End the call, as leaving `async with` does. Returns its report."""
        await self._end(None)
        return self.report

    async def _end(
        self, error: BaseException | None, when_away: Callable[[], None] | None = None
    ) -> None:
        if self._state == "open":
            outcome = None
            if self.confined:
                returncode = self._last.returncode if self._last is not None else self._returncode
                signalled = self._last is not None and self._last.signalled
                request = self._end_request(returncode, error, signalled)
                line, self._line = self._line, None
                outcome = await self._agent.carry(flow.end(request, when_away), line)
            else:
                for process in self._popened:
                    if process.returncode is None:
                        process.kill()
            self._ended(outcome)

    async def __aenter__(self) -> Self:
        return await self.begin()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            await self.end()
        else:
            # A second cancellation must not leave the call open.
            await asyncio.shield(asyncio.ensure_future(self._end(error)))

    async def run(
        self,
        args: Any,
        *,
        input: Any = None,
        capture_output: bool = False,
        timeout: str | float | None = None,
        check: bool = False,
        **kwargs: Any,
    ) -> Result:
        """Run a command in the call and wait for it; the arguments are those of `subprocess.run`.

        Returns and raises what `Call.run` does. When the task is cancelled the process is killed.
        """
        arguments = RunArguments(args, input, capture_output, kwargs)
        timeout_s = seconds("timeout", timeout)
        self._last, self._returncode = None, None
        with self._launched(arguments.argv, arguments.popen) as launch:
            done = await communicate(launch, args, input, timeout_s, self._give_up)
            self._returncode = done.returncode
            launch.check(done.returncode)
        result = Result(self, args, done.returncode, done.stdout, done.stderr)
        if check:
            result.check_returncode()
        return result

    async def run_alone(
        self,
        args: Any,
        *,
        input: Any = None,
        capture_output: bool = False,
        timeout: str | float | None = None,
        **kwargs: Any,
    ) -> Result:
        """Do what `Call.run_alone` does."""
        self._single = True
        arguments = RunArguments(args, input, capture_output, kwargs)
        timeout_s = seconds("timeout", timeout)
        launcher = self._launcher()
        if arguments.popen.get("preexec_fn") is None:
            self._line = await self._agent.begin_early(self._early_rpc())
        if self._line is not None:
            with self._launched_early(launcher, arguments.argv, dict(arguments.popen)) as launch:

                async def started() -> None:
                    await self._take_begun(launcher, launch)

                try:
                    done = await communicate(launch, args, input, timeout_s, self._give_up, started)
                    self._returncode = done.returncode
                    launch.check(done.returncode)
                except BaseException as error:
                    if not await self._ended_after(error, launcher):
                        raise
                else:
                    await self._end(None)
                    return Result(self, args, done.returncode, done.stdout, done.stderr)
        self._returncode = None
        async with self:
            with self._launched(arguments.argv, arguments.popen) as launch:
                done = await communicate(launch, args, input, timeout_s, self._give_up)
                self._returncode = done.returncode
                launch.check(done.returncode)
        return Result(self, args, done.returncode, done.stdout, done.stderr)

    async def _ended_after(self, error: BaseException, launcher: str) -> bool:
        """End a call whose command was started early and failed; True: the daemon had just gone,
        and nothing has been begun."""
        if self._state == "new" and self._line is not None:
            await self._take_begun(launcher)  # the process could not be started
        if self._state == "new":
            return isinstance(error, ConnectionLost)
        # A second cancellation must not leave the call open.
        await asyncio.shield(asyncio.ensure_future(self._end(error)))
        return False

    async def _take_begun(self, launcher: str, launch: Launch | None = None) -> None:
        """Receive the answer to the request that was sent early, and tell `launch` at once. Raises
        AgentcgError."""
        assert self._line is not None
        try:
            outcome = await packets_async.answer(self._line, "BeginCall", flow.BEGIN_TIMEOUT_S)
        except BaseException:
            line, self._line = self._line, None
            line.close()
            raise
        if launch is not None:
            launch.tell(outcome.id)
        self._begun(launcher, outcome)

    async def _give_up(self, error: BaseException, kill: Callable[[], None]) -> None:
        """End a process that is not waited for any more. The daemon does it, which then knows who
        ended it, and why; with the call where that is for this process alone."""
        self._reason = reason_of_error(error)
        if self._single and self.confined:
            await asyncio.shield(asyncio.ensure_future(self._end(error, kill)))
        else:
            try:
                if self.confined:
                    saying = self._agent.carry(flow.end_command(self._command_request()))
                    await asyncio.shield(asyncio.ensure_future(saying))
            finally:
                kill()
            self._returncode = -signal.SIGKILL

    async def popen(self, args: Any, **kwargs: Any) -> asyncio.subprocess.Process:
        """Start a command in the call without waiting.

        The arguments are those of `asyncio.create_subprocess_exec`, with the command as one list.
        The process is ended with the call, if it has not ended before.
        """
        refuse_unknown("popen", kwargs, popen_keywords() | {"limit"}, INTENT_FIELDS)
        argv = command(args, kwargs.pop("shell", False), kwargs.pop("executable", None))
        with self._launched(argv, kwargs, piped=False) as launch:
            process = await start(launch)
        self._last = process
        self._popened.append(process)
        return process

    async def update(self, **intent: Unpack[Intent]) -> Grant | None:
        """Change what the open call may use; what is not named stays. Returns the new grant."""
        request = self._update_request(intent)
        if self.confined:
            self.grant = await self._agent.carry(queries.update(request).flow())
        return self.grant


class AsyncAgent:
    """An agent's connection to the daemon, for asyncio. The arguments are those of `Agent`.

    One event loop after another may use it (each gets its own channel), not two at the same time.
    """

    def __init__(self, run_dir: str | None = None, *, on_unavailable: str | None = None) -> None:
        self.settings = AgentSettings(run_dir, on_unavailable)
        self._home: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        # Channels of a parent process are kept: closing them here would disturb the parent.
        self._inherited: list[grpc.aio.Channel] = []

    @property
    def stub(self) -> Any:
        """Return the stub of this process and event loop."""
        home = (os.getpid(), asyncio.get_running_loop())
        if self._home != home:
            if self._channel is not None:
                self._inherited.append(self._channel)
            self._channel = grpc.aio.insecure_channel(
                self.settings.target, options=flow.CHANNEL_OPTIONS
            )
            self._stub = AgentStub(self._channel)
            self._home = home
        return self._stub

    async def begin_early(self, rpc: flow.Rpc) -> Line | None:
        """Do what `Connection.begin_early` does."""
        data = packets.packet_for(rpc)
        if data is None:
            return None
        try:
            line = Line(self.settings.attach_path)
        except Unavailable:
            return None
        try:
            await packets_async.send(line, data, rpc.timeout)
        except BaseException as error:
            line.close()
            if isinstance(error, Unavailable):
                return None
            raise
        return line

    async def carry(self, conversation: flow.Flow[T], line: Line | None = None) -> T:
        """Carry a conversation's messages to the daemon and back; returns its outcome. `line`: the
        connection on which the call was begun, which is closed."""
        try:
            rpc = next(conversation)
            while True:
                if rpc.pause:
                    await asyncio.sleep(rpc.pause)
                try:
                    with_line, line = line, None
                    reply = await self._send(rpc, with_line)
                except AgentcgError as error:
                    rpc = conversation.throw(error)
                else:
                    rpc = conversation.send(reply)
        except StopIteration as stop:
            outcome: T = stop.value
            return outcome

    async def _send(self, rpc: flow.Rpc, line: Line | None = None) -> Any:
        data = packets.packet_for(rpc)
        if data is not None and line is not None:
            try:
                with line:
                    return await packets_async.end(line, data, rpc.timeout)
            except (ConnectionLost, packets.TooLong):
                pass  # the daemon that held this connection is gone, or has more to say
        if data is not None:
            path = self.settings.attach_path
            try:
                return await packets_async.ask(path, rpc.method, data, rpc.timeout)
            except packets.TooLong:
                return await self._send_over_grpc(rpc)
        return await self._send_over_grpc(rpc)

    async def _send_over_grpc(self, rpc: flow.Rpc) -> Any:
        try:
            return await getattr(self.stub, rpc.method)(
                rpc.request, timeout=rpc.timeout + rpc.queued, wait_for_ready=rpc.wait
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def close(self) -> None:
        """Close the connection; a later use opens a new one."""
        channel, self._channel, self._stub, self._home = self._channel, None, None, None
        if channel is not None:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def tool_call(self, name: str, *, argv: Any = (), **intent: Unpack[Intent]) -> AsyncCall:
        """Make a call, to be begun by `async with`. The arguments are `Agent.tool_call`'s."""
        return AsyncCall(self, name, intent, tuple(argv))

    async def run(
        self,
        args: Any,
        *,
        name: str | None = None,
        call_timeout: str | float | None = None,
        check: bool = False,
        **kwargs: Any,
    ) -> Result:
        """Run a command as a call of its own. Arguments and result are those of `Agent.run`."""
        intent, rest = split_run_arguments(kwargs, call_timeout)
        argv = command(args, rest.get("shell", False), rest.get("executable"))
        call = self.tool_call(name or name_of(argv), argv=argv, **intent)
        result = await call.run_alone(args, **rest)
        if check:
            result.check_returncode()
        return result

    async def session(self) -> SessionInfo:
        """Return the session that this process is in."""
        return await self._ask(queries.session())

    async def budget(self) -> Budget:
        """Return what is left for this session: bytes, cores, processes."""
        return await self._ask(queries.budget())

    async def calls(self) -> list[CallInfo]:
        """Return the session's open calls."""
        return await self._ask(queries.calls())

    async def report(self, call_id: str | None = None) -> Report:
        """Return the report of an ended call, or the newest one."""
        return await self._ask(queries.report(call_id))

    async def reports(self, limit: int = 20) -> list[Report]:
        """Return the newest reports, newest first."""
        return await self._ask(queries.reports(limit))

    async def history(
        self, *, verdicts: Iterable[str] = (), since: float | str = 0, limit: int = 20
    ) -> list[Report]:
        """Return reports of this session from the store, newest first.

        Args:
            verdicts: only these, e.g. Verdict.TIMEOUT; empty: all.
            since: only calls that ended then or later: seconds since 1970, or text such as
                "2h", for so long ago, or "2026-01-31T12:00".
            limit: at most so many.
        """
        return await self._ask(queries.history("", verdicts, since, limit))

    async def story(self, call_id: str) -> Story:
        """Return what happened to a call of this session, in order.

        Raises:
            CallNotFound: nothing is known of it.
        """
        return await self._ask(queries.story(call_id))

    async def end_call(self, call_id: str, *, detach: bool = False) -> Report:
        """End an open call of this session by its id; with `detach`, leave its processes alone."""
        return await self._ask(queries.end_call(call_id, detach))

    def feedback(self, call_id: str | None = None) -> AsyncStream[Feedback]:
        """Watch feedback about the session (or one call): `async for item in agent.feedback()`.

        The first item asked for raises what `Agent.feedback` raises at once.
        """
        request = pb.WatchFeedbackRequest(call_id=call_id or "")
        return AsyncStream(
            lambda: self.stub.WatchFeedback(request, wait_for_ready=True),
            Feedback.from_proto,
            self.session,
            endless=call_id is None,
        )

    async def _ask(self, query: Query[T]) -> T:
        answer = await self.carry(query.flow())
        self.settings.seen = True
        return answer
