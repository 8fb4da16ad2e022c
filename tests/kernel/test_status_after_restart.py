"""An exit status that a daemon has seen is known to the next one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import CgroupGone
from tests.conftest import StartDaemon
from tests.harness import SLOW, DaemonProcess, wait_until

START = """
tool = subprocess.Popen(
    [EXEC, "--name", "tool", *options, "--", "sh", "-c", script, EXEC], stdout=subprocess.DEVNULL
)
result = tool.wait()
"""
HELD = """
call_id = stub.BeginCall(pb.BeginCallRequest(name="tool")).id
result = subprocess.call([EXEC, "--call", call_id, "--", "sh", "-c", "exit 3"])
"""
END = """
result = stub.EndCall(pb.EndCallRequest(call_id=call_id), wait_for_ready=True).SerializeToString()
"""
UPDATE = """
(call,) = stub.ListCalls(pb.ListCallsRequest(), wait_for_ready=True).calls
stub.UpdateIntent(pb.UpdateIntentRequest(call_id=call.id, intent=pb.Intent(timeout="1h")))
"""
KEEP = ("--leftovers", "keep")


@pytest.fixture
def fresh(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon that a test may kill, whose patience with leftovers is long enough for that."""
    grace = f"leftovers_grace = '{SLOW}s'\nterm_grace = '{SLOW}s'\n"
    return start_daemon(f"[calls]\n{grace}")


def kept(daemon: DaemonProcess) -> dict[str, dict[str, object]]:
    """What the daemon keeps of each open call, by name."""
    found = {}
    for directory in [*daemon.call_dirs(), *daemon.cgroup_dir.glob("*/call-*/call-*")]:
        try:
            cgroup = Cgroup.open(directory)
        except FileNotFoundError:
            continue  # it has ended meanwhile
        try:
            if written := cgroup.get_xattr():  # its cgroup comes before its record
                record = json.loads(written)
                found[record["name"]] = record
        except CgroupGone:
            continue
        finally:
            cgroup.close()
    return found


def seen(daemon: DaemonProcess, status: int) -> None:
    """Wait until the daemon keeps how the tool ended."""
    wait_until(
        "the daemon has seen it", lambda: kept(daemon)["tool"]["status"] == [status << 8, None]
    )


def killed(daemon: DaemonProcess) -> None:
    daemon.kill()


def stopped(daemon: DaemonProcess) -> None:
    daemon.stop()


def ended(daemon: DaemonProcess) -> pb.Report:
    """The report of the tool's call, ended by the operator if it is still open."""
    for call in daemon.admin.ListCalls(pb.ListCallsRequest()).calls:
        daemon.admin.EndCall(pb.EndCallRequest(call_id=call.id))
    reports = daemon.admin.ListReports(pb.ListReportsRequest(limit=10)).reports
    return next(report for report in reports if report.name == "tool")


@pytest.mark.parametrize("away", [killed, stopped])
def test_that_of_a_call_whose_leftovers_are_kept(
    fresh: DaemonProcess, away: Callable[[DaemonProcess], None]
) -> None:
    agent = fresh.open("alpha")
    script = "sleep 1000 >/dev/null 2>&1 & exit 5"
    assert agent.run(START, script=script, options=KEEP) == 5
    seen(fresh, 5)
    away(fresh)
    fresh.start()
    report = ended(fresh)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 5)
    assert report.evidence == pb.EVIDENCE_KERNEL
    assert "1 process that it had left running was ended by the operator" in report.sentence


def test_that_of_a_command_in_a_held_call(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    assert agent.run(HELD) == 3
    seen(fresh, 3)
    fresh.kill()
    fresh.start()
    report = pb.Report.FromString(agent.run(END))
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 3)
    assert report.evidence == pb.EVIDENCE_KERNEL


@pytest.mark.waits
@pytest.mark.parametrize("moment", ["in the grace", "after SIGTERM"])
def test_that_of_a_call_whose_leftovers_are_being_ended(
    fresh: DaemonProcess, tmp_path: Path, moment: str
) -> None:
    agent, ready, told = fresh.open("alpha"), tmp_path / "ready", tmp_path / "told"
    deaf = f"(trap 'echo > {told}' TERM; echo > {ready}; while :; do sleep 0.05; done)"
    script = f"{deaf} & until [ -e {ready} ]; do sleep 0.02; done; exit 5"
    assert agent.run(START, script=script, options=[]) == 5
    seen(fresh, 5)
    if moment == "after SIGTERM":
        wait_until("SIGTERM was sent", told.exists)
    fresh.kill()
    fresh.start()
    wait_until("the call has ended", lambda: not fresh.call_dirs(), 20)
    report = ended(fresh)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 5)
    assert pb.FEEDBACK_CODE_LEFTOVERS in [f.code for f in report.feedback]


def test_that_of_a_call_that_went_on_as_another_one(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    script = 'sleep 1000 >/dev/null 2>&1 & exec "$0" --name other -- sh -c "exit 9"'
    assert agent.run(START, script=script, options=KEEP) == 9
    seen(fresh, 9)
    wait_until("the other one is over", lambda: set(kept(fresh)) == {"tool"})
    fresh.kill()
    fresh.start()
    report = ended(fresh)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_OK, 9)
    assert "exit status 9" in report.sentence


def test_one_that_nobody_saw_stays_unknown_over_two_restarts(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    go = fresh.directory / "go"
    script = f"sleep 1000 >/dev/null 2>&1 & until [ -e {go} ]; do sleep 0.02; done; exit 5"
    start = START.replace("result = tool.wait()", "")
    agent.run(start, script=script, options=KEEP)
    wait_until("it has entered", lambda: any(call["main"] for call in kept(fresh).values()))
    fresh.kill()
    go.touch()
    agent.run("tool.wait()")
    for _ in range(2):
        fresh.start()
        agent.run(UPDATE)  # which has the record written anew, without that process
        fresh.kill()
    fresh.start()
    report = ended(fresh)
    assert report.verdict == pb.VERDICT_UNKNOWN
    assert "the daemon was not there to see it" in report.sentence
    assert "1 process that it had left running was ended by the operator" in report.sentence
