"""Recording: one clock for samples and calls, deadlines that do not drift, every way to end."""

from __future__ import annotations

import errno
import threading

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup_lab.trace.record import CallLog, Raw, SeenCall, sample_until, to_trace
from agentcgroupd.errors import CgroupGone

UNIX = 1_700_000_000.0


def usec(seconds: float) -> int:
    return round((UNIX + seconds) * 1e6)


def test_samples_and_calls_are_on_one_clock() -> None:
    raw = [
        Raw(50.0, 100_000_000, 0),
        Raw(50.1, 150_000_000, 50_000),
        Raw(50.3, 120_000_000, 60_000),
    ]
    calls = [
        SeenCall("early", "git", (), usec(-9.0), usec(-8.0)),
        SeenCall("a", "pytest", ("pytest", "-k", "a b"), usec(-1.0), usec(0.15)),
        SeenCall("b", "gcc", ("x" * 500,), usec(0.2), None),
    ]
    trace = to_trace("s", raw, calls, 0.1, 7, UNIX)
    assert [sample.t_s for sample in trace.samples] == [0.0, 0.1, 0.3]
    assert [sample.mem_mb for sample in trace.samples] == [100.0, 150.0, 120.0]
    assert [sample.cpu_pct for sample in trace.samples] == pytest.approx([0.0, 50.0, 5.0])
    assert trace.samples[-1].cpu_cum_pct == pytest.approx(20.0)
    first, second = trace.calls
    assert (first.start_s, first.end_s, first.command) == (0.0, 0.15, "pytest -k 'a b'")
    assert (second.start_s, second.end_s) == (0.2, 0.3)
    assert len(second.command or "") == 200
    assert trace.extra["missed_samples"] == 7
    assert trace.extra["calls_open_at_end"] == 1


def test_missed_deadlines_are_counted_and_do_not_shift_the_others() -> None:
    stopped = threading.Event()
    reads = 0

    def read() -> tuple[int, int]:
        nonlocal reads
        reads += 1
        if reads == 3:
            threading.Event().wait(0.055)  # as a machine that is out of breath
        if reads == 8:
            stopped.set()
        return reads, reads

    samples, missed = sample_until(read, 0.02, None, stopped, threading.Event())
    assert len(samples) == 8
    assert missed >= 2
    periods = [(sample.at - samples[0].at) / 0.02 for sample in samples[3:]]
    # Late by scheduling, never by drift: each lies just after a whole number of periods.
    assert all(0.0 <= period % 1.0 < 0.9 or period % 1.0 > 0.999 for period in periods)


def test_it_says_that_it_has_begun_when_the_first_sample_is_taken() -> None:
    """Whoever waits for that word finds a sample from before what it does next."""
    stopped, said = threading.Event(), list[int]()
    reads = 0

    def read() -> tuple[int, int]:
        nonlocal reads
        reads += 1
        if reads == 3:
            stopped.set()
        return reads, reads

    samples, _ = sample_until(
        read, 0.001, None, stopped, threading.Event(), lambda: said.append(reads)
    )
    assert len(samples) == 3 and said == [1]


@pytest.mark.parametrize("end", ["gone", "closed", "duration"])
def test_it_ends_with_what_it_has(end: str) -> None:
    closed = threading.Event()
    reads = 0

    def read() -> tuple[int, int]:
        nonlocal reads
        reads += 1
        if end == "gone" and reads == 4:
            raise CgroupGone(OSError(errno.ENODEV, ""), "/pool/s", "memory.current")
        if end == "closed" and reads == 3:
            closed.set()
        return reads, reads

    duration_s = 0.011 if end == "duration" else None
    samples, _ = sample_until(read, 0.005, duration_s, threading.Event(), closed)
    assert 1 <= len(samples) <= 3


def test_a_calls_end_told_before_its_listing_stays() -> None:
    log = CallLog("s")
    report = pb.Report(call_id="c", session_id="s", name="git", began_unix_usec=10, wall_usec=5)
    log.event(pb.Event(ended=report))
    log.begun(pb.Call(id="c", session_id="s", name="git", began_unix_usec=10))
    log.event(pb.Event(begun=pb.Call(id="x", session_id="other", name="git")))
    log.event(pb.Event(session_closed=pb.Session(id="other")))
    assert [(call.id, call.ended_unix_usec) for call in log.calls()] == [("c", 15)]
    assert not log.closed.is_set()
    log.event(pb.Event(session_closed=pb.Session(id="s")))
    assert log.closed.is_set()
