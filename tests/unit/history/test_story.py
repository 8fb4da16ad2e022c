"""The story of a call: everything in its place, in words with numbers."""

from __future__ import annotations

from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.history.read import Happened
from agentcgroupd.history.story import STEPS_MOST, story
from agentcgroupd.intents.parse import parse_intent, said_in

AT = 1_700_000_000_000_000
MIB = 1 << 20


def entry(after_usec: int, event: str, of_session: bool = False, **fields: Any) -> Happened:
    return Happened(AT + after_usec, event, fields, of_session)


def ended(**fields: Any) -> pb.Report:
    """A call that waited for 3 s, ran for 5 s and was ended at its timeout."""
    return pb.Report(
        call_id="c1",
        session_id="alpha",
        name="pytest",
        began_unix_usec=AT,
        waited_usec=3_000_000,
        wall_usec=5_000_000,
        cpu_usage_usec=1_500_000,
        verdict=pb.VERDICT_TIMEOUT,
        sentence="The call was ended at its timeout of 5 s.",
        grant=pb.Grant(
            memory_max_bytes=2048 * MIB,
            memory_expected_bytes=512 * MIB,
            timeout_usec=5_000_000,
            cpu_max_millicores=1500,
            priority=50,
            advice=["memory_max: 2 GiB instead of 4 GiB, which is the session's limit."],
            not_enforced=["cpu.max"],
        ),
        **fields,
    )


def told(report: pb.Report | None, *entries: Happened) -> pb.Story:
    return story("c1", "alpha", None, report, entries)


def test_what_the_operator_did_is_told_once() -> None:
    why = "The operator paused it: lunch"
    found = told(ended(), entry(1_000_000, "hold", why=why), entry(2_000_000, "hold"))
    holds = [step.sentence for step in found.steps if step.what == "hold"]
    assert holds == [why, "The operator paused it."]


def test_a_story_never_goes_back_in_time() -> None:
    report = ended()
    end_usec = report.began_unix_usec + report.wall_usec
    report.facts.add(what="it was reaped", source="wait", at_unix_usec=end_usec + 90_000)
    found = told(report, entry(report.wall_usec + 200_000, "freeze", why="It was late."))
    assert [(step.at_unix_usec - end_usec, step.what) for step in found.steps][-3:] == [
        (0, "fact"),
        (200_000, "freeze"),
        (200_000, "ended"),
    ]


def test_a_story_goes_from_the_intent_to_the_end() -> None:
    intent = parse_intent({"memory": "512M", "memory_max": "4G", "timeout": "5", "cpu_max": "1.5"})
    report = ended(memory_peak_bytes=700 * MIB, frozen_usec=400_000)
    report.facts.add(what="its timeout passed", source="timer", at_unix_usec=AT + 4_990_000)
    report.facts.add(what="it had left its cgroup", source="/proc", at_unix_usec=0)
    report.feedback.add(code=pb.FEEDBACK_CODE_TIMEOUT, sentence=report.sentence)
    report.feedback.add(code=pb.FEEDBACK_CODE_LEFTOVERS, sentence="2 processes were ended.")
    found = told(
        report,
        entry(1_400_000, "thaw", why="There is room."),
        entry(1_000_000, "freeze", why="The pool has 12 MiB left."),
        entry(-2_999_000, "call_waiting", position=2, expected_bytes=512 * MIB, name="pytest"),
        entry(20, "call_begun", name="pytest", intent=said_in(intent), observed=False),
        entry(30, "call_started", waited_usec=3_000_000),
        entry(2_000_000, "slow", of_session=True, why="It stalls."),
        entry(2_500_000, "oom_victim", pid=12, comm="cc1"),
    )
    assert [(step.at_unix_usec - AT, step.what) for step in found.steps] == [
        (-3_000_000, "asked"),
        (-2_999_000, "call_waiting"),
        (0, "call_started"),
        (0, "granted"),
        (1_000_000, "freeze"),
        (1_400_000, "thaw"),
        (2_000_000, "slow"),
        (2_500_000, "oom_victim"),
        (4_990_000, "fact"),
        (-AT, "fact"),
        (5_000_000, "ended"),
    ]
    sentences = [step.sentence for step in found.steps]
    assert sentences[0] == (
        "It asked for memory 512 MiB, memory_max 4 GiB, cpu_max 1.5, timeout 5 s."
    )
    assert sentences[1] == "It waited in the queue, as number 2."
    assert sentences[3].startswith("It was granted at most 2 GiB of memory, 1.5 cores, 5 s of time")
    assert "priority 50, 512 MiB expected. memory_max: 2 GiB instead" in sentences[3]
    assert sentences[3].endswith("Not enforced here: cpu.max.")
    assert sentences[4] == "It was paused: The pool has 12 MiB left."
    assert sentences[6] == "The whole session: Its CPU weight was lowered: It stalls."
    assert sentences[7] == "The kernel's OOM killer chose cc1 (12)."
    assert sentences[-1] == (
        "The call was ended at its timeout of 5 s. Verdict: timeout. It took 5 s of time, 1.5 s of "
        "CPU, at most 700 MiB of memory."
    )
    assert found.steps[1].numbers == {"position": 2, "expected_bytes": 512 * MIB}
    assert found.steps[-1].numbers["frozen_usec"] == 400_000
    assert list(found.advice) == ["2 processes were ended."], "the verdict's sentence is there"
    assert (found.name, found.report.call_id, found.steps_left_out) == ("pytest", "c1", 0)


def test_an_open_call_has_no_end_and_says_how_it_stands() -> None:
    call = pb.Call(id="c1", name="make", state=pb.CALL_STATE_FROZEN, began_unix_usec=AT)
    found = story("c1", "alpha", call, None, [entry(5, "freeze", why="Room.")])
    assert [step.what for step in found.steps] == ["freeze"]
    assert (found.state, found.name, found.HasField("report")) == (call.state, "make", False)


def test_a_call_that_nobody_saw_end_is_told_as_far_as_it_is_known() -> None:
    found = told(None, entry(0, "call_begun", name="make", intent={}, observed=False))
    assert [step.sentence for step in found.steps] == ["It asked for nothing in particular."]
    assert (found.name, found.state) == ("make", pb.CALL_STATE_UNSPECIFIED)


def test_a_call_that_nobody_declared_says_so() -> None:
    begun = entry(0, "call_begun", name="sh", intent={"leftovers": "keep"}, observed=True)
    assert "Nobody declared it" in told(ended(), begun).steps[0].sentence


def test_time_in_the_queue_is_told_without_an_entry_of_it() -> None:
    steps = told(ended()).steps
    assert [step.what for step in steps] == ["call_started", "granted", "ended"]
    assert steps[0].numbers == {"waited_usec": 3_000_000}


@pytest.mark.parametrize(
    ("event", "fields", "words"),
    [
        ("denied", {"why": "A request for 5 MiB was refused."}, "It was refused memory: A request"),
        (
            "reclaim",
            {"reclaimed_bytes": 5 * MIB, "took_usec": 2000},
            "5 MiB were reclaimed in 2 ms",
        ),
        ("urgent", {"stalled_usec": 12_000}, "It stalled on memory for 12 ms."),
        (
            "gpu_fault",
            {"why": "The driver reports XID 31.", "xid": 31},
            "The driver reports XID 31",
        ),
        ("something_new", {}, "something new."),
        ("reclaim", {"reclaimed_bytes": "many", "took_usec": None}, "some memory were reclaimed"),
    ],
)
def test_each_event_has_words(event: str, fields: dict[str, Any], words: str) -> None:
    step = told(None, entry(0, event, **fields)).steps[0]
    assert words in step.sentence
    assert step.what == event


def test_of_too_many_steps_the_middle_is_left_out_and_counted() -> None:
    many = [entry(number, "freeze", why="x" * 5000, number=number) for number in range(5000)]
    found = told(None, *many)
    assert len(found.steps) == STEPS_MOST
    assert found.steps_left_out == 5000 - STEPS_MOST
    numbers = [step.numbers["number"] for step in found.steps]
    half = STEPS_MOST // 2
    assert numbers == [*range(half), *range(5000 - half, 5000)]
    assert found.ByteSize() < 48 << 10
