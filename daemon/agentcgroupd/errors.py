"""The daemon's errors, and the one table from them to gRPC status codes.

An error that a caller sees is a `RequestError`: one plain sentence, and where a field of the
request is at fault its name, its value and what is allowed. Errors of the kernel carry errno, the
cgroup and the file.
"""

from __future__ import annotations

import errno
import os

from agentcgroup.text import printable, printable_lines

VALUE_SHOWN_CHARS = 200
"""How much of a caller's own value is repeated back to it."""


class AgentcgroupdError(Exception):
    """Base of all errors raised on purpose by the daemon."""


class ConfigError(AgentcgroupdError):
    """The configuration cannot be used; the message names the key, the value and what is
    allowed."""


class KnobError(AgentcgroupdError):
    """An interface file could not be read or written."""

    def __init__(self, error: OSError, cgroup: str, file: str, value: str | None = None) -> None:
        self.errno = error.errno or 0
        self.cgroup = cgroup
        self.file = file
        self.value = value
        name = errno.errorcode.get(self.errno, str(self.errno))
        verb = f"writing {value!r} to" if value is not None else "reading"
        cause = ""
        if self.errno == errno.EROFS:
            cause = "; the cgroup2 file system is mounted read-only here, see `agentcg doctor`"
        super().__init__(f"{verb} {cgroup}/{file}: {name} ({os.strerror(self.errno)}){cause}")


class CgroupGone(KnobError):
    """The cgroup itself no longer exists; expected in races with its removal."""


class BpfError(AgentcgroupdError):
    """A BPF object could not be opened, loaded, attached or used."""

    def __init__(self, what: str, number: int, detail: str = "") -> None:
        self.errno = number
        self.what = what
        self.detail = detail
        """The part of the verifier's or libbpf's messages that matters, or nothing."""
        name = errno.errorcode.get(number, str(number))
        text = f"{what}: {name} ({os.strerror(number)})" if number else what
        super().__init__(f"{text}\n{detail}" if detail else text)


class RequestError(AgentcgroupdError):
    """Something that a caller asked for cannot be done."""

    code = "UNKNOWN"

    def __init__(self, sentence: str, field: str = "", value: str = "", allowed: str = "") -> None:
        # It may quote what the caller sent, and is printed by others.
        sentence = printable_lines(sentence)
        super().__init__(sentence)
        self.sentence = sentence
        self.field = field
        self.value = value[:VALUE_SHOWN_CHARS]
        self.allowed = allowed


class InvalidField(RequestError, ValueError):
    """A field's value is not allowed. A ValueError too, so that pydantic collects it."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, value: str, allowed: str, why: str = "") -> None:
        # A caller may make up a name as well.
        field = printable(field[:VALUE_SHOWN_CHARS])
        shown = value if len(value) <= VALUE_SHOWN_CHARS else value[:VALUE_SHOWN_CHARS] + "..."
        reason = f" {why};" if why else ""
        sentence = f"{field}: {shown!r} cannot be used:{reason} allowed is {allowed}"
        super().__init__(sentence, field, value, allowed)


class NotFound(RequestError):
    """A session, call or report that is not there, as far as the caller may know."""

    code = "NOT_FOUND"


class AlreadyExists(RequestError):
    """A session of that name is open."""

    code = "ALREADY_EXISTS"


class PermissionDenied(RequestError):
    """The caller is not who may do this."""

    code = "PERMISSION_DENIED"


class FailedPrecondition(RequestError):
    """The thing exists but is not in a state in which this can be done."""

    code = "FAILED_PRECONDITION"


class ResourceExhausted(RequestError):
    """A limit on the number of something is reached."""

    code = "RESOURCE_EXHAUSTED"


class Unavailable(RequestError):
    """The daemon is starting or stopping, or the kernel refused for now; trying again may help."""

    code = "UNAVAILABLE"


class Internal(RequestError):
    """The daemon itself failed."""

    code = "INTERNAL"


def as_request_error(error: AgentcgroupdError) -> RequestError:
    """What a caller is told of `error`: requests' own errors as they are, others by this table."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, CgroupGone):
        return NotFound(f"its cgroup is gone: {error}")
    return Unavailable(f"the kernel refused: {error}")
