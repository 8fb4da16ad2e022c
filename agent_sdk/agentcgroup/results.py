"""Finished and running processes of a call, in the shape that subprocess gives them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any, Protocol

from agentcgroup.pipes import Conversation, PopenAny
from agentcgroup.types import Feedback, Report

if TYPE_CHECKING:
    Completed = subprocess.CompletedProcess[Any]
else:
    Completed = subprocess.CompletedProcess


class OpenCall(Protocol):
    """The part of a call that a result reads."""

    @property
    def id(self) -> str: ...

    @property
    def report(self) -> Report | None: ...


class Result(Completed):
    """A `subprocess.CompletedProcess` that knows its call.

    args, returncode, stdout, stderr and check_returncode() are those of subprocess.
    """

    def __init__(
        self, call: OpenCall, args: Any, returncode: int, stdout: Any = None, stderr: Any = None
    ) -> None:
        super().__init__(args, returncode, stdout, stderr)
        self._call = call

    @property
    def call_id(self) -> str:
        """Return the call's id; empty where the tool ran without control."""
        return self._call.id

    @property
    def report(self) -> Report | None:
        """Return how the call ended; None where it ran without control or its report was lost.

        Raises:
            ReportNotReady: the call is still open.
        """
        return self._call.report

    @property
    def feedback(self) -> tuple[Feedback, ...]:
        """Return what the daemon had to say about the call; empty where there is no report."""
        report = self._call.report
        return report.feedback if report is not None else ()

    @property
    def told(self) -> str:
        """Return what a model should know of the call, and what to try next, in one line; empty
        where it went as it should."""
        from agentcgroup.told import told

        return told(self._call.report)

    def check_returncode(self) -> None:
        """Raise CheckFailed (a subprocess.CalledProcessError) if the exit status is not 0."""
        if self.returncode:
            raise CheckFailed(self)


class CheckFailed(subprocess.CalledProcessError):
    """The tool's exit status was not 0 and `check` was asked for; `result` has the report."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.returncode, result.args, result.stdout, result.stderr)
        self.result = result


class CallPopen(PopenAny):
    """A `subprocess.Popen` of a process in a call; `args` is the tool's command line."""

    _conversation: Conversation | None = None
    signalled = False
    """Whether it was sent a signal through this object."""

    def __init__(self, argv: list[str], args: Any, **kwargs: Any) -> None:
        super().__init__(argv, **kwargs)
        self.args = args

    def send_signal(self, sig: int) -> None:
        """Do what `Popen.send_signal` does, and remember it if the process had not ended."""
        self.signalled = self.signalled or self.poll() is None
        super().send_signal(sig)

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        """Do what `Popen.communicate` does, without waiting for children that hold the pipes.

        Returns at most LINGER_S after the process has ended, with all that it wrote.
        """
        if self._conversation is None:
            self._conversation = Conversation(self, input)
        elif input:
            raise ValueError("Cannot send input after starting communication")
        return self._conversation.hold(timeout)


def wait_status(returncode: int) -> int:
    """Return the waitpid(2) status for subprocess's return code (negative: a signal)."""
    return -returncode if returncode < 0 else returncode << 8
