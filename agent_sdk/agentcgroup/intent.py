"""Requests of the protocol, made of Python values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from agentcgroup.errors import InvalidIntent
from agentcgroup.meant import meant
from agentcgroup.text import printable
from agentcgroup.v1 import agentcgroup_pb2 as pb

Quantity = str | int | float
"""Text as the protocol has it ("512M", "1.5", "30s"), or a number in the plain unit."""

Limit = Quantity | Mapping[str, str] | None
"""A field of a session: a quantity, or its labels."""

ARGV_MAX_BYTES = 4096
NAME_MAX_CHARS = 128


class Intent(TypedDict, total=False):
    """The wishes for a call; for a field that is left out (or None) the session's default holds.

    memory, memory_max: bytes, or text such as "512M". cpu_weight: 1..10000. cpu_max: cores, or text
    such as "250m". pids_max: processes and threads. timeout: seconds, or text such as "10m".
    priority: 0..100, or "batch", "normal", "important". on_pressure: "freeze", "deny", "throttle"
    or "kill". hint: the older form, "memory:high", "memory:2g". wait: seconds, or text such as
    "30s": how long it may wait for room before it is refused; 0: not at all. cpuset: CPUs, such as
    "0-3,8". leftovers: "end" (the default) or "keep" what the command leaves running. gpu: percent
    of each device, or text such as "10%"; gpu_memory: bytes on each device. gpu_priority: as
    priority. gpu_device: "any", "any:2", an index, a UUID, or several with commas. io_read_max,
    io_write_max: bytes a second of each block device, or text such as "10M". io_weight: 1..10000.
    disk_max: bytes that it may write to disks in all, or text such as "10G".
    net_send_max: bytes a second that its sockets may send, or text such as "10M".
    """

    memory: Quantity | None
    memory_max: Quantity | None
    cpu_weight: Quantity | None
    cpu_max: Quantity | None
    pids_max: Quantity | None
    timeout: Quantity | None
    priority: Quantity | None
    on_pressure: str | None
    hint: str | None
    wait: Quantity | None
    cpuset: str | None
    leftovers: str | None
    gpu: Quantity | None
    gpu_memory: Quantity | None
    gpu_priority: Quantity | None
    gpu_device: Quantity | None
    io_read_max: Quantity | None
    io_write_max: Quantity | None
    io_weight: Quantity | None
    disk_max: Quantity | None
    net_send_max: Quantity | None


INTENT_FIELDS = frozenset(Intent.__annotations__)


def to_text(field: str, value: object) -> str:
    """Return the protocol's text for a Python value; the daemon alone judges what it means.

    Raises:
        InvalidIntent: it is neither text nor a number (a bool is neither).
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidIntent(
            f"{field} is {value!r}, but must be text or a number",
            field=field,
            value=repr(value)[:200],
            allowed="str, int, float",
        )
    if isinstance(value, int):
        return str(value)
    # The daemon takes plain decimal numbers only, not 1e-05 or 1e+16. NaN and inf stay words.
    text = repr(value)
    return f"{value:.9f}".rstrip("0").rstrip(".") if "e" in text else text.removesuffix(".0")


def intent_message(intent: Intent) -> pb.Intent:
    """Make the message Intent; fields that are absent or None stay empty."""
    message = pb.Intent()
    for field, value in intent.items():
        if field not in INTENT_FIELDS:
            raise TypeError(f"unknown field of an intent: {field!r}{meant(field, INTENT_FIELDS)}")
        if value is not None:
            setattr(message, field, to_text(field, value))
    return message


def spec_message(session_id: str, limits: dict[str, Any]) -> pb.SessionSpec:
    """Make the message SessionSpec from its fields; those that are None stay empty."""
    spec = pb.SessionSpec(id=session_id)
    for field, value in limits.items():
        known = [*pb.SessionSpec.DESCRIPTOR.fields_by_name]
        if field not in known:
            raise TypeError(f"unknown limit of a session: {field!r}{meant(field, known)}")
        if field == "labels":
            spec.labels.update(_labels(value or {}))
        elif value is not None:
            setattr(spec, field, to_text(field, value))
    return spec


def _labels(value: object) -> dict[str, str]:
    """Return labels as the protocol has them; the daemon alone judges which may be. Raises
    InvalidIntent: they are no texts by texts."""
    allowed = "a mapping of str to str"
    if not isinstance(value, Mapping):
        sentence = f"labels is {value!r}, but must be {allowed}"
        raise InvalidIntent(sentence, field="labels", value=repr(value)[:200], allowed=allowed)
    for each in (*value, *value.values()):
        if not isinstance(each, str):
            sentence = f"labels: {each!r} is no text, and labels must be {allowed}"
            raise InvalidIntent(sentence, field="labels", value=repr(each)[:200], allowed=allowed)
    return dict(value)


def begin_request(name: str, intent: Intent, argv: Iterable[str] = ()) -> pb.BeginCallRequest:
    """Make the message BeginCallRequest; `argv` is cut to what the daemon keeps of it."""
    request = pb.BeginCallRequest(name=name, argv=cut_argv(argv))
    if intent:
        request.intent.CopyFrom(intent_message(intent))
    return request


def cut_argv(argv: Iterable[str]) -> list[str]:
    """Return arguments as valid UTF-8 text, cut to 4,096 bytes altogether."""
    cut: list[str] = []
    left = ARGV_MAX_BYTES
    for argument in argv:
        if left <= 0:
            break
        text = os.fsencode(argument)[:left].decode("utf-8", "replace")
        raw = text.encode()[:left]
        left -= len(raw)
        cut.append(raw.decode("utf-8", "ignore"))
    return cut


def command(args: object, shell: bool = False, executable: object = None) -> list[str]:
    """Return the argument vector for `args` as subprocess understands it.

    With `shell`, text goes to /bin/sh, or to `executable`. Without, `executable` is an error,
    because the launcher runs argv[0].

    Raises:
        ValueError: the command is empty, or `executable` comes without `shell`.
    """
    if isinstance(args, (str, bytes, os.PathLike)):
        argv = [os.fsdecode(args)]
    elif isinstance(args, Sequence):
        argv = [os.fsdecode(argument) for argument in args]
    else:
        argv = [os.fsdecode(argument) for argument in args]  # type: ignore[attr-defined]
    if not argv:
        raise ValueError("the command is empty")
    if shell:
        return [os.fsdecode(executable) if executable else "/bin/sh", "-c", *argv]  # type: ignore[arg-type]
    if executable is not None:
        raise ValueError("executable= works only with shell=True; put the program into args[0]")
    return argv


def name_of(argv: Sequence[str]) -> str:
    """Return the name of a call that was given none: the program's file name, made printable."""
    return printable(cut_name(os.path.basename(argv[0]) or argv[0])) or "tool"


def cut_name(name: str) -> str:
    """Return a name as the daemon takes it: valid text, at most 128 characters."""
    return os.fsencode(name).decode("utf-8", "replace")[:NAME_MAX_CHARS]
