"""How `make test` plans its suites and counts what they did."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import run


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> run.Suite:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    return run.Suite("one", ("tests/unit",), "native", 60)


def results(suite: run.Suite, **counts: int) -> None:
    attributes = " ".join(f'{name}="{count}"' for name, count in counts.items())
    suite.results.write_text(f"<testsuites><testsuite {attributes}/></testsuites>")


def test_counts(suite: run.Suite) -> None:
    results(suite, tests=10, failures=1, errors=1, skipped=3)
    totals = run.Totals()
    totals.add(suite, 1)
    assert str(totals) == "5 passed, 2 failed, 3 skipped"
    assert totals.broken == []


def test_no_results_is_a_failure(suite: run.Suite) -> None:
    totals = run.Totals()
    totals.add(suite, 125)
    assert str(totals) == "0 passed, 1 failed, 0 skipped"
    assert totals.broken == ["one: no results, exit status 125"]


def test_nothing_collected_is_a_failure(suite: run.Suite) -> None:
    results(suite, tests=0, failures=0, errors=0, skipped=0)
    totals = run.Totals()
    totals.add(suite, 5)
    assert totals.broken == ["one: collected no tests"]


def test_a_bad_status_is_a_failure_whatever_was_counted(suite: run.Suite) -> None:
    results(suite, tests=3, failures=0, errors=0, skipped=0)
    totals = run.Totals()
    totals.add(suite, 137)
    assert totals.failed == 1
    assert totals.broken == ["one: exit status 137"]


def test_the_guest_does_what_the_host_cannot() -> None:
    lanes, left_out = run.plan("guest", systemd_here=False)
    names = [[suite.name for suite in lane] for lane in lanes]
    assert names == [["host", "kernel"], ["guest", "systemd", "cpu"]]
    assert left_out == []
    host, kernel, guest, systemd, cpu = [suite for lane in lanes for suite in lane]
    assert "tests.guest.vm" not in host.argv()
    assert "tests.guest.vm" in guest.argv()
    assert "tests.guest.vm" in kernel.argv()
    assert "--systemd" in systemd.argv()
    # What one leaves out the other has.
    assert [f"--ignore={path}" for path in cpu.paths] == list(guest.paths[1:])
    assert guest.limit_sec < 50 * 60
    assert all(Path(path).is_file() for path in (*run.CPU, *run.ANY_KERNEL))


def test_native_says_what_it_leaves_out() -> None:
    lanes, left_out = run.plan("native", systemd_here=False)
    assert [suite.where for lane in lanes for suite in lane] == ["native"]
    assert "systemd" in left_out[0]
    lanes, left_out = run.plan("native", systemd_here=True)
    assert [suite.name for lane in lanes for suite in lane] == ["host", "systemd"]
    assert left_out == []


def test_options_go_to_pytest(suite: run.Suite) -> None:
    assert suite.argv(["-x"])[-2:] == ["-x", "tests/unit"]
