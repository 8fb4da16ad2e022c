"""Calls inside calls whose main process has left its cgroup: they end with the outer one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup
from tests.harness import SLOW, AgentProcess, DaemonProcess, wait_until
from tests.kernel.test_nesting import both_reports, calls, nested_feedback

START = """
tool = subprocess.Popen([EXEC, "--name", "outer", *options, "--", "sh", "-c", script, EXEC, inner])
"""
ORPHAN = '(setsid "$0" --name inner -- sh -c "$1" &); '
CHILD = '"$0" --name inner -- sh -c "$1"; '


@pytest.fixture
def elsewhere(daemon: DaemonProcess) -> Iterator[Path]:
    """A cgroup that is not the daemon's."""
    path = daemon.cgroup_dir.with_name(f"{daemon.cgroup_dir.name}-elsewhere")
    path.mkdir()
    try:
        yield path
    finally:
        cgroup = Cgroup.open(path)
        cgroup.kill_and_remove()
        cgroup.close()


def start(
    daemon: DaemonProcess,
    agent: AgentProcess,
    elsewhere: Path,
    script: str,
    then: str = "exec sleep 1000",
    options: tuple[str, ...] = (),
) -> dict[str, pb.Call]:
    """Start a call with one inside it, whose main process leaves for elsewhere; returns both."""
    inner = f"echo $$ > {elsewhere}/cgroup.procs; {then}"
    agent.run(START, script=script, inner=inner, options=list(options))
    wait_until("it has left", lambda: bool((elsewhere / "cgroup.procs").read_text()))
    return calls(daemon)


def by_operator(daemon: DaemonProcess, outer: pb.Call) -> None:
    daemon.admin.EndCall(pb.EndCallRequest(call_id=outer.id))


def by_timeout(daemon: DaemonProcess, outer: pb.Call) -> None:
    wait_until("its timeout has passed", lambda: not calls(daemon))


@pytest.mark.parametrize("script", [ORPHAN, CHILD], ids=["orphan", "child"])
@pytest.mark.parametrize("end", [by_operator, by_timeout])
def test_it_ends_with_the_outer_call(
    daemon: DaemonProcess,
    agent: AgentProcess,
    elsewhere: Path,
    script: str,
    end: Callable[[DaemonProcess, pb.Call], None],
) -> None:
    options = ("--timeout", f"{1.5 * SLOW}") if end is by_timeout else ()
    found = start(daemon, agent, elsewhere, f"{script} sleep 1000", options=options)
    end(daemon, found["outer"])
    outer, inner = both_reports(daemon, "outer", "inner")
    assert not (elsewhere / "cgroup.procs").read_text()
    assert inner.verdict == pb.VERDICT_CANCELLED
    assert f"it ended with call {outer.call_id}" in inner.sentence
    assert any("A call inside was ended with it" in text for text in nested_feedback(outer))


def test_it_ends_with_its_session(daemon: DaemonProcess, elsewhere: Path) -> None:
    agent = daemon.open("nest-elsewhere")
    start(daemon, agent, elsewhere, f"{ORPHAN} sleep 1000")
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="nest-elsewhere"))
    assert not (elsewhere / "cgroup.procs").read_text()
    entries = [json.loads(line) for line in daemon.audit_lines()]
    ended = [entry["report"] for entry in entries if entry["event"] == "call_ended"][-2:]
    assert {report["name"] for report in ended} == {"inner", "outer"}
    assert {report["verdict"] for report in ended} == {"VERDICT_CANCELLED"}


def test_the_outer_call_stays_open_around_it(
    daemon: DaemonProcess, agent: AgentProcess, elsewhere: Path, tmp_path: Path
) -> None:
    go_on = tmp_path / "go-on"
    then = f"until [ -e {go_on} ]; do sleep 0.05; done; exit 4"
    start(daemon, agent, elsewhere, f"{ORPHAN} sleep 0.5; exit 0", then)
    assert agent.run("result = tool.wait()") == 0
    (directory,) = (path for path in daemon.call_dirs() if "outer" in record(path))
    wait_until("it is empty", lambda: "populated 0" in (directory / "cgroup.events").read_text())
    assert set(calls(daemon)) == {"outer", "inner"}
    go_on.touch()
    outer, inner = both_reports(daemon, "outer", "inner")
    assert (outer.verdict, inner.verdict, inner.exit_code) == (
        pb.VERDICT_OK,
        pb.VERDICT_FAILED,
        4,
    )


def record(directory: Path) -> str:
    """What the daemon keeps on a call's cgroup."""
    cgroup = Cgroup.open(directory)
    try:
        return (cgroup.get_xattr() or b"").decode()
    finally:
        cgroup.close()


def test_a_move_into_the_outer_calls_own_cgroup_is_no_end(
    daemon: DaemonProcess, agent: AgentProcess, elsewhere: Path
) -> None:
    main = f"{daemon.cgroup_dir}/alpha/call-*/main/cgroup.procs"
    then = f"echo $$ > {main}; trap '' TERM; while :; do sleep 0.1; done"
    script = f"trap '' TERM; {CHILD} sleep 1000"
    start(daemon, agent, elsewhere, script, then, ("--timeout", f"{1.5 * SLOW}"))
    outer, inner = both_reports(daemon, "outer", "inner")
    assert outer.verdict == pb.VERDICT_TIMEOUT
    assert inner.verdict == pb.VERDICT_CANCELLED and inner.term_signal == 9
    assert any("A call inside was ended with it" in text for text in nested_feedback(outer))
