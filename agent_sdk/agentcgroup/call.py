"""A call without the waiting: what the sync and the asyncio client share."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import Any, get_args

from agentcgroup import flow, paths
from agentcgroup.errors import (
    AgentcgError,
    AgentcgWarning,
    InvalidIntent,
    ReportNotReady,
    Sealed,
    Unavailable,
)
from agentcgroup.flow import BEGIN_TIMEOUT_S, Flow, OnUnavailable, Rpc
from agentcgroup.intent import (
    INTENT_FIELDS,
    Intent,
    Quantity,
    begin_request,
    command,
    cut_name,
    intent_message,
)
from agentcgroup.keywords import RUN_KEYWORDS, popen_keywords, refuse_unknown
from agentcgroup.launch import CANNOT_EXEC, Launch
from agentcgroup.results import wait_status
from agentcgroup.telling import note
from agentcgroup.types import Grant, Report
from agentcgroup.v1 import agentcgroup_pb2 as pb

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def warn(sentence: str) -> None:
    """Issue an AgentcgWarning that points at the first caller outside this package."""
    level, frame = 2, sys._getframe(1)  # stacklevel 1 is this function
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(sentence, AgentcgWarning, stacklevel=level)


def choose_on_unavailable(value: str | None) -> OnUnavailable:
    """Return what to do when the daemon is away: `value`, else $AGENTCG_ON_UNAVAILABLE, else "run".

    Raises:
        InvalidIntent: the one that counts is neither "run" nor "refuse".
    """
    chosen = value or os.environ.get("AGENTCG_ON_UNAVAILABLE") or "run"
    for known in get_args(OnUnavailable):
        if chosen == known:
            return known  # type: ignore[no-any-return]
    raise InvalidIntent(
        f"on_unavailable is {chosen!r}, but must be 'run' or 'refuse'",
        field="on_unavailable",
        value=chosen,
        allowed="run, refuse",
    )


def reason_of_error(error: BaseException) -> pb.EndReason.ValueType:
    """Return why a call is ended that is given up because of this error."""
    if isinstance(error, subprocess.TimeoutExpired):
        return pb.END_REASON_TIMEOUT
    return pb.END_REASON_CANCELLED


class AgentSettings:
    """Settings of an agent's client.

    Attributes:
        run_dir: directory of the daemon's sockets.
        on_unavailable: what a call does when the daemon is away.
        seen: the daemon has answered this client and not been given up since.
    """

    def __init__(self, run_dir: str | None, on_unavailable: str | None) -> None:
        self.run_dir = os.path.abspath(run_dir or paths.run_dir())
        self.on_unavailable: OnUnavailable = choose_on_unavailable(on_unavailable)
        self.seen = False

    @property
    def target(self) -> str:
        """Return the gRPC target of the agent socket."""
        return f"unix:{paths.agent_socket(self.run_dir)}"

    @property
    def attach_path(self) -> str:
        """Return the path of the agents' attach socket."""
        return paths.attach_socket(self.run_dir)


class CallBase:
    """A call: not begun, open, or ended.

    Attributes:
        name: the tool's name.
        id: the call's id; empty before it is begun and where it runs without control.
        grant: what the daemon granted; None where it runs without control.
        confined: the call is begun and has a cgroup.
        sealed: a sandbox keeps this process from the daemon, so that each command that is started
            is a call of its own, which its launcher declares.
    """

    def __init__(
        self, settings: AgentSettings, name: str, intent: Intent, argv: tuple[str, ...]
    ) -> None:
        self.name = cut_name(name)
        self.id = ""
        self.grant: Grant | None = None
        self.confined = self.sealed = False
        self._settings = settings
        self._request = begin_request(self.name, intent, argv)
        self._launch: list[str] = []
        self._state = "new"
        # The message of its report, which is read when somebody asks for it.
        self._answer: pb.Report | None = None
        self._report: Report | None = None
        # Why the process that was started last did not come to its end; see `_reason_of`.
        self._reason: pb.EndReason.ValueType = pb.END_REASON_UNSPECIFIED
        self._last_launch: Launch | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} id={self.id!r} {self._state}>"

    @property
    def report(self) -> Report | None:
        """Return how the call ended; None where it ran without control or its report was lost.

        Raises:
            ReportNotReady: the call is still open.
        """
        if self._state != "ended":
            raise ReportNotReady(
                f"call {self.id or self.name} has not ended: its report can be read after the "
                "'with' block"
            )
        if self._report is None and self._answer is not None:
            self._report = Report.from_proto(self._answer)
        return self._report

    def _launcher(self) -> str:
        """Find the launcher before the call is begun: a missing one must leave nothing behind."""
        if self._state != "new":
            raise RuntimeError(f"{self!r} was begun already; each call is begun once")
        return paths.find_launcher()

    def _begin_flow(self) -> Flow[pb.Call | Unavailable]:
        settings = self._settings
        return flow.begin(self._request, settings.on_unavailable, settings.seen)

    def _begun(self, launcher: str, outcome: pb.Call | AgentcgError) -> None:
        self._state = "open"
        if isinstance(outcome, Sealed):
            self.sealed = True
            self._launch = self._declaring(launcher)
            return
        if isinstance(outcome, AgentcgError):
            self._settings.seen = False
            warn(f"{self.name} runs without resource control: {outcome}")
            return
        self._settings.seen = True
        self.confined = True
        self.id = outcome.id
        self.grant = Grant.from_proto(outcome.grant)
        self._launch = [launcher, f"--call={outcome.id}", *self._launcher_options()]

    def _launcher_options(self) -> list[str]:
        return [
            f"--socket={self._settings.attach_path}",
            f"--on-unavailable={self._settings.on_unavailable}",
            "--",
        ]

    def _early_rpc(self) -> Rpc:
        """Make the request that begins a call for one command, whose launcher is started
        meanwhile."""
        request = pb.BeginCallRequest(one_command=True)
        request.MergeFrom(self._request)
        return Rpc("BeginCall", request, BEGIN_TIMEOUT_S)

    def _launched_early(self, launcher: str, command: list[str], options: dict[str, Any]) -> Launch:
        """Prepare the start of `command` in this call, which is being begun."""
        argv = [launcher, *self._launcher_options()]
        self._last_launch = Launch(argv, command, options, piped=True, early=True)
        return self._last_launch

    def _declaring(self, launcher: str) -> list[str]:
        """Make the command line of a launcher that declares a call like this one."""
        words = [("name", self.name)]
        words += [(f.name, text) for f, text in self._request.intent.ListFields()]
        return [
            launcher,
            *(f"--{field.replace('_', '-')}={text}" for field, text in words),
            *self._launcher_options(),
        ]

    def _launched(self, command: list[str], options: dict[str, Any], piped: bool = True) -> Launch:
        """Prepare the start of `command` in this call; the arguments are those of `Launch`."""
        if self._state != "open":
            raise RuntimeError(f"{self!r} is not open; use 'with agent.tool_call(...) as call:'")
        self._reason = pb.END_REASON_UNSPECIFIED
        self._last_launch = Launch(self._launch, command, options, piped)
        return self._last_launch

    def _end_request(
        self, returncode: int | None, error: BaseException | None, signalled: bool
    ) -> pb.EndCallRequest:
        """Make the request that ends the call. `returncode`: of the process that was started last;
        None: it runs. `error`: what its block raised. `signalled`: whether the caller sent that
        process a signal."""
        if self._last_launch is not None and self._last_launch.failed:
            returncode, error = returncode or CANNOT_EXEC, None
        reason = self._reason or self._reason_of(returncode, error, signalled)
        request = pb.EndCallRequest(call_id=self.id, reason=reason)
        if returncode is not None:
            request.wait_status = wait_status(returncode)
        return request

    def _command_request(self) -> pb.EndCallRequest:
        """Make the request that ends only the command that runs in the call, which says why."""
        return pb.EndCallRequest(call_id=self.id, reason=self._reason, command_only=True)

    def _reason_of(
        self, returncode: int | None, error: BaseException | None, signalled: bool
    ) -> pb.EndReason.ValueType:
        keep = self._request.intent.leftovers == "keep"
        # A command that failed has ended all the same.
        if error is not None and not isinstance(error, subprocess.CalledProcessError):
            if returncode is None or returncode >= 0 or signalled:
                return reason_of_error(error)
            # It died of a signal that was not the caller's, so the error says nothing of that.
            return pb.END_REASON_UNSPECIFIED if keep else pb.END_REASON_DONE
        if returncode is not None or keep:
            return pb.END_REASON_DONE
        return pb.END_REASON_UNSPECIFIED

    def _ended(self, outcome: pb.Report | AgentcgError | None) -> None:
        self._state = "ended"
        if isinstance(outcome, AgentcgError):
            self._settings.seen = False
            warn(f"the report of call {self.id} ({self.name}) is lost: {outcome}")
        else:
            self._answer = outcome
            note(self)

    def _update_request(self, intent: Intent) -> pb.UpdateIntentRequest:
        if self._state != "open":
            raise RuntimeError(f"{self!r} is not open")
        return pb.UpdateIntentRequest(call_id=self.id, intent=intent_message(intent))


class RunArguments:
    """Arguments of `subprocess.run`, sorted: `argv` is the command, `popen` goes to Popen.

    Raises:
        ValueError: they contradict each other, as in subprocess.run.
        TypeError: there is no such argument.
    """

    def __init__(self, args: Any, input: Any, capture_output: bool, kwargs: dict[str, Any]) -> None:
        refuse_unknown("run", kwargs, popen_keywords(), INTENT_FIELDS)
        self.popen = dict(kwargs)
        self.argv = command(
            args, self.popen.pop("shell", False), self.popen.pop("executable", None)
        )
        if input is not None:
            if self.popen.get("stdin") is not None:
                raise ValueError("stdin and input arguments may not both be used.")
            self.popen["stdin"] = subprocess.PIPE
        if capture_output:
            if self.popen.get("stdout") is not None or self.popen.get("stderr") is not None:
                raise ValueError("stdout and stderr arguments may not be used with capture_output.")
            self.popen["stdout"] = self.popen["stderr"] = subprocess.PIPE


def split_run_arguments(
    kwargs: dict[str, Any], call_timeout: Quantity | None
) -> tuple[Intent, dict[str, Any]]:
    """Split the keywords of `Agent.run` into an intent and arguments of subprocess.run.

    `timeout` is subprocess's there; the intent's comes as `call_timeout`.

    Raises:
        TypeError: neither has a keyword of that name.
    """
    known = INTENT_FIELDS | popen_keywords() | RUN_KEYWORDS | {"name", "call_timeout"}
    refuse_unknown("run", kwargs, known)
    intent = Intent(timeout=call_timeout)
    rest = {}
    for key, value in kwargs.items():
        if key in INTENT_FIELDS and key != "timeout":
            intent[key] = value  # type: ignore[literal-required]
        else:
            rest[key] = value
    return intent, rest
