"""Verdicts from evidence."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.verdict import EndFacts, judge, report_of
from agentcgroupd.intents.grant import Grant

MIB = 1 << 20
GRANT = Grant(
    memory_expected_bytes=0,
    memory_high_bytes=None,
    memory_max_bytes=512 * MIB,
    cpu_weight=100,
    cpu_max_millicores=500,
    pids_max=50,
    timeout_usec=60_000_000,
    priority=50,
    on_pressure="freeze",
)
KILLED = int(signal.SIGKILL)


def facts(**changes: Any) -> EndFacts:
    """Facts of a call that ended well, with changes."""
    base: dict[str, Any] = {
        "grant": GRANT,
        "wall_usec": 1_000_000,
        "ever_entered": True,
        "wait_status": 0,
        "evidence": pb.EVIDENCE_KERNEL,
        "oom_kills": 0,
        "memory_peak_bytes": 100 * MIB,
        "session_max_bytes": 1024 * MIB,
        "pool_max_bytes": 4096 * MIB,
    }
    return EndFacts(**{**base, **changes})


def killed(**changes: Any) -> dict[str, Any]:
    """Changes for a call whose main process died of SIGKILL."""
    return {"wait_status": KILLED, **changes}


def test_pauses_that_came_late_are_told_beside_the_time_paused() -> None:
    for late, numbers in ((0, {"frozen_usec"}), (2, {"frozen_usec", "late_pauses"})):
        report = report_of(facts(frozen_usec=500_000, late_pauses=late))
        (told,) = report.feedback
        assert told.code == pb.FEEDBACK_CODE_FROZEN and set(told.numbers) == numbers


OOM_AT_CALL = {"oom_kills": 1, "call_ooms": 1}
BY_AGENT = {"ended_by": "cancelled", "ended_why": "its agent ended the call"}
BY_POLICY = {"ended_by": "stopped", "ended_why": "Stopped: x"}


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, pb.VERDICT_OK, "well"),
        ({"wait_status": 3 << 8}, pb.VERDICT_FAILED, "exit status 3"),
        ({"wait_status": 137 << 8}, pb.VERDICT_FAILED, "counts no OOM kill"),
        (killed(), pb.VERDICT_SIGNALED, "counts no OOM kill"),
        (killed(oom_kills=None), pb.VERDICT_SIGNALED, "cannot be seen"),
        ({"wait_status": int(signal.SIGSEGV)}, pb.VERDICT_SIGNALED, "SIGSEGV"),
        (killed(**OOM_AT_CALL), pb.VERDICT_OOM_CALL, "512 MiB"),
        (killed(oom_kills=2, session_ooms=1), pb.VERDICT_OOM_SESSION, "1 GiB"),
        (killed(oom_kills=1, pool_ooms=1), pb.VERDICT_OOM_POOL, "4 GiB"),
        (killed(oom_kills=1), pb.VERDICT_OOM_HOST, "host"),
        # A shell that hides its child's end cannot hide the kernel's count.
        ({"wait_status": 0, **OOM_AT_CALL}, pb.VERDICT_OOM_CALL, "limit"),
        ({"wait_status": 15, "ended_by": "timeout"}, pb.VERDICT_TIMEOUT, "1 min"),
        (killed(**BY_AGENT), pb.VERDICT_CANCELLED, "its agent"),
        (killed(**BY_POLICY), pb.VERDICT_STOPPED, "Stopped: x"),
        ({"ever_entered": False, "wait_status": None}, pb.VERDICT_ABANDONED, "agentcg-exec"),
        ({"wait_status": None}, pb.VERDICT_UNKNOWN, "not known"),
        ({"wait_status": None, "ended_by": "removed"}, pb.VERDICT_UNKNOWN, "someone else"),
        (killed(**OOM_AT_CALL, ended_by="timeout"), pb.VERDICT_OOM_CALL, "limit"),
    ],
)
def test_verdicts(changes: dict[str, Any], verdict: pb.Verdict.ValueType, words: str) -> None:
    found, sentence = judge(facts(**changes))
    assert pb.Verdict.Name(found) == pb.Verdict.Name(verdict)
    assert words in sentence


CPU_THROTTLED = {"cpu": {"throttled_usec": 600_000}}
MEMORY_THROTTLED = {"memory_high_events": 3, "memory_throttled_usec": 400_000}
OOM_NUMBERS = {"memory_max_bytes": 512 * MIB, "oom_kills": 1}


@pytest.mark.parametrize(
    ("changes", "code", "numbers"),
    [
        (killed(**OOM_AT_CALL), pb.FEEDBACK_CODE_OOM, OOM_NUMBERS),
        (killed(), pb.FEEDBACK_CODE_KILLED, {"oom_kills": 0}),
        ({"pids_max_events": 7}, pb.FEEDBACK_CODE_PIDS_LIMIT, {"pids_max": 50, "refused": 7}),
        (CPU_THROTTLED, pb.FEEDBACK_CODE_CPU_THROTTLED, {"throttled_usec": 600_000}),
        (MEMORY_THROTTLED, pb.FEEDBACK_CODE_MEMORY_THROTTLED, {"stalled_usec": 400_000}),
        ({"frozen_usec": 2_000_000}, pb.FEEDBACK_CODE_FROZEN, {"frozen_usec": 2_000_000}),
        ({"leftovers": 2}, pb.FEEDBACK_CODE_LEFTOVERS, {"processes": 2}),
    ],
)
def test_feedback(
    changes: dict[str, Any], code: pb.FeedbackCode.ValueType, numbers: dict[str, float]
) -> None:
    report = report_of(facts(**changes))
    assert [f.code for f in report.feedback] == [code]
    assert numbers.items() <= dict(report.feedback[0].numbers).items()
    assert report.feedback[0].sentence.endswith((".", "kill."))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"wait_status": 1 << 8},
        {"cpu": {"throttled_usec": 50_000}},
        {"memory_high_events": 1, "memory_throttled_usec": 10},
        {"frozen_usec": 99_000},
    ],
)
def test_a_plain_end_is_not_talked_about(changes: dict[str, Any]) -> None:
    assert not report_of(facts(**changes)).feedback


def test_an_overstated_intent_is_told() -> None:
    report = report_of(facts(grant=replace(GRANT, memory_expected_bytes=4096 * MIB)))
    assert [f.code for f in report.feedback] == [pb.FEEDBACK_CODE_OVERSTATED]
    assert "4 GiB" in report.feedback[0].sentence and "100 MiB" in report.feedback[0].sentence


def test_what_is_not_known_is_absent_not_zero() -> None:
    report = report_of(facts(memory_peak_bytes=None, oom_kills=None, wait_status=None))
    present = {field.name for field, _ in report.ListFields()}
    status = {"exit_code", "term_signal"}
    counters = {"memory_peak_bytes", "oom_kills", "io_read_bytes", "pids_peak"}
    assert not present & (status | counters | {"cpu_throttled_usec", "memory_high_events"})


statuses = st.none() | st.integers(0, 255).map(lambda c: c << 8) | st.integers(1, 64)


reasons = st.sampled_from(["", "timeout", "cancelled", "stopped", "removed"])
ooms = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1))


@given(statuses, st.none() | st.integers(0, 3), ooms, st.booleans(), reasons)
def test_out_of_memory_is_said_exactly_when_the_kernel_counted_it(
    status: int | None, oom: int | None, ooms: tuple[int, int, int], entered: bool, by: str
) -> None:
    call, session, pool = ooms
    counts = {"oom_kills": oom, "call_ooms": call, "session_ooms": session, "pool_ooms": pool}
    ended = {"ever_entered": entered, "ended_by": by, "ended_why": "why"}
    verdict, sentence = judge(facts(wait_status=status, **counts, **ended))
    said = pb.Verdict.Name(verdict).startswith("VERDICT_OOM")
    assert said == bool(entered and oom)
    assert sentence
