"""The sync client: `Agent`, and the calls it makes."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from agentcgroup import flow, queries
from agentcgroup.call import (
    AgentSettings,
    CallBase,
    RunArguments,
    reason_of_error,
    split_run_arguments,
)
from agentcgroup.channel import Client, Connection
from agentcgroup.errors import ConnectionLost
from agentcgroup.flow import BEGIN_TIMEOUT_S
from agentcgroup.intent import INTENT_FIELDS, Intent, command, name_of
from agentcgroup.keywords import popen_keywords, refuse_unknown, seconds
from agentcgroup.launch import Launch
from agentcgroup.packets import Line
from agentcgroup.queries import Query
from agentcgroup.results import CallPopen, Result
from agentcgroup.types import Budget, CallInfo, Feedback, Grant, Report, SessionInfo, Story
from agentcgroup.v1 import agentcgroup_pb2 as pb

if TYPE_CHECKING:
    import grpc
    from typing_extensions import Self, Unpack

    from agentcgroup.streams import Stream
    from agentcgroup.v1.agentcgroup_pb2_grpc import AgentStub

T = TypeVar("T")


def _stub(channel: grpc.Channel) -> AgentStub:
    from agentcgroup.v1.agentcgroup_pb2_grpc import AgentStub

    return AgentStub(channel)


class Call(CallBase):
    """A tool call, made by `Agent.tool_call`; a `with` block begins and ends it.

    Every process started in the call is in its cgroup; what is left of them at the end is ended.
    """

    def __init__(self, agent: Agent, name: str, intent: Intent, argv: tuple[str, ...]) -> None:
        super().__init__(agent.settings, name, intent, argv)
        self._connection = agent.connection
        self._process: CallPopen | None = None
        self._single = False  # whether the call is for one command: `Agent.run`
        self._line: Line | None = None  # the connection on which such a call was begun
        self._popened: list[CallPopen] = []

    def begin(self) -> Self:
        """Begin the call, as `with` does: ask for the grant. Waits while the daemon queues it.

        Raises:
            InvalidIntent, Refused, NotInSession: the daemon's answer.
            Unavailable: the daemon is away and `on_unavailable` is "refuse".
            LauncherNotFound: agentcg-exec is not installed.
        """
        launcher = self._launcher()
        self._begun(launcher, self._connection.carry(self._begin_flow()))
        return self

    def end(self) -> Report | None:
        """End the call, as leaving `with` does. Returns its report; a second time, the same."""
        self._end(None)
        return self.report

    def _end(self, error: BaseException | None) -> None:
        if self._state == "open":
            process = self._process
            returncode = process.poll() if process is not None else None
            outcome = None
            if self.confined:
                # The process of a call for one command must not outlive a daemon that is away.
                kill = process.kill if process is not None and self._single else None
                signalled = process is not None and process.signalled
                request = self._end_request(returncode, error, signalled)
                line, self._line = self._line, None
                outcome = self._connection.carry(flow.end(request, kill), line)
            else:
                for process in self._popened:
                    process.kill()
            self._ended(outcome)

    def __enter__(self) -> Self:
        return self.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(error)

    def run(
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
        `timeout` may be text as well, such as "90s".

        Returns a `subprocess.CompletedProcess` with `.call_id`, and with `.report` and `.feedback`
        once the call has ended.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds; the process is killed, whatever it
                started is ended with the call.
            CheckFailed: with `check`, for an exit status other than 0 (a CalledProcessError).
            OSError: the command cannot be run; the class, errno and filename are subprocess's.
        """
        arguments = RunArguments(args, input, capture_output, kwargs)
        timeout_s = seconds("timeout", timeout)
        with self._launched(arguments.argv, arguments.popen) as launch:
            result = self._talk(launch, self._spawn(launch, args), args, input, timeout_s)
        if check:
            result.check_returncode()
        return result

    def _talk(
        self, launch: Launch, process: CallPopen, args: Any, input: Any, timeout_s: float | None
    ) -> Result:
        """Wait for a process and collect what it writes. Raises what `run` does."""
        with process:
            try:
                stdout, stderr = process.communicate(input, timeout=timeout_s)
            except BaseException as error:
                self._give_up(process, error)
                raise
        launch.check(process.returncode)
        return Result(self, args, process.returncode, stdout, stderr)

    def run_alone(
        self,
        args: Any,
        *,
        input: Any = None,
        capture_output: bool = False,
        timeout: str | float | None = None,
        **kwargs: Any,
    ) -> Result:
        """Begin the call, `run` a command in it, and end it: what `Agent.run` does.

        The launcher is started while the daemon makes the call, and the daemon sends the report
        when the kernel tells it that the command has ended.
        """
        self._single = True
        arguments = RunArguments(args, input, capture_output, kwargs)
        timeout_s = seconds("timeout", timeout)
        launcher = self._launcher()
        # What the caller has done in a new process is not done for a call that may be refused.
        if arguments.popen.get("preexec_fn") is None:
            self._line = self._connection.begin_early(self._early_rpc())
        if self._line is not None:
            with self._launched_early(launcher, arguments.argv, dict(arguments.popen)) as launch:
                try:
                    process = self._spawn_early(launcher, launch, args)
                    if process is not None:
                        result = self._talk(launch, process, args, input, timeout_s)
                except BaseException as error:
                    # An interrupt may come between any two of these lines.
                    if self._state != "new":
                        self._end(error)
                    raise
                if process is not None:
                    self._end(None)
                    return result
        with self:
            with self._launched(arguments.argv, arguments.popen) as launch:
                return self._talk(launch, self._spawn(launch, args), args, input, timeout_s)

    def _spawn_early(self, launcher: str, launch: Launch, args: Any) -> CallPopen | None:
        """Start a process while its call is being begun, and wait for that. None: the daemon has
        just gone, and nothing has been begun."""
        try:
            process = self._spawn(launch, args)
        except BaseException as error:
            self._take_begun(launcher)
            self._end(error)
            raise
        try:
            self._take_begun(launcher, launch)
        except BaseException as error:
            self._process = None
            if self._line is not None:
                # The call may have begun: closing the connection lets go of it.
                line, self._line = self._line, None
                line.close()
            with process:
                process.kill()
            if not isinstance(error, ConnectionLost):
                raise
            return None
        return process

    def _take_begun(self, launcher: str, launch: Launch | None = None) -> None:
        """Receive the answer to the request that was sent early, and tell `launch` at once. Raises
        AgentcgError."""
        assert self._line is not None
        try:
            outcome = self._line.answer("BeginCall", BEGIN_TIMEOUT_S)
        except BaseException:
            line, self._line = self._line, None
            line.close()
            raise
        if launch is not None:
            launch.tell(outcome.id)
        self._begun(launcher, outcome)

    def _give_up(self, process: CallPopen, error: BaseException) -> None:
        """End a process that is not waited for any more. The daemon does it, which then knows who
        ended it, and why; with the call where that is for this process alone."""
        if process.poll() is None:
            self._reason = reason_of_error(error)
            if self._single and self.confined:
                self._end(error)
            elif self.confined:
                self._connection.carry(flow.end_command(self._command_request()))
        process.kill()

    def popen(self, args: Any, **kwargs: Any) -> CallPopen:
        """Start a command in the call without waiting; the arguments are `subprocess.Popen`'s.

        The process is ended with the call, if it has not ended before.
        """
        refuse_unknown("popen", kwargs, popen_keywords(), INTENT_FIELDS)
        argv = command(args, kwargs.pop("shell", False), kwargs.pop("executable", None))
        with self._launched(argv, kwargs, piped=False) as launch:
            process = self._spawn(launch, args)
        self._popened.append(process)
        return process

    def _spawn(self, launch: Launch, args: Any) -> CallPopen:
        with launch.starting():
            self._process = CallPopen(launch.argv, args, **launch.options)
        return self._process

    def update(self, **intent: Unpack[Intent]) -> Grant | None:
        """Change what the open call may use; what is not named stays. Returns the new grant.

        Without control (`confined` is False) nothing happens and None is returned.
        """
        request = self._update_request(intent)
        if self.confined:
            self.grant = self._connection.carry(queries.update(request).flow())
        return self.grant


class Agent(Client["AgentStub"]):
    """An agent's connection to the daemon, made when first needed.

    Several threads may use it, and a forked child.

    Args:
        run_dir: directory of the daemon's sockets; else $AGENTCG_RUN_DIR, else /run/agentcgroup.
        on_unavailable: when the daemon is away, "run" runs tools without control and warns
            (AgentcgWarning), "refuse" raises Unavailable; else $AGENTCG_ON_UNAVAILABLE, else "run".
    """

    def __init__(self, run_dir: str | None = None, *, on_unavailable: str | None = None) -> None:
        self.settings = AgentSettings(run_dir, on_unavailable)
        target, attach_path = self.settings.target, self.settings.attach_path
        super().__init__(Connection(target, _stub, attach_path))

    def tool_call(self, name: str, *, argv: Any = (), **intent: Unpack[Intent]) -> Call:
        """Make a call, to be begun by `with`.

        Args:
            name: the tool, e.g. "pytest".
            argv: the command line, if it is known already; only shown to people.
            **intent: what it may use, see `Intent`: text, or numbers of bytes, cores, seconds.
        """
        return Call(self, name, intent, tuple(argv))

    def run(
        self,
        args: Any,
        *,
        name: str | None = None,
        call_timeout: str | float | None = None,
        check: bool = False,
        **kwargs: Any,
    ) -> Result:
        """Run a command as a call of its own, in place of `subprocess.run`.

        Args:
            args: the command.
            name: the tool's name; else the program's.
            call_timeout: the intent's `timeout`: the daemon ends the call then, and says so in the
                report. (`timeout` is that of subprocess.run: it raises TimeoutExpired.)
            check: raise CheckFailed, with the report, for an exit status other than 0.
            **kwargs: the other fields of `Intent`, and arguments of `subprocess.run`.

        Returns:
            The result with its report. Errors as those of `Call.begin` and `Call.run`.
        """
        intent, rest = split_run_arguments(kwargs, call_timeout)
        argv = command(args, rest.get("shell", False), rest.get("executable"))
        call = self.tool_call(name or name_of(argv), argv=argv, **intent)
        result = call.run_alone(args, **rest)
        if check:
            result.check_returncode()
        return result

    def session(self) -> SessionInfo:
        """Return the session that this process is in."""
        return self._ask(queries.session())

    def budget(self) -> Budget:
        """Return what is left for this session: bytes, cores, processes."""
        return self._ask(queries.budget())

    def calls(self) -> list[CallInfo]:
        """Return the session's open calls."""
        return self._ask(queries.calls())

    def report(self, call_id: str | None = None) -> Report:
        """Return the report of an ended call, or the newest one.

        Raises:
            CallNotFound: there is none.
        """
        return self._ask(queries.report(call_id))

    def reports(self, limit: int = 20) -> list[Report]:
        """Return the newest reports, newest first."""
        return self._ask(queries.reports(limit))

    def history(
        self, *, verdicts: Iterable[str] = (), since: float | str = 0, limit: int = 20
    ) -> list[Report]:
        """Return reports of this session from the store, newest first.

        Args:
            verdicts: only these, e.g. Verdict.TIMEOUT; empty: all.
            since: only calls that ended then or later: seconds since 1970, or text such as
                "2h", for so long ago, or "2026-01-31T12:00".
            limit: at most so many.
        """
        return self._ask(queries.history("", verdicts, since, limit))

    def story(self, call_id: str) -> Story:
        """Return what happened to a call of this session, in order.

        Raises:
            CallNotFound: nothing is known of it.
        """
        return self._ask(queries.story(call_id))

    def end_call(self, call_id: str, *, detach: bool = False) -> Report:
        """End an open call of this session by its id; with `detach`, leave its processes alone."""
        return self._ask(queries.end_call(call_id, detach))

    def feedback(self, call_id: str | None = None) -> Stream[Feedback]:
        """Watch feedback about the session (or one call): an iterator without end.

        Raises:
            Unavailable, NotInSession: at once. Later, a daemon that is away is waited for.
        """
        from agentcgroup.streams import Stream

        self.session()
        request = pb.WatchFeedbackRequest(call_id=call_id or "")
        return Stream(
            lambda: self.connection.stub.WatchFeedback(request, wait_for_ready=True),
            Feedback.from_proto,
            endless=call_id is None,
        )

    def _ask(self, query: Query[T]) -> T:
        answer = super()._ask(query)
        self.settings.seen = True
        return answer
