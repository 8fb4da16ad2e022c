"""The daemon and its CPU scheduler: who is scheduled by it, what is told of it, and what happens
when the kernel takes it away or has another one."""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import abi, sched
from agentcgroupd.bpf.btf import Btf
from agentcgroupd.bpf.generate import OBJECTS
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.bpf.sched import Scheduler
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.config import CpuConfig
from agentcgroupd.cpu.scheduling import CpuScheduling
from agentcgroupd.policy.schema import Policy
from agentcgroupd.sessions.pool import Pool, offered_controllers
from agentcgroupd.telemetry.metrics import Metrics
from tests.conftest import StartDaemon
from tests.guest.cpu_load import SCHED_EXT, SETTINGS
from tests.harness import DaemonProcess, patient, wait_until

pytestmark = [
    pytest.mark.controllers,
    pytest.mark.programs,
    pytest.mark.usefixtures("needs_sched_ext"),
]

CONFIG = """[[boundaries.rules]]
program = ["true"]
begins_call = false
[[boundaries.rules]]
program = ["*"]
[cpu]
exec_hold = "1s"
stall_timeout = "2s"
wait_max = "1s"
retries = 1
retry_after = "500ms"
[guard]
enabled = false
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon for all tests here, in their order: a start takes seconds."""
    daemon = DaemonProcess(tmp_path_factory.mktemp("cpu"), CONFIG)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(scope="module")
def agent(daemon: DaemonProcess) -> Any:
    """A process in the agent leaf."""
    return daemon.open("web")


def is_ours() -> bool:
    """Whether the kernel has the daemon's scheduler."""
    return sched.running().startswith(sched.NAME)


def policy_of(pid: int) -> int:
    """Scheduling policy of a process."""
    return os.sched_getscheduler(pid)


def control_of_the_daemon() -> abi.SchedControl:
    """The scheduler's settings and counts in the kernel, mapped as the daemon has them."""

    class Info(ctypes.Structure):
        """struct bpf_map_info, up to the name."""

        _fields_ = (("words", ctypes.c_uint32 * 6), ("name", ctypes.c_char * 16))

    call, number = libbpf().call, ctypes.c_uint32(0)
    found = None  # the newest: of a daemon that was killed, a test that failed may have a map
    while call("bpf_map_get_next_id", number, ctypes.byref(number)) == 0:
        fd = call("bpf_map_get_fd_by_id", number)
        info, size = Info(), ctypes.c_uint32(ctypes.sizeof(Info))
        libbpf().check("map", "bpf_obj_get_info_by_fd", fd, ctypes.byref(info), ctypes.byref(size))
        if info.name == b"sched.bss":
            place, _ = Btf.of_file(OBJECTS / "sched.bpf.o").variables(".bss")["control"]
            pages = mmap.mmap(fd, -(-info.words[3] // mmap.PAGESIZE) * mmap.PAGESIZE)
            found = abi.SchedControl.from_buffer(pages, place)
        os.close(fd)
    assert found is not None, "no scheduler is loaded"
    return found


def test_what_enters_is_scheduled_by_it(daemon: DaemonProcess, agent: Any) -> None:
    """The agent, its calls and all their children; and nobody else."""
    assert is_ours()
    assert agent.run("result = 1 + 1") == 2
    assert policy_of(agent.process.pid) == SCHED_EXT
    assert policy_of(os.getpid()) == os.SCHED_OTHER
    assert daemon.process is not None and policy_of(daemon.process.pid) == os.SCHED_OTHER
    found = agent.run("""
code = "import os; print(os.sched_getscheduler(0)); os.fork() or os._exit(os.sched_getscheduler(0))"
done = agent.run([sys.executable, "-c", code], capture_output=True, text=True)
result = done.stdout.split()
""")
    assert set(found) == {str(SCHED_EXT)}


def test_the_report_tells_what_it_did(daemon: DaemonProcess, agent: Any) -> None:
    """A call with half a CPU is told how long it waited; the session's numbers hold the call's."""
    report = agent.run("""
done = agent.run(["sh", "-c", "i=0; while [ $i -lt 9000 ]; do i=$((i+1)); done"], cpu_max="0.5")
result = done.report.to_dict()
""")
    cpu = report["cpu"]
    assert cpu["run_usec"] == pytest.approx(report["cpu_usage_usec"], rel=0.1, abs=20_000)
    assert cpu["slices"] > 5 and cpu["wait_usec"] >= cpu["wait_max_usec"] > 0
    assert cpu["stalls"] > 3 and cpu["stalled_usec"] > 100_000
    assert report["cpu_throttled_usec"] >= cpu["stalled_usec"]
    assert cpu["run_usec"] / report["wall_usec"] < 0.6
    (session,) = daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions
    assert session.cpu.run_usec > cpu["run_usec"] and session.cpu.slices > cpu["slices"]


def test_the_escape_is_closed(daemon: DaemonProcess, agent: Any) -> None:
    """A process that sets SCHED_OTHER would go before all others; the daemon puts it back."""
    pid = agent.process.pid
    agent.run("import os; os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)); result = 0")
    assert policy_of(pid) == os.SCHED_OTHER
    wait_until("it is put back", lambda: policy_of(pid) == SCHED_EXT)


def test_an_adopted_cgroup_is_given_back(daemon: DaemonProcess) -> None:
    """Processes of an adopted cgroup become SCHED_EXT, and what they were when it is given back."""
    path = cgroup2_mount() / f"{daemon.pool_path.strip('/')}-container"
    path.mkdir()
    process = subprocess.Popen(["sleep", "1000"])
    try:
        (path / "cgroup.procs").write_text(str(process.pid))
        spec = pb.SessionSpec(id="container")
        request = pb.AdoptSessionRequest(cgroup_path=f"/{path.name}", spec=spec)
        daemon.admin.AdoptSession(request)
        assert policy_of(process.pid) == SCHED_EXT
        daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="container"))
        assert policy_of(process.pid) == os.SCHED_OTHER
    finally:
        process.kill()
        process.wait()
        path.rmdir()


WHERE = """
began = time.monotonic()
places = [
    subprocess.run([program, "/proc/self/cgroup"], capture_output=True, text=True).stdout
    for _ in range(times)
]
result = places, time.monotonic() - began
"""


def test_a_tool_is_in_its_call_before_its_first_instruction(
    daemon: DaemonProcess, agent: Any
) -> None:
    """The program waits at its exec until the daemon has moved it, which an emulated CPU beside
    other work may not do in the whole second: that is counted."""
    control = control_of_the_daemon()
    held, over = control.held_at_exec, control.exec_holds_over
    places, _ = agent.run(WHERE, program="/bin/cat", times=8)
    outside = [place for place in places if "/call-" not in place]
    assert len(outside) <= control.exec_holds_over - over < 3
    assert control.held_at_exec > held, "not all: some are moved before they wait"


@patient
def test_a_program_that_begins_no_call_is_let_go(daemon: DaemonProcess, agent: Any) -> None:
    """The program does not wait until the time is over."""
    control = control_of_the_daemon()
    held, over = control.held_at_exec, control.exec_holds_over
    agent.run(WHERE, program="/bin/true", times=8)
    assert control.held_at_exec > held, "not all: some are decided on before they wait"
    assert control.exec_holds_over == over, "none of them for the whole second"


def test_a_daemon_that_stands_still_holds_nobody_for_long(
    daemon: DaemonProcess, agent: Any
) -> None:
    """A program goes on after `cpu.exec_hold` where it is; the daemon moves it when it goes on."""
    control = control_of_the_daemon()
    over = control.exec_holds_over
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        (place,), took_s = agent.run(WHERE, program="/bin/cat", times=1)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert place.strip().endswith("/agent") and took_s >= 1
    assert control.exec_holds_over == over + 1


def test_a_killed_daemon_takes_it_along(daemon: DaemonProcess, agent: Any) -> None:
    """The kernel lets go of it, its tasks go on in the fair class, and the next daemon has it
    again."""
    daemon.kill()
    wait_until("the kernel has none", lambda: sched.running() == "")
    assert agent.run("result = 1 + 1") == 2
    assert policy_of(agent.process.pid) == SCHED_EXT, "it says so, and means the fair class"
    daemon.start()
    assert is_ours()
    assert agent.run("result = 1 + 1") == 2
    (session,) = daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions
    assert session.cpu.run_usec > 0, "it is told of what was there"


def has_said(daemon: DaemonProcess, times: int) -> bool:
    """Whether the daemon has told so many times that a stall was the end of it."""
    said = "instead: the kernel's own scheduler"
    lines = [line for line in daemon.log.read_text().splitlines() if said in line]
    return len([line for line in lines if "let go of it: runnable task stall" in line]) == times


def test_a_stalled_scheduler_is_ejected_and_tried_again(daemon: DaemonProcess, agent: Any) -> None:
    """The kernel ejects a scheduler that gives no task a CPU; the daemon says why, does
    without, tries again as often as it may, and then no more."""
    limit = daemon.cgroup_dir / "web/cpu.weight"
    for attempt in (1, 2):
        control_of_the_daemon().stall_on_purpose = 1
        began = time.monotonic()
        assert agent.run("result = 1 + 1") == 2, "it waits for the fair class"
        assert 1.5 < time.monotonic() - began < 2 + 8
        wait_until("it is said", partial(has_said, daemon, attempt))
        assert limit.read_text() == "100\n", "weights hold in the fair class too"
        if attempt == 1:
            wait_until("it is tried again", is_ours)
    given_up = "not tried again: it failed 2 times"
    wait_until("it is given up", lambda: given_up in daemon.log.read_text())
    assert sched.running() == ""
    assert agent.run("result = agent.run(['true']).report.cpu") is None


def test_someone_elses_scheduler_is_left_alone(daemon: DaemonProcess) -> None:
    """The daemon's part does without beside it, and says whose it is; so does doctor."""

    async def try_beside() -> None:
        # The daemon has this pool: it is looked at, not claimed.
        top = Cgroup.open(daemon.cgroup_dir)
        controllers = offered_controllers(top)
        pool = Pool(top, cgroup2_mount(), daemon.pool_path, controllers, None, 2000)
        cpu = CpuScheduling(CpuConfig(), None, Metrics(), lambda: Policy().cpu, pool, lambda: ())
        state = cpu.open(None, True)
        assert not state.works and state.remedy == "stop it, or leave the CPU to it"
        assert state.reason == f"another sched_ext scheduler runs here: {sched.running()}"
        cpu.check()
        assert cpu.numbers(pool.cgroup.id) is None

    other = Scheduler.load(replace(SETTINGS, name="somebody"))
    try:
        other.attach()
        assert sched.running().startswith("somebody")
        asyncio.run(try_beside())
        assert "another sched_ext scheduler runs here: somebody" in sched.try_here().reason
        assert other.ending() is None
    finally:
        other.close()
    wait_until("the kernel has none", lambda: sched.running() == "")
    assert Path("/sys/kernel/sched_ext/state").read_text() == "disabled\n"


THROTTLE = """name = "throttle"
[[rulesets]]
name = "throttle"
when = [{ detector = "pool_free", below = "60%", until = "70%" }]
do = { action = "throttle", slack = "8M" }
"""
GROW = """
tool = subprocess.Popen([EXEC, "--name", name, "--", sys.executable, "-S", "-c", script],
                        stdin=subprocess.PIPE)
"""
SCRIPT = """
import mmap, time
block, part = mmap.mmap(-1, SIZE << 20), bytes(1 << 16)
for place in range(0, SIZE << 20, len(part)):
    block[place : place + len(part)] = part
    if place % (1 << 20) == 0:
        time.sleep(PAUSE)
"""


def test_without_swap_the_policy_throttles_by_cpu(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """What takes memory beside a more important call is told to the scheduler, which slows it; it
    goes on all the same, and memory.high is left as it was granted."""
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        pytest.skip("this machine has swap")
    (tmp_path / "throttle.toml").write_text(THROTTLE)
    daemon = start_daemon(
        f'[pool]\nmemory_max = "300M"\n[policy]\npath = "{tmp_path}/throttle.toml"\n'
        "[guard]\ncredit = false\n[cpu]\n"
    )
    vip, batch = daemon.open("vip", priority="important"), daemon.open("b", priority="batch")
    vip.run(GROW, name="vip", script=f"SIZE, PAUSE = 60, 0.1\n{SCRIPT}")
    batch.run(GROW, name="greedy", script=f"SIZE, PAUSE = 180, 0.0\n{SCRIPT}")
    assert batch.run("result = tool.wait()") == 0 == vip.run("result = tool.wait()")
    wait_until("all have ended", lambda: not daemon.call_dirs())
    reports = {r.name: r for r in daemon.admin.ListReports(pb.ListReportsRequest()).reports}
    greedy = reports["greedy"]
    assert greedy.cpu.penalties > 0 and greedy.cpu.penalty_usec > 0
    assert greedy.memory_high_events == 0
    assert reports["vip"].cpu.penalties == 0
    entries = [json.loads(line) for line in daemon.audit_lines()]
    told = [e for e in entries if e["event"] == "throttle"]
    assert told and all(e["session"] == "b" for e in told)
    assert "less CPU time the more it grows" in told[0]["why"]
    assert "unthrottle" in {e["event"] for e in entries}
