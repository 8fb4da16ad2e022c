"""What to tell a model of the calls of one tool, whoever began them: the SDK inside the tool, or
the daemon, which saw the tool start a shell."""

from __future__ import annotations

from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from agentcgroup import packets, paths
from agentcgroup.told import told

if TYPE_CHECKING:
    from typing_extensions import Self

    from agentcgroup.types import Report

TIMEOUT_S = 2.0
COMMAND_BYTES_MAX = 8192
_ended: ContextVar[list[Report] | None] = ContextVar("agentcgroup_ended", default=None)


class EndedCall(Protocol):
    """A call that has ended."""

    @property
    def report(self) -> Report | None: ...


def note(call: EndedCall) -> None:
    """Remember a call that has ended, for the tool that this context belongs to."""
    reports = _ended.get()
    if reports is not None and call.report is not None:
        reports.append(call.report)


class Telling:
    """A tool at work: `with Telling(arguments) as telling: ...`, and then `telling.text()`.

    arguments: those of the tool; its `command`, if it has one, finds calls that the daemon saw.
    """

    def __init__(self, arguments: Any = None, tool_use_id: str = "") -> None:
        self._command, self._id = command_in(arguments), tool_use_id
        self._reports: list[Report] = []
        self._token: Token[list[Report] | None] | None = None

    def __enter__(self) -> Self:
        self._token = _ended.set(self._reports)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._token is not None
        _ended.reset(self._token)

    def text(self) -> str:
        """Return what a model should know, in one line; empty: nothing. Blocks for two seconds
        at most."""
        said = list(filter(None, map(told, self._reports)))
        if not self._reports and (self._command or self._id):
            said = asked(self._command, self._id)
        return f"agentcgroup: {' '.join(said)}" if said else ""


def command_in(arguments: Any) -> str:
    """Return the command among a tool's arguments; empty: there is none."""
    if not isinstance(arguments, dict):
        return ""
    found = (arguments.get(name) for name in ("command", "cmd", "script"))
    return next((text for text in found if isinstance(text, str)), "")


def asked(command: str, tool_use_id: str = "") -> list[str]:
    """Ask the daemon what became of a tool call (verb `told`); empty: nothing to tell, or nobody
    answers."""
    words = ["ACG1", "told"]
    if tool_use_id:
        words.append(f"tool_use_id={tool_use_id[:128]}")
    if command:
        head = command.encode("utf-8", "replace")[:COMMAND_BYTES_MAX]
        words.append(f"command={head.decode('utf-8', 'ignore')}".replace("\0", ""))
    try:
        with packets.new_socket() as sock:
            sock.settimeout(TIMEOUT_S)
            sock.connect(paths.attach_socket(paths.run_dir()))
            sock.send(b"".join(word.encode() + b"\0" for word in words))
            answer = sock.recv(packets.REPLY_BYTES_MAX).split(b"\0")
            while answer[0] == b"WAIT":
                answer = sock.recv(packets.REPLY_BYTES_MAX).split(b"\0")
    except OSError:
        return []  # the tool has run all the same, and its result is what counts
    said = (word.decode("utf-8", "replace") for word in answer if answer[0] == b"OK")
    return [word.removeprefix("say=") for word in said if word.startswith("say=")]
