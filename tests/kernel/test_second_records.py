"""A tool that removes the record of its call from the cgroup, and a daemon that is then killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import XATTR_NAME
from agentcgroupd.state.second_records import DIRECTORY
from tests.conftest import StartDaemon
from tests.harness import SLOW, AgentProcess, DaemonProcess, wait_until
from tests.kernel.test_endings import last

BEGIN = """
argv = [EXEC, "--name", "tool", *options, "--", "sh", "-c", script]
tool = subprocess.Popen(argv)
"""


@pytest.fixture
def fresh(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon that a test may kill."""
    return start_daemon("")


def without_record(
    daemon: DaemonProcess, agent: AgentProcess, script: str, *options: str, record: bytes = b""
) -> Path:
    """Start a tool in a call, and kill the daemon when that has lost its record, or has another in
    its place; returns the call's cgroup."""
    agent.run(BEGIN, script=script, options=list(options))
    wait_until("the launcher has become the tool", lambda: runs(daemon))
    (directory,) = daemon.call_dirs()
    if record:
        os.setxattr(directory, XATTR_NAME, record)
    else:
        os.removexattr(directory, XATTR_NAME)
    daemon.kill()
    return directory


def runs(daemon: DaemonProcess) -> bool:
    """Whether a call holds a process that is not the launcher any more."""
    for directory in daemon.call_dirs():
        for pid in (directory / "cgroup.procs").read_text().split():
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                return file.read().startswith(b"sh\0")
    return False


def copies(daemon: DaemonProcess) -> list[str]:
    """Ids of the calls that have a second record."""
    return [path.name for path in (daemon.run_dir / DIRECTORY).iterdir()]


@pytest.mark.parametrize(
    "record", [b"", b"no record", b'{"v":1,"kind":"call","id":"x"}', b'{"v":1,"kind":"session"}']
)
def test_the_call_is_found_with_all_that_it_was_granted(
    fresh: DaemonProcess, record: bytes
) -> None:
    agent = fresh.open("alpha")
    directory = without_record(fresh, agent, "sleep 1000", "--timeout", "500s", record=record)
    fresh.start()
    (call,) = fresh.admin.ListCalls(pb.ListCallsRequest()).calls
    assert (f"call-{call.id}", call.name) == (directory.name, "tool")
    assert call.grant.timeout_usec == 500_000_000
    assert os.getxattr(directory, XATTR_NAME) != record
    report = fresh.admin.EndCall(pb.EndCallRequest(call_id=call.id))
    assert report.verdict == pb.VERDICT_CANCELLED
    assert any("its record on its cgroup was gone" in fact.what for fact in report.facts)
    assert copies(fresh) == []


@pytest.mark.waits
def test_its_timeout_is_kept(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    seconds = 3 * SLOW
    without_record(fresh, agent, "sleep 1000", "--timeout", f"{seconds}s")
    fresh.start()
    assert agent.run("result = tool.wait()") == -signal.SIGTERM
    report = last(fresh)
    assert report.verdict == pb.VERDICT_TIMEOUT
    assert report.wall_usec >= seconds * 1e6


@pytest.mark.waits
def test_how_it_ended_is_known(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    without_record(fresh, agent, f"sleep {5 * SLOW}; exit 7")
    fresh.start()
    assert agent.run("result = tool.wait()") == 7
    report = last(fresh)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 7)


def test_a_call_inside_it_is_found_too(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    agent.run(BEGIN, script='exec "$0" --name inner -- sleep 1000', options=[])
    agent.run("tool.kill(); tool.wait()")
    wait_until("it has ended", lambda: not fresh.call_dirs())
    inner = '"$AGENTCG_EXEC" --name inner -- sleep 1000; exit 5'
    agent.run("os.environ['AGENTCG_EXEC'] = EXEC")
    agent.run(BEGIN, script=inner, options=[])
    wait_until("both run", lambda: len(list(fresh.cgroup_dir.glob("alpha/call-*/call-*"))) == 1)
    (outer,) = fresh.call_dirs()
    (nested,) = outer.glob("call-*")
    wait_until("it has entered", lambda: bool((nested / "cgroup.procs").read_text()))
    for directory in (outer, nested):
        os.removexattr(directory, XATTR_NAME)
    fresh.kill()
    fresh.start()
    names = {call.name: call for call in fresh.admin.ListCalls(pb.ListCallsRequest()).calls}
    assert set(names) == {"tool", "inner"}
    assert names["inner"].parent_call_id == names["tool"].id
    fresh.admin.EndCall(pb.EndCallRequest(call_id=names["tool"].id))
    assert not fresh.call_dirs()


def test_what_ended_meanwhile_leaves_no_copy(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    agent.run(BEGIN, script="exit 0", options=[])
    agent.run("tool.wait()")
    wait_until("it has ended", lambda: not fresh.call_dirs())
    wait_until("its copy is gone", lambda: not copies(fresh))
    agent.run(BEGIN, script="sleep 1000", options=[])
    wait_until("it runs", lambda: len(copies(fresh)) == 1 and runs(fresh))
    fresh.kill()
    agent.run("tool.kill(); tool.wait()")
    fresh.start()
    wait_until("it has ended", lambda: not fresh.call_dirs())
    wait_until("its copy is gone", lambda: not copies(fresh))


def test_a_cgroup_that_is_no_call_of_ours_is_left_alone(fresh: DaemonProcess) -> None:
    agent = fresh.open("alpha")
    agent.run("pass")
    fresh.kill()
    strange = fresh.cgroup_dir / "alpha/call-111111111111"
    strange.mkdir()
    (strange / "cgroup.procs").write_text(str(agent.process.pid))
    fresh.start()
    time.sleep(0.2)
    assert not fresh.admin.ListCalls(pb.ListCallsRequest()).calls
    assert agent.run("result = 1") == 1
