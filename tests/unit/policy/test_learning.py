"""Learning is bounded and deterministic and no surer than the runs are; shapes never raise."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.policy.command_shape import SHAPE_CHARS_MAX, shape_of
from agentcgroupd.policy.learning import (
    Expectation,
    Learned,
    Peaks,
    learn,
    was_cut_short,
)
from agentcgroupd.policy.schema import Learning

MIB, GIB = 1 << 20, 1 << 30
TESTS = "pytest tests/"


def script(text: str) -> str:
    """The shape of a shell's command."""
    return shape_of("Bash", ["bash", "-c", text])


def learned(*peaks_bytes: int, shape: str = TESTS, killed: bool = False) -> Learned:
    """What is known after runs with these peaks."""
    made = Learned()
    for peak in peaks_bytes:
        made.ended(shape, None, peak, killed)
    return made


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("cd x && pytest tests/a.py", "pytest tests/a.py"),
        (
            "source venv/bin/activate && python3.11 -m pytest -xvs tests/a.py 2>&1 | tail -50",
            "pytest tests/a.py",
        ),
        ("A=1 timeout 60 uv run pytest tests/a.py::T::test_b[3-x]", "pytest tests/a.py::T::test_b"),
        ("pip3 install -e . -q && make -j8", "pip install .; make"),
        ("python - <<'EOF'\nimport os\nEOF\nmake", "python; make"),
        ("cat > /tmp/a.py <<EOF\nmake\nEOF\npython /tmp/a.py", "python /tmp/*.py"),
        ("python /tmp/tmpab12/run.py 10", "python /tmp/*.py N"),
        ("git show 3f2a9bcd1e", "git show #"),
        ("git commit -m 'a long text that says\nwhy the change was made'", "git commit …"),
        ("python -c 'import os; import numpy as np\nfrom a.b import c'", "python -c a,numpy,os"),
        ("for i in 0 1; do g++ -c part$i.cpp; done; wait", "g++ part$i.cpp"),
        ("bash -c 'sh -c \"make all\"'", "make all"),
        ("find . -name '*.py' | xargs grep -l foo", "find . *.py; grep foo"),
        ("echo a; cd b", "echo a"),
        ("pytest 'tests/unfinished", "pytest tests/unfinished"),
    ],
)
def test_the_shape_of_a_script(text: str, shape: str) -> None:
    assert script(text) == shape


@pytest.mark.parametrize(
    ("name", "argv", "shape"),
    [
        ("Read", [], "Read"),
        ("", [], "?"),
        ("job-17", ["", ""], "job-N"),
        ("x", ["/usr/bin/python3", "-u", "-m", "pytest", "tests"], "pytest tests"),
        ("x", ["env"], "env"),
        ("x", ["bash", "build.sh"], "bash build.sh"),
        ("x", ["bash", "-c"], "bash"),
        ("x", ["/opt/g++-12", "-O2", "a.cpp"], "g++ a.cpp"),
    ],
)
def test_the_shape_of_a_command_line(name: str, argv: list[str], shape: str) -> None:
    assert shape_of(name, argv) == shape


def test_the_same_work_in_other_words_has_one_shape() -> None:
    assert script("cd /a && python -m pytest -q tests/a.py | tail -3") == shape_of(
        "pytest", ["venv/bin/pytest", "tests/a.py", "-v"]
    )


WORDS = st.text(max_size=200) | st.text("ab1 '\"\\;|&<>()$#\n=-/", max_size=60)


@given(WORDS, st.lists(WORDS, max_size=12) | WORDS.map(lambda text: ["sh", "-c", text]))
def test_any_command_line_has_a_short_shape_that_can_be_sent(
    name: str, argv: Sequence[str]
) -> None:
    shape = shape_of(name, argv)
    assert 1 <= len(shape) <= SHAPE_CHARS_MAX
    assert "\n" not in shape and shape_of(name, list(argv)) == shape
    pb.Feedback(sentence=shape).SerializeToString()


@pytest.mark.parametrize(
    "text", ["\\", "'", '"', "a-", "<<a\n", "1-", "a;", "\n ", "$(", "/tmp/a."]
)
def test_no_command_line_costs_much_more_for_being_odd(text: str) -> None:
    # Counted in what is looked at, not in time: a shape is of the head of a line alone.
    many = shape_of("", ["bash", "-c", text * 1_000_000])
    assert many == shape_of("", ["bash", "-c", (text * 4096)[:4096]])


def test_nothing_is_known_at_first() -> None:
    assert Learned().expect(TESTS, None) == Expectation(0, "", 0)
    assert Learned().expect(TESTS, GIB) == Expectation(GIB, "", 0)


def test_one_run_corrects_nothing() -> None:
    assert learned(300 * MIB).expect(TESTS, 4 * GIB) == Expectation(4 * GIB, "", 1)


def test_an_overstated_intent_is_corrected_and_told() -> None:
    found = learned(300 * MIB, 310 * MIB, 290 * MIB).expect(TESTS, 4 * GIB)
    assert (found.expected_bytes, found.runs) == (310 * MIB, 3)
    assert found.sentence.startswith(
        "You asked for 4 GiB; `pytest tests/` took 310 MiB at most in 3 of 3 runs."
    )


def test_an_understated_intent_is_corrected_and_told() -> None:
    found = learned(50 * MIB, 900 * MIB).expect(TESTS, 100 * MIB)
    assert found.expected_bytes == 900 * MIB
    assert "took more in 1 of 2 runs, up to 900 MiB" in found.sentence


def test_what_is_asked_stands_when_it_is_near_or_small() -> None:
    assert learned(300 * MIB, 310 * MIB).expect(TESTS, GIB).expected_bytes == GIB
    assert learned(1 * MIB, 1 * MIB).expect(TESTS, 32 * MIB).expected_bytes == 32 * MIB
    assert learned(300 * MIB, 310 * MIB).expect(TESTS, None).expected_bytes == 310 * MIB


def test_killed_runs_never_call_an_intent_overstated() -> None:
    assert learned(*[300 * MIB] * 8, killed=True).expect(TESTS, 4 * GIB).sentence == ""
    mixed = learned(10 * MIB, 10 * MIB)
    mixed.ended(TESTS, None, 2 * GIB, True)
    assert mixed.expect(TESTS, 4 * GIB).expected_bytes == 4 * GIB


def test_only_the_last_runs_count() -> None:
    made = learned(2 * GIB, *[100 * MIB] * Learning().runs_kept)
    assert made.expect(TESTS, None).expected_bytes == 100 * MIB


def test_another_command_of_the_tool_tells_nothing_of_a_new_one() -> None:
    found = learned(700 * MIB, 800 * MIB).expect("pytest tests/new.py", None)
    assert (found.expected_bytes, found.runs) == (0, 0)


def test_the_shape_used_longest_ago_is_forgotten() -> None:
    made = Learned(shapes_kept=2)
    for shape in ("a", "b", "a", "c"):
        made.ended(shape, None, MIB, False)
    assert len(made) == 2
    assert [made.expect(shape, None).runs for shape in "abc"] == [2, 0, 1]


def test_who_always_asks_for_too_much_is_told_so_for_a_new_command() -> None:
    made = Learned()
    for number in range(10):
        made.ended(f"tool{number}", 4 * GIB, 20 * MIB, False)
    assert made.advice("other", 4 * GIB).startswith("10 of your last 10 calls")
    assert made.advice("other", None) == "" and made.expect("other", 4 * GIB).sentence == ""


def test_a_policy_can_switch_it_off() -> None:
    made = Learned(Learning(enabled=False))
    for _ in range(10):
        made.ended(TESTS, 4 * GIB, MIB, False)
    assert made.expect(TESTS, 4 * GIB) == Expectation(4 * GIB, "", 0)
    assert made.advice(TESTS, 4 * GIB) == "" == made.advice("new", 4 * GIB)


RUNS = st.tuples(
    st.sampled_from("abcdef"),
    st.none() | st.integers(0, 1 << 50),
    st.integers(-1, 1 << 50),
    st.booleans(),
)


@given(st.lists(RUNS, max_size=60), st.sampled_from("abcg"), st.none() | st.integers(0, 1 << 50))
def test_it_is_bounded_and_deterministic(
    runs: list[tuple[str, int | None, int, bool]], shape: str, asked: int | None
) -> None:
    one, two = Learned(shapes_kept=4), Learned(shapes_kept=4)
    for run in runs:
        one.ended(*run)
        two.ended(*run)
        one.expect(shape, asked)  # asking changes nothing
    assert len(one) <= 4
    found = one.expect(shape, asked)
    assert found == two.expect(shape, asked) and one.advice(shape, asked) == two.advice(
        shape, asked
    )
    assert found.runs <= Learning().runs_kept and found.expected_bytes >= 0
    assert found.expected_bytes == (asked or 0) or found.runs >= Learning().runs_least
    assert not found.sentence or (asked and found.expected_bytes != asked)


@given(st.permutations([(100 * MIB, False), (400 * MIB, True), (90 * MIB, False), (7, False)]))
def test_the_order_of_the_kept_runs_does_not_matter(runs: list[tuple[int, bool]]) -> None:
    made = Learned()
    for peak, killed in runs:
        made.ended(TESTS, None, peak, killed)
    assert made.expect(TESTS, 16 * GIB).expected_bytes == 400 * MIB


@given(st.lists(st.integers(0, 50), max_size=80), st.integers(1, 12), st.integers(0, 20))
def test_peaks_are_the_newest_sorted(values: list[int], kept: int, least: int) -> None:
    peaks = Peaks(kept, least)
    for value in values:
        peaks.add(value)
    assert peaks.sorted_bytes == tuple(sorted([v for v in values if v >= least][-kept:]))
    assert len(peaks) == len(peaks.sorted_bytes) <= kept
    assert peaks.sorted_bytes is peaks.sorted_bytes


def test_peaks_must_keep_something() -> None:
    with pytest.raises(ValueError, match="allowed: at least 1"):
        Peaks(0)


def report(session: str, verdict: pb.Verdict.ValueType, peak: int | None) -> pb.Report:
    """A report of `pytest tests/`, which asked for 4 GiB."""
    return pb.Report(
        session_id=session,
        name="Bash",
        argv=["bash", "-c", "cd a && pytest tests/"],
        verdict=verdict,
        memory_peak_bytes=peak,
        wall_usec=3,
        grant=pb.Grant(memory_expected_bytes=4 * GIB),
    )


def test_reports_tell_what_is_known() -> None:
    told = [
        report("s1", pb.VERDICT_OK, 200 * MIB),
        report("s1", pb.VERDICT_FAILED, 210 * MIB),
        report("s1", pb.VERDICT_OOM_CALL, 220 * MIB),
        report("s1", pb.VERDICT_ABANDONED, 0),
        report("s2", pb.VERDICT_OK, None),
        report("s2", pb.VERDICT_OK, 30 * MIB),
    ]
    sessions, peaks = {"s1": Learned(), "s2": Learned()}, Peaks()
    for each in told:
        learn(sessions[each.session_id], peaks, each)
    found = sessions["s1"].expect(TESTS, 4 * GIB)
    assert (found.expected_bytes, found.runs) == (220 * MIB, 3)
    assert sessions["s2"].expect(TESTS, None).runs == 1
    assert peaks.sorted_bytes == tuple(n * MIB for n in (30, 200, 210, 220))


def test_only_a_whole_run_is_more_than_a_lower_bound() -> None:
    assert not was_cut_short(report("s", pb.VERDICT_FAILED, 1))
    for verdict in (pb.VERDICT_TIMEOUT, pb.VERDICT_STOPPED, pb.VERDICT_OOM_POOL):
        assert was_cut_short(report("s", verdict, 1))


def test_a_call_that_failed_after_its_growth_was_denied_would_have_taken_more() -> None:
    made = Learned()
    for _ in range(4):
        learn(made, Peaks(), report("s", pb.VERDICT_FAILED, 100 * MIB), denied=True)
    assert made.expect(TESTS, 4 * GIB) == Expectation(4 * GIB, "", 4)
    for _ in range(2):
        learn(made, Peaks(), report("s", pb.VERDICT_OK, 100 * MIB), denied=True)
    assert made.expect(TESTS, 4 * GIB).expected_bytes == 100 * MIB
