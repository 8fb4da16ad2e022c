"""The plan of `make test`: its suites, and the counts of what they did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests import run
from tests.harness import ROOT
from tests.suites import Suite, plan


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setattr("tests.suites.RESULTS", tmp_path)
    return Suite("one", ("tests/unit",), "native", 60)


def results(suite: Suite, **counts: int) -> None:
    attributes = " ".join(f'{name}="{count}"' for name, count in counts.items())
    suite.results.write_text(f"<testsuites><testsuite {attributes}/></testsuites>")


def test_counts(suite: Suite) -> None:
    results(suite, tests=10, failures=1, errors=1, skipped=3)
    totals = run.Totals()
    totals.add(suite, 1, 4.0, 3.0)
    assert str(totals) == "5 passed, 2 failed, 3 skipped"
    assert totals.broken == []


def test_no_results_is_a_failure(suite: Suite) -> None:
    totals = run.Totals()
    totals.add(suite, 125, 4.0, 3.0)
    assert str(totals) == "0 passed, 1 failed, 0 skipped"
    assert totals.broken == ["one: no results, exit status 125"]


def test_nothing_collected_is_a_failure(suite: Suite) -> None:
    results(suite, tests=0, failures=0, errors=0, skipped=0)
    totals = run.Totals()
    totals.add(suite, 5, 4.0, 3.0)
    assert totals.failed == 1
    assert totals.broken == ["one: collected no tests"]


def test_a_bad_status_is_a_failure_whatever_was_counted(suite: Suite) -> None:
    results(suite, tests=3, failures=0, errors=0, skipped=0)
    totals = run.Totals()
    totals.add(suite, 137, 4.0, 3.0)
    assert totals.failed == 1
    assert totals.broken == ["one: exit status 137"]


def test_the_table_has_a_line_for_each_suite_and_one_for_all(suite: Suite) -> None:
    totals = run.Totals()
    for tests in (3, 5):
        results(suite, tests=tests, failures=0, errors=0, skipped=1)
        totals.add(suite, 0, 60.4, 12.0)
    head, first, second, every = (line.split() for line in totals.table(90.0).splitlines())
    assert head == ["suite", "place", "passed", "failed", "skipped", "seconds", "CPU", "sec"]
    assert first == ["one", "native", "2", "0", "1", "60", "12"]
    assert second == ["one", "native", "4", "0", "1", "60", "12"]
    assert every == ["all", "6", "0", "2", "90", "24"]


FAILED_TWICE_OF_FIVE = """<testsuites><testsuite tests="5" failures="1" errors="1" skipped="0">
<testcase classname="tests.unit.test_a" name="test_fine" file="tests/unit/test_a.py"/>
<testcase classname="tests.unit.test_a" name="test_slow[1]" file="tests/unit/test_a.py">
<failure message="too slow"/></testcase>
<testcase classname="tests.unit.test_a.TestB" name="test_c" file="tests/unit/test_a.py">
<error message="no daemon"/></testcase>
</testsuite></testsuites>"""


def test_what_failed_is_run_again_and_both_results_are_kept(suite: Suite) -> None:
    totals = run.Totals()
    suite.results.write_text(FAILED_TWICE_OF_FIVE)
    totals.add(suite, 1, 4.0, 3.0)
    slow, late = "tests/unit/test_a.py::test_slow[1]", "tests/unit/test_a.py::TestB::test_c"
    again = totals.outcomes[0].to_run_again()
    assert again is not None
    assert again.argv()[-2:] == [slow, late]
    alone = run.Totals()
    again.results.write_text(
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0">'
        '<testcase classname="tests.unit.test_a.TestB" name="test_c" file="tests/unit/test_a.py">'
        '<failure message="again"/></testcase></testsuite></testsuites>'
    )
    alone.add(again, 1, 4.0, 3.0)
    totals.settle(totals.outcomes[0], alone)
    assert totals.passed_alone == [slow]
    assert totals.failures == [f"one: {late}"]
    assert str(totals) == "4 passed, 1 failed, 0 skipped"


def test_what_cannot_be_run_again_stays_failed(suite: Suite) -> None:
    totals = run.Totals()
    suite.results.write_text(FAILED_TWICE_OF_FIVE)
    totals.add(suite, 1, 4.0, 3.0)
    again = totals.outcomes[0].to_run_again()
    assert again is not None
    alone = run.Totals()
    alone.add(again, 137, 4.0, 3.0)
    totals.settle(totals.outcomes[0], alone)
    assert totals.failed == 2
    assert totals.passed_alone == []


def test_many_failures_or_a_broken_suite_are_not_run_again(suite: Suite) -> None:
    totals = run.Totals()
    case = '<testcase classname="t.a" name="test_{}" file="t/a.py"><failure/></testcase>'
    cases = "".join(case.format(number) for number in range(run.RUN_AGAIN_MAX + 1))
    counts = f'tests="99" failures="{run.RUN_AGAIN_MAX + 1}" errors="0" skipped="0"'
    suite.results.write_text(f"<testsuites><testsuite {counts}>{cases}</testsuite></testsuites>")
    totals.add(suite, 1, 4.0, 3.0)
    assert totals.outcomes[0].to_run_again() is None
    results(suite, tests=3, failures=0, errors=0, skipped=0)
    totals.add(suite, 137, 4.0, 3.0)
    assert totals.outcomes[1].to_run_again() is None


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_idle_suite_runs_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    ran: list[str] = []
    together = threading.Barrier(1 if at_once == 1 else 3)

    def note(_: run.Runner, suite: Suite) -> None:
        together.wait(20)
        ran.append(suite.name)

    monkeypatch.setattr(run.Runner, "_suite", note)
    suites = [Suite(name, ("tests/unit",), "native", 60) for name in ("a", "b", "c")]
    runner = run.Runner([replace(suites[0], is_idle=True), *suites[1:]], ())
    runner.run(at_once)
    assert ["a", "b", "c"] == (ran if at_once == 1 else sorted(ran))


def test_what_measures_time_goes_first() -> None:
    assert [suite.name for suite in plan("guest", False)[0] if suite.goes_first] == ["sched"]
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        run._let_go_first(process.pid)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == run.GOES_FIRST_NICE
        autogroup = Path(f"/proc/{process.pid}/autogroup")
        if autogroup.exists():
            assert autogroup.read_text().split()[-1] == str(run.GOES_FIRST_NICE)
    finally:
        process.kill()
        process.wait()


def test_a_suite_that_does_not_run_here_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "nonsense"])
    assert "'nonsense' does not run here, only " in capsys.readouterr().err


def planned(name: str) -> Suite:
    """Return a suite of a machine without controllers, by name."""
    suites, _ = plan("guest", systemd_here=False)
    (found,) = (suite for suite in suites if suite.name == name)
    return found


def test_the_guests_do_what_the_host_cannot() -> None:
    suites, left_out = plan("guest", systemd_here=False)
    assert {suite.name: suite.place for suite in suites} == {
        "waits": "native",
        "host": "native",
        "uml": "uml",
        "programs": "qemu",
        "sched": "qemu",
        "systemd": "uml",
        "pins": "qemu",
    }
    assert left_out == []
    assert not {"tests.guest.vm", "tests.guest.uml"} & set(planned("host").argv())
    assert "tests.guest.uml" in planned("uml").argv()
    assert "tests.guest.vm" in planned("programs").argv()
    assert "--systemd" in planned("systemd").argv() and "--systemd" in planned("pins").argv()
    paths = {path for suite in suites for path in suite.paths}
    assert all(Path(path).exists() for path in paths)


PLUGIN = """
import json, sys
import pytest

class Collected:
    def pytest_collection_finish(self, session):
        tests = {item.nodeid: [mark.name for mark in item.iter_markers()] for item in session.items}
        print("collected:" + json.dumps(tests))

sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests"], [Collected()]))
"""


class Marks(dict[str, bool]):
    """The names in an expression of pytest's -m: true for a test's own markers."""

    def __missing__(self, name: str) -> bool:
        return False


def has(suite: Suite, test: str, marks: list[str]) -> bool:
    """Whether a test belongs to a suite."""
    path = test.partition("::")[0]
    if not any(f"{path}/".startswith(f"{at}/") for at in suite.paths):
        return False
    return not suite.marks or bool(eval(suite.marks, {}, Marks.fromkeys(marks, True)))


@pytest.fixture(scope="module")
def collected() -> dict[str, list[str]]:
    """The names of all tests, and the markers of each."""
    done = subprocess.run(
        [sys.executable, "-c", PLUGIN],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("collected:"))
    tests: dict[str, list[str]] = json.loads(line.removeprefix("collected:"))
    return {test: marks for test, marks in tests.items() if not test.startswith(ELSEWHERE)}


ELSEWHERE = ("tests/gpu/", "tests/containers/", "tests/agents/", "tests/integrations/")
"""Need a GPU (tests/gpu/on_device.sh), container runtimes (python -m tests.containers), or packages
of agents and frameworks (make test-integrations)."""


def test_every_test_runs_somewhere(collected: dict[str, list[str]]) -> None:
    suites, _ = plan("guest", systemd_here=False)
    assert len(collected) > 500
    nowhere = [
        test
        for test, marks in collected.items()
        if not any(has(suite, test, marks) for suite in suites)
    ]
    assert nowhere == []
    for test, marks in collected.items():
        if "waits" in marks:
            assert [suite.name for suite in suites if has(suite, test, marks)] == ["waits"], test
    in_both = [test for test, marks in collected.items() if "with_programs" in marks]
    for name in ("uml", "programs"):
        suite = planned(name)
        assert [test for test in in_both if not has(suite, test, collected[test])] == [
            # The guest's own tests are of what each of the two has.
            test
            for test in in_both
            if name == "uml" and {"programs", "full_kernel"} & set(collected[test])
        ]


def test_each_place_has_the_tests_that_only_it_can_run(collected: dict[str, list[str]]) -> None:
    def places(test: str) -> set[str]:
        suites, _ = plan("guest", systemd_here=False)
        (marks,) = (marks for name, marks in collected.items() if name.endswith(f"::{test}"))
        (name,) = (name for name in collected if name.endswith(f"::{test}"))
        return {suite.name for suite in suites if has(suite, name, marks)}

    assert places("test_counts") == {"host"}
    assert places("test_slow_writers_are_let_go") == {"waits"}
    assert places("test_exit_137_is_not_out_of_memory") == {"uml"}
    assert places("test_reports_and_sessions_are_there_after_a_restart") == {"host", "uml"}
    assert places("test_psi_is_read_with_its_units") == {"host", "programs"}
    assert places("test_the_allowance_ends") == {"programs"}
    assert places("test_three_calls_that_do_not_fit_together_all_end_well") == {"uml", "programs"}
    assert places("test_cpu_max_is_kept") == {"sched"}
    assert places("test_pid1_is_systemd") == {"systemd"}
    assert places("test_they_are_pinned_taken_over_and_gone_with_the_service") == {"pins"}


def test_native_says_what_it_leaves_out() -> None:
    suites, left_out = plan("native", systemd_here=False)
    assert [suite.place for suite in suites] == ["native"]
    assert "systemd" in left_out[0]
    suites, left_out = plan("native", systemd_here=True)
    assert [suite.name for suite in suites] == ["host", "systemd"]
    assert left_out == []


def test_options_go_to_pytest(suite: Suite) -> None:
    assert suite.argv(["-x"])[-2:] == ["-x", "tests/unit"]
