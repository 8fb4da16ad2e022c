"""Recordings: what is written is read again, and what is wrong is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcgroup_lab.trace import format as trace_format

HEADER = {
    "schema": trace_format.SCHEMA,
    "task": "a task",
    "model": "none",
    "duration_s": 0.1,
    "n_samples": 2,
    "n_tool_calls": 1,
    "peak_mb": 20.0,
    "mean_mb": 15.0,
    "sample_period_s": 0.1,
}
SAMPLES = [
    {"t": 0.0, "mem_mb": 10.0, "cpu_pct": 0.0, "cpu_cum_pct": 0.0},
    {"t": 0.1, "mem_mb": 20.0, "cpu_pct": 50.0, "cpu_cum_pct": 50.0},
]
CALL = {"tool_start": 0.02, "tool_end": 0.08, "id": "c1", "tool": "Bash", "command": "make"}


def _write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


finite = st.floats(0, 1e6, allow_nan=False)


@st.composite
def traces(draw: st.DrawFn) -> trace_format.Trace:
    gaps = draw(st.lists(st.floats(0.001, 10.0), min_size=0, max_size=20))
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    samples = tuple(
        trace_format.TraceSample(t, draw(finite), draw(finite), draw(finite)) for t in times
    )
    calls = [
        trace_format.TraceCall(
            start,
            start + draw(st.floats(0, 100)),
            draw(st.text("abcdef0123456789", min_size=1, max_size=8)),
            draw(st.text(min_size=1, max_size=20)),
            draw(st.none() | st.text(max_size=200)),
            draw(st.booleans()),
        )
        for start in sorted(draw(st.lists(st.floats(0, 100), max_size=10)))
    ]
    return trace_format.Trace("task", "model", draw(st.floats(0, 10)), samples, tuple(calls))


@settings(max_examples=60, deadline=None)
@given(recorded=traces(), suffix=st.sampled_from([".jsonl", ".jsonl.gz"]))
def test_what_is_written_is_read_again(
    recorded: trace_format.Trace, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("trace") / f"one{suffix}"
    trace_format.write(recorded, path)
    again = trace_format.read(path)
    assert again.samples == recorded.samples
    assert again.calls == recorded.calls
    assert (again.task, again.model) == (recorded.task, recorded.model)
    assert again.sample_period_s == recorded.sample_period_s
    assert list(path.parent.iterdir()) == [path]
    # Once more: what a header says beyond the totals stays.
    trace_format.write(again, path)
    assert trace_format.read(path) == again


@pytest.mark.parametrize(
    ("records", "line", "field", "allowed"),
    [
        ([], 1, "file", "header"),
        ([{**HEADER, "schema": "other/1"}], 1, "schema", trace_format.SCHEMA),
        ([{**HEADER, "peak_mb": "much"}, *SAMPLES, CALL], 1, "peak_mb", "number"),
        ([{**HEADER, "n_samples": 3}, *SAMPLES, CALL], 1, "n_samples", "2"),
        ([{**HEADER, "n_tool_calls": 0}, *SAMPLES, CALL], 1, "n_tool_calls", "1"),
        ([{**HEADER, "task": ""}, *SAMPLES, CALL], 1, "task", "text"),
        ([HEADER], 1, "line", "at least one sample"),
        ([HEADER, SAMPLES[0], {**SAMPLES[1], "mem_mb": -3}], 3, "mem_mb", ">= 0"),
        ([HEADER, SAMPLES[0], {**SAMPLES[1], "mem_mb": True}], 3, "mem_mb", "number"),
        ([HEADER, SAMPLES[0], {**SAMPLES[1], "mem_mb": float("nan")}], 3, "mem_mb", "number"),
        ([HEADER, SAMPLES[0], SAMPLES[0]], 3, "t", "previous"),
        ([HEADER, SAMPLES[0], {**SAMPLES[1], "gpu": 1}], 3, "line", "mem_mb"),
        ([HEADER, *SAMPLES, {**CALL, "tool_end": 0.01}], 4, "tool_end", "tool_start"),
        ([HEADER, *SAMPLES, {**CALL, "command": "x" * 201}], 4, "command", "200"),
        ([HEADER, *SAMPLES, {**CALL, "command": 7}], 4, "command", "null"),
        ([HEADER, *SAMPLES, {**CALL, "background": "yes"}], 4, "background", "true or false"),
        ([HEADER, SAMPLES[0], CALL, SAMPLES[1]], 4, "line", "calls only"),
        ([HEADER, [1, 2]], 2, "line", "object"),
    ],
)
def test_what_is_wrong_is_named(
    records: list[Any], line: int, field: str, allowed: str, tmp_path: Path
) -> None:
    path = _write(tmp_path / "bad.jsonl", *records)
    with pytest.raises(trace_format.TraceError) as caught:
        trace_format.read(path)
    error = caught.value
    assert (error.line, error.field) == (line, field)
    assert allowed in error.allowed
    assert f"{path}:{line}: " in str(error)


def test_a_cut_gzip_file_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    text = "".join(json.dumps(record) + "\n" for record in [HEADER, *SAMPLES, CALL])
    path.write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(trace_format.TraceError, match="allowed: whole"):
        trace_format.read(path)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "one.jsonl", HEADER, *SAMPLES, CALL)
    recorded = trace_format.read(path)
    before = path.read_bytes()

    def refuse(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        trace_format.write(recorded, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_recording_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl.gz"
    with pytest.raises(trace_format.TraceError) as caught:
        trace_format.read(path)
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory"
