"""Recordings of agent runs: the schema `agent-os-trace/1`, read strictly and written atomically.

A recording is JSON lines, gzipped where the name ends in `.gz`:
1. a header: `schema`, what was recorded, totals, the sample period and the units;
2. samples `{"t", "mem_mb", "cpu_pct", "cpu_cum_pct"}`: seconds since the first sample; 1e6 bytes
   held by the whole session; percent of one core since the previous sample; the same since the
   start;
3. calls `{"tool_start", "tool_end", "id", "tool", "command"}` and `"background": true` where so
   started: seconds on the same clock; the first 200 characters of the command, or null.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

SCHEMA = "agent-os-trace/1"
COMMAND_CHARS = 200
MEGABYTE_BYTES = 1_000_000
UNITS: Mapping[str, str] = MappingProxyType(
    {
        "mem_mb": "1e6 bytes, memory.current of the session's cgroup",
        "cpu_pct": "100 = one core, averaged since the previous sample; from cpu.stat",
        "cpu_cum_pct": "the same averaged since the first sample",
        "t": "seconds from first sample",
    }
)
_HEADER_TEXTS = ("task", "model")
_HEADER_NUMBERS = ("duration_s", "peak_mb", "mean_mb", "sample_period_s")
_SAMPLE_KEYS = ("t", "mem_mb", "cpu_pct", "cpu_cum_pct")
_CALL_KEYS = ("tool_start", "tool_end", "id", "tool", "command")
_LINE_BYTES_MAX = 1 << 20


class TraceError(ValueError):
    """A recording that is not of the schema: which file, line and field, and what is allowed."""

    def __init__(self, file: str, line: int, name: str, value: object, allowed: str) -> None:
        shown = json.dumps(value, default=str)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{file}:{line}: {name} is {shown}; allowed: {allowed}")
        self.file, self.line, self.field, self.value, self.allowed = (
            file,
            line,
            name,
            value,
            allowed,
        )


class UnreadableTrace(TraceError):
    """A recording that cannot be read at all."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(file, 0, "file", why, "a file that can be read")
        self.args = (f"{file}: cannot be read: {why}",)


@dataclass(frozen=True, slots=True)
class TraceSample:
    """Memory and CPU of the session at a moment."""

    t_s: float
    mem_mb: float
    cpu_pct: float
    cpu_cum_pct: float


@dataclass(frozen=True, slots=True)
class TraceCall:
    """A tool call of the recording."""

    start_s: float
    end_s: float
    id: str
    tool: str
    command: str | None
    background: bool = False


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole recording. `extra` holds header fields beyond those that every recording has."""

    task: str
    model: str
    sample_period_s: float
    samples: tuple[TraceSample, ...]
    calls: tuple[TraceCall, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """Seconds from the first sample to the last."""
        return self.samples[-1].t_s

    @property
    def peak_mb(self) -> float:
        """The highest sample."""
        return max(sample.mem_mb for sample in self.samples)

    @property
    def peak_bytes(self) -> float:
        """The highest sample, in bytes."""
        return self.peak_mb * MEGABYTE_BYTES

    @property
    def mean_mb(self) -> float:
        """The mean of the samples."""
        return sum(sample.mem_mb for sample in self.samples) / len(self.samples)


class _Line:
    """A parsed line and the checks on its fields."""

    def __init__(self, file: str, number: int, text: str) -> None:
        self.file, self.number = file, number
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise self.error("line", text, "one JSON object") from None
        if not isinstance(value, dict):
            raise self.error("line", value, "one JSON object")
        self.values: dict[str, Any] = value

    def error(self, name: str, value: object, allowed: str) -> TraceError:
        return TraceError(self.file, self.number, name, value, allowed)

    def only(self, *names: str) -> None:
        for name in self.values:
            if name not in names:
                raise self.error("line", name, "the fields " + ", ".join(names))

    def number_of(self, name: str, minimum: float = 0.0, minimum_name: str = "") -> float:
        value = self.values.get(name)
        allowed = f"a number >= {minimum_name or f'{minimum:g}'}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, value, allowed)
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond what a float can be
            number = math.inf
        if not math.isfinite(number) or number < minimum:
            raise self.error(name, str(value)[:40], allowed)
        return number

    def count_of(self, name: str, actual: int) -> None:
        if self.values.get(name) != actual:
            raise self.error(name, self.values.get(name), f"{actual}, the number of such lines")

    def text_of(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not value:
            raise self.error(name, value, "a text that is not empty")
        return value


def _lines(path: Path) -> Iterator[_Line]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            while text := stream.readline(_LINE_BYTES_MAX):
                number += 1
                if text.strip():
                    yield _Line(str(path), number, text)
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(str(path), number + 1, "file", str(error), "whole UTF-8 text") from error
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UnreadableTrace(str(path), why) from error


def _sample(line: _Line, after_s: float) -> TraceSample:
    line.only(*_SAMPLE_KEYS)
    sample = TraceSample(*(line.number_of(name) for name in _SAMPLE_KEYS))
    if sample.t_s <= after_s:
        raise line.error("t", sample.t_s, f"more than the previous sample's, {after_s:g}")
    return sample


def _call(line: _Line) -> TraceCall:
    line.only(*_CALL_KEYS, "background")
    start_s = line.number_of("tool_start")
    command = line.values.get("command")
    if command is not None and (not isinstance(command, str) or len(command) > COMMAND_CHARS):
        raise line.error("command", command, f"null, or a text of <= {COMMAND_CHARS} characters")
    background = line.values.get("background", False)
    if not isinstance(background, bool):
        raise line.error("background", background, "true or false")
    return TraceCall(
        start_s=start_s,
        end_s=line.number_of("tool_end", start_s, "tool_start"),
        id=line.text_of("id"),
        tool=line.text_of("tool"),
        command=command,
        background=background,
    )


def read(path: str | os.PathLike[str]) -> Trace:
    """Read one recording. Raises TraceError where it cannot be read or is not of the schema."""
    lines = _lines(Path(path))
    header = next(lines, None)
    if header is None:
        raise TraceError(str(path), 1, "file", "", f'a header of schema "{SCHEMA}"')
    if header.values.get("schema") != SCHEMA:
        raise header.error("schema", header.values.get("schema"), f'"{SCHEMA}"')
    for name in _HEADER_NUMBERS:
        header.number_of(name)
    samples: list[TraceSample] = []
    calls: list[TraceCall] = []
    last: _Line = header
    for last in lines:
        if "tool_start" in last.values:
            calls.append(_call(last))
        elif calls:
            raise last.error("line", "a sample", "calls only, once the first call has come")
        else:
            samples.append(_sample(last, samples[-1].t_s if samples else -1.0))
    if not samples:
        raise last.error("line", "the end of the file", "at least one sample")
    header.count_of("n_samples", len(samples))
    header.count_of("n_tool_calls", len(calls))
    known = {"schema", *_HEADER_TEXTS, *_HEADER_NUMBERS}
    return Trace(
        task=header.text_of("task"),
        model=header.text_of("model"),
        sample_period_s=header.number_of("sample_period_s"),
        samples=tuple(samples),
        calls=tuple(sorted(calls, key=lambda call: call.start_s)),
        extra={name: value for name, value in header.values.items() if name not in known},
    )


def _records(trace: Trace) -> Iterator[dict[str, Any]]:
    peak_mb, mean_mb = trace.peak_mb, trace.mean_mb
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "task": trace.task,
        "model": trace.model,
        "duration_s": round(trace.duration_s, 3),
        "peak_mb": round(peak_mb, 3),
        "mean_mb": round(mean_mb, 3),
        "sample_period_s": trace.sample_period_s,
        "peak_to_mean": round(peak_mb / mean_mb, 3) if mean_mb else 0.0,
        "cpu_mean_pct": trace.samples[-1].cpu_cum_pct,
        "units": dict(UNITS),
    }
    counts = {"n_samples": len(trace.samples), "n_tool_calls": len(trace.calls)}
    # A recording that was read keeps what its own header said beyond the totals.
    yield {**header, **trace.extra, **counts}
    for sample in trace.samples:
        values = (sample.t_s, sample.mem_mb, sample.cpu_pct, sample.cpu_cum_pct)
        yield dict(zip(_SAMPLE_KEYS, values, strict=True))
    for call in trace.calls:
        fields = (call.start_s, call.end_s, call.id, call.tool, call.command)
        record: dict[str, Any] = dict(zip(_CALL_KEYS, fields, strict=True))
        if call.background:
            record["background"] = True
        yield record


def write(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a recording; the file appears whole or not at all. Raises OSError."""
    target = Path(path)
    text = "".join(
        json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
        for record in _records(trace)
    )
    data = text.encode()
    if target.suffix == ".gz":
        # No time stamp, so that the same recording is the same file.
        data = gzip.compress(data, mtime=0)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
