"""Verdicts from evidence."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.facts import EndFacts, LimitHit, OomFacts
from agentcgroupd.calls.verdict import RULES, judge, report_of, rule_of
from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.ending import Asked, Asker, Gone, Held, Left

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
    }
    return EndFacts(**{**base, **changes})


def killed(**changes: Any) -> dict[str, Any]:
    """Changes for a call whose main process died of SIGKILL."""
    return {"wait_status": KILLED, **changes}


@pytest.mark.parametrize(("peak_mib", "words"), [(500, "its memory limit"), (100, "of the pool")])
def test_what_slowed_a_call_is_its_own_limit_or_the_pool(peak_mib: int, words: str) -> None:
    slowed = facts(
        memory_high_events=5, memory_throttled_usec=500_000, memory_peak_bytes=peak_mib * MIB
    )
    (told,) = report_of(slowed).feedback
    assert told.code == pb.FEEDBACK_CODE_MEMORY_THROTTLED and words in told.sentence


def test_of_what_ended_outside_of_its_call_the_daemon_claims_nothing() -> None:
    outside = judge(facts(**killed(left=ELSEWHERE, outside=True)))[1]
    back = judge(facts(**killed(left=MOVED_BACK)))[1]
    assert "not the daemon" not in outside and "memory.events" not in outside
    assert "It was not the daemon, and memory.events counts no OOM kill" in back


def test_what_a_call_left_running_that_went_on_as_another_is_told() -> None:
    went = Asked(Asker.WENT_ON, 1, True, 2, why="It went on as call b.")
    swept = Asked(Asker.OPERATOR, 2, False, 1)
    report = report_of(facts(wait_status=None, asked=(went, swept)))
    assert report.verdict == pb.VERDICT_OK
    text = "Afterwards 1 process that it had left running was ended by the operator."
    assert report.sentence == f"It went on as call b. {text}"
    assert [f.code for f in report.feedback] == [pb.FEEDBACK_CODE_LEFTOVERS]


def test_the_process_that_was_chosen_of_a_group_is_not_told_twice() -> None:
    """The kernel counts it twice, unless it has ended before the others are looked at."""
    for kills, text in ((1, "ended 1 process of"), (2, "ended at least 1 process of")):
        group = OomFacts(kills=kills, groups=1, hits=(hit(NESTED),))
        report = report_of(facts(oom_kills=1, oom=group))
        assert text in report.sentence
        assert report.feedback[0].numbers["oom_kills"] == 1
    before = OomFacts(kills_before=4, groups_before=1, hits_before=(hit(CALL),))
    assert (
        "ended at least 3 processes of this call"
        in report_of(facts(oom=before)).feedback[0].sentence
    )


def test_pauses_that_came_late_are_told_beside_the_time_paused() -> None:
    for late, numbers in ((0, {"frozen_usec"}), (2, {"frozen_usec", "late_pauses"})):
        report = report_of(facts(frozen_usec=500_000, late_pauses=late))
        (told,) = report.feedback
        assert told.code == pb.FEEDBACK_CODE_FROZEN and set(told.numbers) == numbers


def hit(level: pb.Level.ValueType, limit: int | None = 64 * MIB, name: str = "x") -> LimitHit:
    """A limit that was reached once."""
    return LimitHit(level, name, limit, 1)


def oom(*levels: pb.Level.ValueType, whole: bool = True, **changes: Any) -> dict[str, Any]:
    """Changes for a call of which the OOM killer ended one process, at limits of these levels."""
    found = OomFacts(kills=1, whole=whole, hits=tuple(map(hit, levels)))
    return {"oom_kills": 1, "oom": replace(found, **changes)}


def asked(
    by: Asker,
    *,
    main_ran: bool = True,
    processes: int = 1,
    why: str = "",
    reason: pb.EndReason.ValueType = pb.END_REASON_UNSPECIFIED,
) -> dict[str, Any]:
    """Changes for a call whose end was asked for."""
    return {"asked": (Asked(by, 1, main_ran, processes, 0, why, reason),)}


CALL, NESTED, OUTER = pb.LEVEL_CALL, pb.LEVEL_NESTED, pb.LEVEL_OUTER
SESSION, POOL, HOST = pb.LEVEL_SESSION, pb.LEVEL_POOL, pb.LEVEL_HOST
TIMED_OUT = asked(Asker.TIMEOUT)
LEFT_BEHIND: dict[str, Any] = {"main_ran": False, "processes": 2}
ELSEWHERE = (Left(12, "/system.slice/x.scope", 1),)
GONE = (
    Gone(13, "sleep", 1, "systemd", "/user.slice/x.scope", 1),
    Gone(14, "bash", 14, "bash", "/a", 1),
)
MOVED_BACK = (Left(12, "/pool/alpha/agent", 1, moved_back=True),)


VERDICTS: list[tuple[dict[str, Any], pb.Verdict.ValueType, list[str]]] = [
    ({}, pb.VERDICT_OK, ["well"]),
    ({"wait_status": 3 << 8}, pb.VERDICT_FAILED, ["exit status 3", "no limit"]),
    (
        {"wait_status": 2 << 8, "pids_hits": (LimitHit(pb.LEVEL_CALL, "x", 4, 1),)},
        pb.VERDICT_FAILED,
        ["exit status 2; it had been refused a process or thread."],
    ),
    (
        {"wait_status": 2 << 8, "pids_hits": (LimitHit(pb.LEVEL_SESSION, "x", 4, 1),)},
        pb.VERDICT_FAILED,
        ["no limit"],
    ),
    ({"wait_status": 137 << 8}, pb.VERDICT_FAILED, ["counts no OOM kill"]),
    ({"wait_status": int(signal.SIGSEGV)}, pb.VERDICT_SIGNALED, ["SIGSEGV"]),
    # Who sent a SIGKILL is not known.
    (killed(), pb.VERDICT_SIGNALED, ["by whom is not known", "counts no OOM kill"]),
    (killed(oom_kills=None), pb.VERDICT_SIGNALED, ["cannot be seen"]),
    # Out of memory, at each level.
    (killed(**oom(CALL)), pb.VERDICT_OOM_CALL, ["its own limit of 64 MiB", "memory_max"]),
    (killed(**oom(NESTED)), pb.VERDICT_OOM_CALL, ["the cgroup 'x'", "64 MiB"]),
    (killed(**oom(OUTER)), pb.VERDICT_OOM_CALL, ["call x, which this one is in"]),
    (killed(**oom(SESSION)), pb.VERDICT_OOM_SESSION, ["this session", "64 MiB"]),
    (killed(**oom(POOL)), pb.VERDICT_OOM_POOL, ["the pool's limit of 64 MiB"]),
    (killed(**oom(HOST)), pb.VERDICT_OOM_HOST, ["the cgroup 'x' above this session"]),
    (killed(**oom()), pb.VERDICT_OOM_HOST, ["the host itself"]),
    # Two limits were reached; the call died as a whole, which the inner one does not ask for.
    (killed(**oom(NESTED, SESSION)), pb.VERDICT_OOM_SESSION, ["this session"]),
    (killed(**oom(NESTED, CALL, whole=False)), pb.VERDICT_OOM_CALL, ["the cgroup 'x'"]),
    (killed(**oom(CALL, SESSION)), pb.VERDICT_OOM_CALL, ["its own limit"]),
    ({"wait_status": None, **oom(CALL)}, pb.VERDICT_OOM_CALL, ["its own limit"]),
    (
        killed(**oom(CALL, swap=hit(SESSION, MIB))),
        pb.VERDICT_OOM_CALL,
        ["its session had all the swap that it may have (1 MiB)"],
    ),
    (
        killed(**oom(SESSION, held=Held(900 * MIB, 0, 50 * MIB))),
        pb.VERDICT_OOM_SESSION,
        ["100 MiB at most", "the agent itself holds 900 MiB", "tmpfs or /dev/shm", "50 MiB"],
    ),
    # A child died, and the main process went on.
    (oom(NESTED, whole=False), pb.VERDICT_OK, ["well", "1 process of the call, not its main"]),
    (oom(CALL), pb.VERDICT_OK, ["well", "not its main process: the call reached its own"]),
    (
        {"wait_status": 2 << 8, **oom(NESTED, whole=False)},
        pb.VERDICT_FAILED,
        ["exit status 2.", "OOM killer ended 1 process"],
    ),
    ({"wait_status": 137 << 8, **oom(CALL)}, pb.VERDICT_FAILED, ["137.", "OOM killer ended"]),
    (
        {"wait_status": int(signal.SIGSEGV), **oom(CALL)},
        pb.VERDICT_SIGNALED,
        ["SIGSEGV", "OOM killer ended 1 process"],
    ),
    (
        killed(**oom(NESTED, whole=False, main_chosen=False)),
        pb.VERDICT_SIGNALED,
        ["by whom is not known", "not its main process"],
    ),
    (killed(**oom(NESTED, whole=False, main_chosen=True)), pb.VERDICT_OOM_CALL, ["'x'"]),
    (
        {"wait_status": 15, **TIMED_OUT, **oom(NESTED, whole=False)},
        pb.VERDICT_TIMEOUT,
        ["1 min", "OOM killer ended 1 process of the call, not its main process"],
    ),
    # The daemon found the main process alive after a child had died, and killed it.
    (
        killed(**TIMED_OUT, main_killed=True, **oom(NESTED, whole=False)),
        pb.VERDICT_TIMEOUT,
        ["1 min", "not its main process"],
    ),
    # It ran out of memory in the time that SIGTERM gives it.
    (
        killed(**TIMED_OUT, **oom(CALL)),
        pb.VERDICT_OOM_CALL,
        ["its own limit", "Its timeout of 1 min had passed before"],
    ),
    # An earlier command ran out of memory.
    (
        {"oom_kills": 3, "oom": OomFacts(kills_before=3, hits_before=(hit(CALL),))},
        pb.VERDICT_OK,
        ["well"],
    ),
    # Ended by somebody, while the main process ran.
    ({"wait_status": 15, **TIMED_OUT}, pb.VERDICT_TIMEOUT, ["at its timeout of 1 min"]),
    ({"wait_status": 0, **TIMED_OUT}, pb.VERDICT_TIMEOUT, ["at its timeout of 1 min"]),
    (killed(**asked(Asker.AGENT)), pb.VERDICT_CANCELLED, ["its agent ended"]),
    (killed(**asked(Asker.OPERATOR)), pb.VERDICT_CANCELLED, ["the operator ended"]),
    (killed(**asked(Asker.SESSION)), pb.VERDICT_CANCELLED, ["its session was closed"]),
    (killed(**asked(Asker.POLICY, why="Too big.")), pb.VERDICT_STOPPED, ["Too big."]),
    (
        killed(**asked(Asker.AGENT, reason=pb.END_REASON_TIMEOUT)),
        pb.VERDICT_CANCELLED,
        ["its caller says that a timeout of its own had passed"],
    ),
    (
        killed(**asked(Asker.AGENT, reason=pb.END_REASON_CANCELLED)),
        pb.VERDICT_CANCELLED,
        ["its caller says that it was cancelled or interrupted"],
    ),
    # What a caller says afterwards is no word on who sent the signal.
    (
        killed(**asked(Asker.AGENT, main_ran=False, processes=0, reason=pb.END_REASON_TIMEOUT)),
        pb.VERDICT_SIGNALED,
        ["by whom is not known", "ended afterwards: its caller says that a timeout"],
    ),
    (
        killed(**asked(Asker.AGENT, main_ran=False, processes=1, reason=pb.END_REASON_TIMEOUT)),
        pb.VERDICT_SIGNALED,
        ["by whom is not known", "running was ended: its caller says that a timeout"],
    ),
    (
        asked(Asker.AGENT, main_ran=False, processes=0, reason=pb.END_REASON_TIMEOUT),
        pb.VERDICT_OK,
        ["It ended well."],
    ),
    (
        killed(**asked(Asker.AGENT, main_ran=False, reason=pb.END_REASON_TIMEOUT), **oom(CALL)),
        pb.VERDICT_OOM_CALL,
        ["its own limit"],
    ),
    # Only what it had left running was ended.
    (
        asked(Asker.TIMEOUT, **LEFT_BEHIND),
        pb.VERDICT_OK,
        ["It ended well. At the call's timeout of 1 min, 2 processes that it had left running"],
    ),
    (
        {"wait_status": 4 << 8, **asked(Asker.OPERATOR, **LEFT_BEHIND)},
        pb.VERDICT_FAILED,
        ["exit status 4", "2 processes that it had left running were ended by the operator"],
    ),
    (asked(Asker.SESSION, **LEFT_BEHIND), pb.VERDICT_OK, ["were ended with its session"]),
    (asked(Asker.POLICY, why="Big.", **LEFT_BEHIND), pb.VERDICT_OK, ["by the policy: Big."]),
    # It left its cgroup.
    (
        {"wait_status": 5 << 8, "left": ELSEWHERE},
        pb.VERDICT_FAILED,
        ["exit status 5", "(12) left the call's cgroup for /system.slice/x.scope", "until its"],
    ),
    (
        {"wait_status": 5 << 8, "gone": GONE, "gone_count": 2},
        pb.VERDICT_FAILED,
        [
            "exit status 5",
            "2 processes left the call's cgroup, where its limits do not hold: sleep (13) was "
            "moved by systemd (1) to /user.slice/x.scope; bash (14) moved itself to /a.",
        ],
    ),
    (
        {"gone": GONE[:1], "gone_count": 7},
        pb.VERDICT_OK,
        ["7 processes left the call's cgroup", "to /user.slice/x.scope; and 6 more."],
    ),
    (
        {"gone": GONE[:1], "gone_count": 7, "gone_more": True, "gone_before": 1},
        pb.VERDICT_OK,
        [
            "At least 7 processes left the call's cgroup",
            "; and 6 more. 1 process left the call's cgroup while earlier commands ran in it.",
        ],
    ),
    ({"gone_before": 3}, pb.VERDICT_OK, ["3 processes left the call's cgroup while earlier"]),
    (
        {"wait_status": 15, "left": ELSEWHERE, **TIMED_OUT},
        pb.VERDICT_TIMEOUT,
        ["1 min", "left the call's cgroup"],
    ),
    (
        killed(left=ELSEWHERE, outside=True),
        pb.VERDICT_SIGNALED,
        ["outside of its call, by whom is not known", "whoever ended what was in that cgroup"],
    ),
    (
        {"left_before": ELSEWHERE, "left_lives": frozenset({12}), "commands": 2},
        pb.VERDICT_OK,
        ["well", "(12) of an earlier command left", "x.scope and was ended with the call."],
    ),
    (
        {"left_before": ELSEWHERE, "commands": 2},
        pb.VERDICT_OK,
        ["of an earlier command left the call's cgroup for /system.slice/x.scope."],
    ),
    (
        killed(left=ELSEWHERE, outside=True, oom=OomFacts(main_chosen=True)),
        pb.VERDICT_OOM_HOST,
        ["outside of the call: the kernel ended it in /system.slice/x.scope"],
    ),
    (
        # Another one of the call ran out of memory where the main process was not any more.
        killed(left=ELSEWHERE, outside=True, **oom(CALL, main_chosen=False)),
        pb.VERDICT_SIGNALED,
        ["outside of its call, by whom is not known", "1 process of the call, not its main"],
    ),
    (
        {"wait_status": 137 << 8, "oom_kills": 2, "oom": OomFacts(kills_before=2)},
        pb.VERDICT_FAILED,
        ["137", "counts no OOM kill since this command began"],
    ),
    (
        killed(commands=2, oom_kills=2, oom=OomFacts(kills_before=2)),
        pb.VERDICT_SIGNALED,
        ["counts no OOM kill since this command began"],
    ),
    (
        killed(**asked(Asker.TOOL, why="a tool in call x ended it")),
        pb.VERDICT_CANCELLED,
        ["while running: a tool in call x ended it."],
    ),
    (
        asked(Asker.TOOL, why="a tool in call x ended it", **LEFT_BEHIND),
        pb.VERDICT_OK,
        ["2 processes that it had left running were ended: a tool in call x ended it."],
    ),
    (
        {"wait_status": 15, **asked(Asker.TIMEOUT, why="which it was given when it had run")},
        pb.VERDICT_TIMEOUT,
        ["at its timeout of 1 min, which it was given when it had run. Ask"],
    ),
    (killed(outside=None), pb.VERDICT_SIGNALED, ["in a cgroup that has been removed since"]),
    ({"left": MOVED_BACK}, pb.VERDICT_OK, ["well", "and was moved back"]),
    (
        {"wait_status": None, "left": ELSEWHERE, "main_lives": True},
        pb.VERDICT_UNKNOWN,
        ["does not die of SIGKILL", "runs on"],
    ),
    (
        {"wait_status": 1 << 8, "pids_hits": (LimitHit(CALL, "x", 50, 7),)},
        pb.VERDICT_FAILED,
        ["exit status 1; it had been refused a process or thread."],
    ),
    # Nothing is known of its end, or it never began.
    (
        {"ever_entered": False, "wait_status": None, **asked(Asker.TIMEOUT, main_ran=False)},
        pb.VERDICT_TIMEOUT,
        ["was ended at its timeout"],
    ),
    ({"ever_entered": False, "wait_status": None}, pb.VERDICT_ABANDONED, ["agentcg-exec"]),
    ({"ever_entered": False, "wait_status": 0}, pb.VERDICT_ABANDONED, ["agentcg-exec"]),
    (
        {"ever_entered": False, "wait_status": 126 << 8},
        pb.VERDICT_ABANDONED,
        ["could not be started (exit status 126)", "in a file or on standard input"],
    ),
    ({"wait_status": None, "main_lost": True}, pb.VERDICT_UNKNOWN, ["the daemon was not there"]),
    ({"wait_status": None, "commands": 0}, pb.VERDICT_UNKNOWN, ["known as its main process"]),
    ({"wait_status": None}, pb.VERDICT_UNKNOWN, ["gone before the kernel could be asked"]),
    ({"wait_status": None, "removed": True}, pb.VERDICT_UNKNOWN, ["someone else"]),
    (
        {"wait_status": None, **asked(Asker.WENT_ON, why="It went on as call b.")},
        pb.VERDICT_OK,
        ["It went on as call b."],
    ),
]
"""Facts of an end, the verdict, and words of the sentence."""


@pytest.mark.parametrize(("changes", "verdict", "words"), VERDICTS)
def test_verdicts(changes: dict[str, Any], verdict: pb.Verdict.ValueType, words: list[str]) -> None:
    found, sentence = judge(facts(**changes))
    assert pb.Verdict.Name(found) == pb.Verdict.Name(verdict), sentence
    for word in words:
        assert word in sentence


def refused(level: pb.Level.ValueType) -> dict[str, Any]:
    """Changes for a call to which a limit of processes refused some."""
    return {"pids_hits": (LimitHit(level, "x", 50, 7),)}


CPU_THROTTLED = {"cpu": {"throttled_usec": 600_000}}
MEMORY_THROTTLED = {"memory_high_events": 3, "memory_throttled_usec": 400_000}
OOM_NUMBERS = {"memory_max_bytes": 512 * MIB, "oom_kills": 1}


@pytest.mark.parametrize(
    ("changes", "code", "numbers"),
    [
        (killed(**oom(CALL)), pb.FEEDBACK_CODE_OOM, OOM_NUMBERS),
        (oom(NESTED, whole=False), pb.FEEDBACK_CODE_OOM, {"oom_kills": 1}),
        ({"oom": OomFacts(kills_before=2)}, pb.FEEDBACK_CODE_OOM, {"oom_kills": 2}),
        ({"left": ELSEWHERE}, pb.FEEDBACK_CODE_LEFT_CALL, {"pid": 12}),
        (killed(), pb.FEEDBACK_CODE_KILLED, {"oom_kills": 0}),
        (refused(CALL), pb.FEEDBACK_CODE_PIDS_LIMIT, {"pids_max": 50, "refused": 7}),
        (refused(SESSION), pb.FEEDBACK_CODE_PIDS_LIMIT, {"pids_max": 50, "refused": 7}),
        (refused(NESTED), pb.FEEDBACK_CODE_PIDS_LIMIT, {"pids_max": 50, "refused": 7}),
        (CPU_THROTTLED, pb.FEEDBACK_CODE_CPU_THROTTLED, {"throttled_usec": 600_000}),
        (MEMORY_THROTTLED, pb.FEEDBACK_CODE_MEMORY_THROTTLED, {"stalled_usec": 400_000}),
        ({"frozen_usec": 2_000_000}, pb.FEEDBACK_CODE_FROZEN, {"frozen_usec": 2_000_000}),
        (asked(Asker.AGENT, **LEFT_BEHIND), pb.FEEDBACK_CODE_LEFTOVERS, {"processes": 2}),
        (asked(Asker.TIMEOUT, **LEFT_BEHIND), pb.FEEDBACK_CODE_LEFTOVERS, {"processes": 2}),
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
    ("call", "session", "seen", "workers"),
    [
        (300, None, 2, 1),
        (1500, None, 64, 1),
        (4000, None, 64, 4),
        (None, 2000, 64, 2),
        (4000, 2000, 64, 2),
        (2000, None, 2, None),
        (1500, None, 2, None),
        (None, None, 64, None),
        (300, None, None, None),
    ],
)
def test_fewer_cpus_than_were_seen_are_told_where_it_mattered(
    call: int | None, session: int | None, seen: int | None, workers: int | None
) -> None:
    changes = {
        "grant": replace(GRANT, cpu_max_millicores=call),
        "session_cpu_millicores": session,
        "cpus_seen": seen,
    }
    told = {f.code: f for f in report_of(facts(**changes, **CPU_THROTTLED)).feedback}
    assert (pb.FEEDBACK_CODE_FEWER_CPUS in told) is (workers is not None)
    if workers is not None:
        sentence = told[pb.FEEDBACK_CODE_FEWER_CPUS].sentence
        assert f"saw {seen} " in sentence and f"-j{workers}," in sentence
    assert not report_of(facts(**changes)).feedback  # it was not throttled


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


@pytest.mark.parametrize(
    ("level", "words"),
    [
        (NESTED, "the cgroup 'x' that the tool made"),
        (CALL, "the call may have 50"),
        (OUTER, "in call x, which this one is in"),
        (SESSION, "in this session"),
        (POOL, "all sessions together may have 50"),
        (HOST, "the cgroup 'x' above this session"),
    ],
)
def test_a_refused_process_names_the_level_of_the_limit(
    level: pb.Level.ValueType, words: str
) -> None:
    report = report_of(facts(**refused(level)))
    assert words in report.feedback[0].sentence and "50" in report.feedback[0].sentence


statuses = st.none() | st.integers(0, 255).map(lambda c: c << 8) | st.integers(1, 64)
levels = st.lists(st.sampled_from([NESTED, CALL, OUTER, SESSION, POOL, HOST]), unique=True)
ooms = st.builds(
    lambda kills, before, whole, chosen, at: OomFacts(
        kills, int(whole), before, 0, (), whole, chosen, tuple(map(hit, sorted(at)))
    ),
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
    st.none() | st.booleans(),
    levels,
)
requests = st.lists(
    st.builds(
        Asked,
        st.sampled_from(Asker),
        st.just(1),
        st.booleans(),
        st.integers(0, 3),
        st.integers(0, 3),
        st.just("Why."),
        st.sampled_from(pb.EndReason.values()),
    ),
    max_size=3,
).map(tuple)
places = st.sampled_from([(), ELSEWHERE, MOVED_BACK])
ends = st.builds(
    lambda **changes: facts(**changes),
    wait_status=statuses,
    oom=ooms,
    asked=requests,
    ever_entered=st.booleans(),
    main_killed=st.booleans(),
    removed=st.booleans(),
    left=places,
)


@given(ends)
def test_every_end_is_judged_by_the_first_rule_that_applies(end: EndFacts) -> None:
    rule = rule_of(end)
    assert not any(earlier.applies(end) for earlier in RULES[: RULES.index(rule)])
    verdict, sentence = judge(end)
    assert verdict == rule.verdict and sentence.startswith(rule.sentence(end))
    assert report_of(end).sentence == sentence
    # A process that asked for another call is none of this one's any more.
    assert not (end.went_on and end.main_oom)


@given(ends)
def test_out_of_memory_is_said_of_a_main_process_only_if_it_died_of_that(end: EndFacts) -> None:
    verdict, sentence = judge(end)
    if pb.Verdict.Name(verdict).startswith("VERDICT_OOM"):
        assert end.oom.kills and end.exit_code is None and end.signal in (None, signal.SIGKILL)
        assert end.oom.main_chosen is not False or end.oom.whole
    elif end.ever_entered and end.oom.kills:
        codes = {f.code for f in report_of(end).feedback}
        assert pb.FEEDBACK_CODE_OOM in codes and "OOM killer" in sentence


def test_each_rule_is_reached() -> None:
    reached = {rule_of(facts(**changes)).name for changes, _, _ in VERDICTS}
    assert reached == {rule.name for rule in RULES}
