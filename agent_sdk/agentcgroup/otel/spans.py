"""A span of a report: what the call was, what it was granted, how it ended, what it used.

Names follow OpenTelemetry's semantic conventions where there are some: `gen_ai.*` for the execution
of a tool, `process.*` for its process, `error.type`. Ids are made of the call's id, so that a call
that is sent twice is the same span.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Union

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from agentcgroup.text import printable
from agentcgroup.types import Feedback, Grant, Report, Verdict

TEXT_MOST = 1000
ARGUMENTS_MOST = 64
EVENTS_MOST = 64
UNIX_USEC_MOST = (1 << 63) // 1000
"""The latest moment whose nanoseconds a span can hold."""
PREFIX = "agentcgroup"

Value = Union[str, bool, int, float, "list[str]"]
Attributes = dict[str, Value]


def _version() -> str:
    try:
        return version("agentcgroup")
    except PackageNotFoundError:
        return "unknown"


SCOPE = InstrumentationScope(PREFIX, _version())


def trace_id(root_call_id: str) -> int:
    """Return the trace of a call that is in no other, and of all calls in it."""
    return _id(f"trace {root_call_id}", 16)


def span_id(call_id: str) -> int:
    """Return the span of a call."""
    return _id(f"span {call_id}", 8)


def _id(text: str, size: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big") or 1


def _context(call_id: str, root_call_id: str) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED)
    return SpanContext(trace_id(root_call_id), span_id(call_id), False, flags)


def span(
    report: Report, root_call_id: str, resource: Resource, command_lines: bool = False
) -> ReadableSpan:
    """Make the span of an ended call, from when it was asked for to when it had ended.

    root_call_id: the outermost call that it was in; its own id where it was in none. command_lines:
    with the command's arguments, which may hold secrets.
    """
    began = _moment(report.began_unix_usec)
    asked = max(0, began - report.waited_usec)
    ended = _moment(began + report.wall_usec)
    parent = report.parent_call_id
    events = [_event(each, asked, ended) for each in report.feedback[-EVENTS_MOST:]]
    if report.waited_usec:
        events.insert(0, Event("began", timestamp=began * 1000))
    is_ok = report.verdict is Verdict.OK
    return ReadableSpan(
        f"execute_tool {_text(report.name)}",
        context=_context(report.call_id, root_call_id),
        parent=_context(parent, root_call_id) if parent else None,
        resource=resource,
        attributes=attributes(report, command_lines),
        events=events,
        kind=SpanKind.INTERNAL,
        status=Status() if is_ok else Status(StatusCode.ERROR, _text(report.sentence)),
        start_time=asked * 1000,
        end_time=ended * 1000,
        instrumentation_scope=SCOPE,
    )


def _moment(unix_usec: int) -> int:
    return min(max(0, unix_usec), UNIX_USEC_MOST)


def _text(text: str) -> str:
    return printable(text[:TEXT_MOST])


def _event(each: Feedback, first: int, last: int) -> Event:
    at = min(max(each.at_unix_usec, first), last)
    numbers: Attributes = {f"{PREFIX}.{_text(k)}": v for k, v in list(each.numbers.items())[:16]}
    return Event(
        each.code.value, {f"{PREFIX}.sentence": _text(each.sentence), **numbers}, at * 1000
    )


def attributes(report: Report, command_lines: bool = False) -> Attributes:
    """Return all that is told of a call; what was not measured or not limited is left out."""
    found: dict[str, Value | None] = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": _text(report.name),
        "gen_ai.tool.call.id": _text(report.tool_use_id) or None,
        "process.exit.code": report.exit_code,
        "error.type": None if report.verdict is Verdict.OK else report.verdict.value,
        f"{PREFIX}.call.id": report.call_id,
        f"{PREFIX}.session.id": _text(report.session_id),
        f"{PREFIX}.verdict": report.verdict.value,
        f"{PREFIX}.sentence": _text(report.sentence),
        f"{PREFIX}.observed": report.observed,
        f"{PREFIX}.term_signal": report.term_signal,
        f"{PREFIX}.waited": _seconds(report.waited_usec),
        f"{PREFIX}.paused": _seconds(report.frozen_usec),
        f"{PREFIX}.cpu.time": _seconds(report.cpu_usage_usec),
        f"{PREFIX}.memory.peak": report.memory_peak_bytes,
        f"{PREFIX}.memory.oom_kills": report.oom_kills,
        f"{PREFIX}.pids.peak": report.pids_peak,
        f"{PREFIX}.disk.read": report.io_read_bytes,
        f"{PREFIX}.disk.written": report.io_write_bytes,
    }
    if report.net is not None:
        found[f"{PREFIX}.network.received"] = report.net.receive_bytes
        found[f"{PREFIX}.network.sent"] = report.net.send_bytes
    if report.gpu is not None:
        found[f"{PREFIX}.gpu.memory.peak"] = report.gpu.memory_peak_bytes
    if report.try_next is not None:
        found[f"{PREFIX}.try_next"] = [_text(step) for step in report.try_next.steps[:8]]
    if command_lines:
        found["process.command_args"] = [_text(word) for word in report.argv[:ARGUMENTS_MOST]]
    if report.grant is not None:
        found |= _granted(report.grant)
    return {name: value for name, value in found.items() if value is not None}


def _granted(grant: Grant) -> Mapping[str, Value | None]:
    """Return what the call asked for and what it was given, in bytes, cores and seconds."""
    of = f"{PREFIX}.grant"
    cores = grant.cpu_max_millicores
    return {
        f"{of}.memory.expected": grant.memory_expected_bytes,
        f"{of}.memory.high": grant.memory_high_bytes,
        f"{of}.memory.max": grant.memory_max_bytes,
        f"{of}.cpu.weight": grant.cpu_weight,
        f"{of}.cpu.max": None if cores is None else cores / 1000,
        f"{of}.pids.max": grant.pids_max,
        f"{of}.timeout": None if grant.timeout_usec is None else _seconds(grant.timeout_usec),
        f"{of}.priority": grant.priority,
        f"{of}.on_pressure": grant.on_pressure,
        f"{of}.gpu.share": None if grant.gpu_percent is None else grant.gpu_percent / 100,
        f"{of}.gpu.memory": grant.gpu_memory_bytes,
        f"{of}.advice": [_text(each) for each in grant.advice[:8]] or None,
    }


def _seconds(usec: int) -> float:
    return usec / 1e6
