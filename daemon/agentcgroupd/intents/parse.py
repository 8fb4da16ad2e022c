"""What a caller asks for, checked: text in, typed values out.

The same model reads an intent from gRPC, from the attach protocol and from the older hint form, so
that a value means the same and fails with the same sentence wherever it came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.gpu import parse_device
from agentcgroupd.units import (
    parse_bytes,
    parse_cores,
    parse_count,
    parse_duration,
    parse_percent,
    parse_priority,
    parse_word,
    show_usec,
    suggestion,
)

NAME_CHARS_MAX = 128
ARGV_BYTES_MAX = 4096
ON_PRESSURE = ("freeze", "deny", "throttle", "kill")
HINT_ALLOWED = "memory:high, memory:low or memory:<size>, such as memory:2g"
WAIT_MOST_USEC = 3_600_000_000
PIDS_MOST = 4_194_304
"""PID_MAX_LIMIT, include/linux/threads.h."""


def _text(field: str) -> BeforeValidator:
    """Empty text means: not said. Anything else is read by the field's parser."""

    def convert(value: object) -> object:
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise InvalidField(field, repr(value), "text")
        return _PARSERS[field](value)

    return BeforeValidator(convert)


def _parse_hint(text: str) -> str:
    kind, _, value = text.strip().partition(":")
    if kind.lower() != "memory" or not value:
        raise InvalidField("hint", text, HINT_ALLOWED)
    if value.lower() in ("high", "low"):
        return value.lower()
    try:
        return str(parse_bytes("hint", value))
    except InvalidField:
        raise InvalidField("hint", text, HINT_ALLOWED) from None


def _parse_wait(text: str) -> int:
    """Microseconds; 0: not at all."""
    if text.strip() == "0":
        return 0
    wait = parse_duration("wait", text)
    if wait > WAIT_MOST_USEC:
        raise InvalidField("wait", text, f"0, or a time of at most {show_usec(WAIT_MOST_USEC)}")
    return wait


_PARSERS: dict[str, Callable[[str], object]] = {
    "memory": lambda text: parse_bytes("memory", text),
    "memory_max": lambda text: parse_bytes("memory_max", text),
    "cpu_weight": lambda text: parse_count("cpu_weight", text, 1, 10_000),
    "cpu_max": lambda text: parse_cores("cpu_max", text),
    "pids_max": lambda text: parse_count("pids_max", text, 1, PIDS_MOST),
    "timeout": lambda text: parse_duration("timeout", text),
    "priority": lambda text: parse_priority("priority", text),
    "wait": lambda text: _parse_wait(text),
    "on_pressure": lambda text: parse_word("on_pressure", text, ON_PRESSURE),
    "hint": _parse_hint,
    "gpu": lambda text: parse_percent("gpu", text),
    "gpu_memory": lambda text: parse_bytes("gpu_memory", text),
    "gpu_priority": lambda text: parse_priority("gpu_priority", text),
    "gpu_device": lambda text: str(parse_device("gpu_device", text)),
}


class Intent(BaseModel):
    """An intent with every text read. None: not said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory: Annotated[int | None, _text("memory")] = None
    memory_max: Annotated[int | None, _text("memory_max")] = None
    cpu_weight: Annotated[int | None, _text("cpu_weight")] = None
    cpu_max: Annotated[int | None, _text("cpu_max")] = None
    pids_max: Annotated[int | None, _text("pids_max")] = None
    timeout: Annotated[int | None, _text("timeout")] = None
    priority: Annotated[int | None, _text("priority")] = None
    on_pressure: Annotated[str | None, _text("on_pressure")] = None
    hint: Annotated[str | None, _text("hint")] = None
    wait: Annotated[int | None, _text("wait")] = None
    gpu: Annotated[int | None, _text("gpu")] = None
    gpu_memory: Annotated[int | None, _text("gpu_memory")] = None
    gpu_priority: Annotated[int | None, _text("gpu_priority")] = None
    gpu_device: Annotated[str | None, _text("gpu_device")] = None


def parse_intent(fields: Mapping[str, str]) -> Intent:
    """An Intent from text fields. Raises InvalidField for the first field that is wrong."""
    try:
        intent = Intent.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InvalidField):
            raise cause from None
        known = ", ".join(Intent.model_fields)
        raise InvalidField(field, str(first["input"]), f"one of the fields {known}",
                           suggestion(field, Intent.model_fields) or "there is no such field",
                           ) from None  # fmt: skip
    if intent.memory and intent.memory_max and intent.memory > intent.memory_max:
        raise InvalidField("memory", fields["memory"],
                           f"at most memory_max, which is {fields['memory_max']!r}",
                           "it is above memory_max")  # fmt: skip
    return intent


_NAME = re.compile(r"[^\x00-\x1f\x7f]+")


def check_name(name: str) -> str:
    """A call's name: 1 to 128 printable characters. Raises InvalidField."""
    text = name.encode("utf-8", "replace").decode()  # a lone surrogate cannot be sent or stored
    if not 1 <= len(name) <= NAME_CHARS_MAX or not _NAME.fullmatch(name) or text != name:
        raise InvalidField("name", name, f"1 to {NAME_CHARS_MAX} characters, none of them control")
    return name


def cut_argv(argv: list[str]) -> tuple[str, ...]:
    """The first 4,096 bytes of a command line; a cut argument ends in an ellipsis."""
    kept: list[str] = []
    left = ARGV_BYTES_MAX
    for argument in argv:
        raw = argument.encode("utf-8", "replace")
        if len(raw) > left:
            kept.append(raw[:left].decode("utf-8", "ignore") + "…")
            break
        kept.append(argument)
        left -= len(raw) + 1
        if left <= 0:
            break
    return tuple(kept)
