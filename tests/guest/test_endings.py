"""Ends of calls where limits are kept: at each level, of the main process or of another."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import cgroup2_mount
from agentcgroupd.host import zram
from tests.conftest import StartDaemon
from tests.harness import EXEC, SLOW, AgentProcess, DaemonProcess, wait_until

pytestmark = pytest.mark.controllers

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB = 1 << 20
SPAWN = """
done = subprocess.run([EXEC, *options, "--", *argv], capture_output=True, text=True)
result = (done.returncode, done.stdout + done.stderr)
"""
GROW = f"echo 1 {100 * MIB} 0 | {LOAD}"
"""Takes 100 MiB at once; needs no quoting."""
HERE = f"here={cgroup2_mount()}$(sed -n 's/^0:://p' /proc/self/cgroup)\n"
NESTED = (
    HERE
    + """
mkdir $here/main $here/job
echo $$ > $here/main/cgroup.procs
echo '+memory +pids' > $here/cgroup.subtree_control
inside() { sh -c "echo \\$\\$ > $here/job/cgroup.procs; exec sh -c '$1'"; }
"""
)
"""Makes cgroups below the call, as a container's runtime does; `inside` runs a script in `job`."""


@pytest.fixture(scope="module")
def daemon(start_module_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with a pool of 512 MiB whose guard is off: what is shown here is the kernel's."""
    daemon = start_module_daemon('[pool]\nmemory_max = "512M"\n[guard]\nenabled = false\n')
    daemon.forks_agents = False
    return daemon


@pytest.fixture(scope="module")
def agent(daemon: DaemonProcess) -> AgentProcess:
    """An agent whose session may use 300 MiB."""
    return daemon.open("alpha", memory_max="300M", pids_max="200")


def run(agent: AgentProcess, script: str, **options: str) -> tuple[int, str]:
    """Run a shell script in a call of its own: its exit status, negative for a signal, and what it
    wrote."""
    words = [word for name, value in options.items() for word in (f"--{_option(name)}", value)]
    status, text = agent.run(SPAWN, options=words, argv=["sh", "-c", script])
    return status, text


def _option(name: str) -> str:
    return name.replace("_", "-")


def last(daemon: DaemonProcess) -> pb.Report:
    """The newest report, once all calls have ended."""
    wait_until("all calls have ended", lambda: not daemon.call_dirs())
    return daemon.admin.GetReport(pb.GetReportRequest())


def codes(report: pb.Report) -> list[str]:
    """The names of a report's feedback."""
    return [pb.FeedbackCode.Name(f.code).removeprefix("FEEDBACK_CODE_") for f in report.feedback]


# Out of memory below the call


def test_a_child_out_of_memory_in_a_cgroup_of_the_tools_own(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = f"{NESTED} echo {30 * MIB} > $here/job/memory.max; inside '{GROW}'; echo done $?"
    status, text = run(agent, script, memory_max="150M")
    assert status == 0 and "done 137" in text
    report = last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_OK, 0)
    assert report.oom_kills >= 1
    assert "not its main process: the cgroup 'job' that the tool made" in report.sentence
    assert "30 MiB" in report.sentence
    assert codes(report) == ["OOM"]
    levels = {fact.level for fact in report.facts if fact.source == "memory.events.local"}
    assert levels == {pb.LEVEL_NESTED}


def test_a_tool_that_reports_its_childs_end_has_failed(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = f"{NESTED} echo {30 * MIB} > $here/job/memory.max; inside '{GROW}' || exit 2"
    assert run(agent, script, memory_max="150M")[0] == 2
    report = last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_FAILED, 2)
    assert "It ended with exit status 2. The kernel's OOM killer ended" in report.sentence
    assert "no limit of agentcgroup" not in report.sentence


def test_a_main_process_out_of_memory_in_a_cgroup_of_the_tools_own(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = (
        f"{NESTED} echo {30 * MIB} > $here/job/memory.max; echo $$ > $here/job/cgroup.procs; "
        f"echo '1 {100 * MIB} 0' > /tmp/schedule; exec {LOAD} < /tmp/schedule"
    )
    assert run(agent, script, memory_max="150M")[0] == -signal.SIGKILL
    report = last(daemon)
    assert report.verdict == pb.VERDICT_OOM_CALL
    assert "the cgroup 'job' that the tool made below its call reached its own" in report.sentence


def test_a_cgroup_that_is_gone_is_not_taken_for_the_call(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = f"{NESTED} echo {30 * MIB} > $here/job/memory.max; inside '{GROW}'; rmdir $here/job"
    assert run(agent, script, memory_max="150M")[0] == 0
    report = last(daemon)
    assert report.verdict == pb.VERDICT_OK
    assert "a cgroup, gone since, that the tool made" in report.sentence


@pytest.mark.with_programs
def test_a_process_that_kills_itself_after_a_child_ran_out_of_memory(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = f"{NESTED} echo {30 * MIB} > $here/job/memory.max; inside '{GROW}'; kill -KILL $$"
    assert run(agent, script, memory_max="150M")[0] == -signal.SIGKILL
    report = last(daemon)
    assert report.verdict == pb.VERDICT_SIGNALED, report.sentence
    assert "by whom is not known" in report.sentence and "OOM killer ended" in report.sentence
    assert codes(report) == ["KILLED", "OOM"]


def test_a_child_out_of_memory_and_then_the_timeout(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = f"{NESTED} echo {30 * MIB} > $here/job/memory.max; inside '{GROW}'; exec sleep 1000"
    timeout = f"{1.5 * SLOW}"
    assert run(agent, script, memory_max="150M", timeout=timeout)[0] == -signal.SIGTERM
    report = last(daemon)
    assert report.verdict == pb.VERDICT_TIMEOUT
    assert codes(report) == ["TIMEOUT", "OOM"]
    assert "not its main process" in report.sentence


# Out of memory at the call's limit


def test_a_tool_that_has_its_children_killed_alone(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = f"{HERE} echo 0 > $here/memory.oom.group; {GROW}; exit 0"
    assert run(agent, script, memory_max="40M")[0] == 0
    report = last(daemon)
    assert (report.verdict, report.exit_code) == (pb.VERDICT_OK, 0)
    assert "not its main process: the call reached its own limit of 40 MiB" in report.sentence


def test_a_grandchild_takes_the_whole_call_along(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    status, _ = run(agent, f"sh -c '{GROW}; true' || true; exit 0", memory_max="40M")
    assert status == -signal.SIGKILL
    report = last(daemon)
    assert report.verdict == pb.VERDICT_OOM_CALL and "40 MiB" in report.sentence
    assert any("as a whole" in fact.what for fact in report.facts)


HELD = """
with agent.tool_call("build", memory_max="40M") as call:
    first = call.run(["sh", "-c", grow]).returncode
    # Who asked for too much has all of the call killed, and may come to the next command, too,
    # until it is gone itself.
    (here,) = [line[3:] for line in open("/proc/self/cgroup") if line.startswith("0::")]
    leaf = here.strip().removesuffix("agent") + "call-" + call.id
    deadline = time.monotonic() + 60
    while left := open("MOUNT" + leaf + "/cgroup.procs").read():
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    second = call.run(["sh", "-c", then]).returncode
result = (first, second, str(call.report.verdict), call.report.sentence,
          [f.sentence for f in call.report.feedback])
""".replace("MOUNT", str(cgroup2_mount()))


@pytest.mark.with_programs
def test_each_command_of_a_held_call_is_judged_by_itself(agent: AgentProcess) -> None:
    first, second, verdict, sentence, told = agent.run(HELD, grow=GROW, then="exit 0")
    assert (first, second, verdict, sentence) == (-9, 0, "ok", "It ended well.")
    assert len(told) == 1 and "before its last command" in told[0] and "40 MiB" in told[0]
    first, second, verdict, sentence, _ = agent.run(HELD, grow="exit 0", then=GROW)
    assert (first, second, verdict) == (0, -9, "oom_call")
    first, second, verdict, sentence, _ = agent.run(HELD, grow=GROW, then="kill -KILL $$")
    assert (first, second, verdict) == (-9, -9, "signaled")
    assert "by whom is not known" in sentence


# Above the call


def test_a_session_out_of_memory_says_what_holds_it(daemon: DaemonProcess) -> None:
    agent = daemon.open("big", memory_max="150M")
    agent.run(
        "early = subprocess.Popen([EXEC, '--', 'sh', '-c', 'read go; ' + grow],"
        " stdin=subprocess.PIPE)\n"
        "hold = bytearray(90 << 20)\n"
        "for at in range(0, len(hold), 4096): hold[at] = 1",
        grow=GROW,
    )
    budget = pb.Budget.FromString(
        agent.run("result = stub.GetBudget(pb.GetBudgetRequest()).SerializeToString()")
    )
    assert budget.memory_available_bytes < 60 * MIB
    assert "your own processes hold" in budget.sentence
    assert agent.run("early.communicate(b'go\\n'); result = early.returncode") == -signal.SIGKILL
    report = last(daemon)
    assert report.verdict == pb.VERDICT_OOM_SESSION
    assert "this session together reached its limit of 150 MiB" in report.sentence
    assert "the agent itself holds" in report.sentence
    assert "Let the agent hold less" in report.sentence


def test_files_that_outlive_their_call_count(daemon: DaemonProcess) -> None:
    agent = daemon.open("files", memory_max="150M")
    file = "/dev/shm/outlives"
    early = "early = subprocess.Popen([EXEC, '--', 'sh', '-c', 'read go; ' + grow], stdin=-1)"
    agent.run(early, grow=GROW)
    try:
        assert run(agent, f"head -c {80 * MIB} /dev/zero > {file}")[0] == 0
        wait_until("the writer has ended", lambda: len(daemon.call_dirs()) == 1)
        agent.run("time.sleep(1.1)")
        raw = agent.run("result = stub.GetBudget(pb.GetBudgetRequest()).SerializeToString()")
        budget = pb.Budget.FromString(raw)
        assert budget.memory_available_bytes < 70 * MIB
        assert "files in tmpfs or /dev/shm whose call has ended hold 80 MiB" in budget.sentence
        raw = agent.run(
            "call = stub.BeginCall(pb.BeginCallRequest(name='x', intent=pb.Intent("
            "memory_max='140M')))\n"
            "stub.EndCall(pb.EndCallRequest(call_id=call.id))\n"
            "result = call.SerializeToString()"
        )
        grant = pb.Call.FromString(raw).grant
        assert budget.memory_available_bytes <= grant.memory_max_bytes < 70 * MIB
        assert "files in tmpfs or /dev/shm" in grant.advice[0]
        assert agent.run("early.communicate(b'go\\n'); result = early.returncode") == -9
        report = last(daemon)
    finally:
        Path(file).unlink(missing_ok=True)
    assert report.verdict == pb.VERDICT_OOM_SESSION
    assert "files in tmpfs or /dev/shm whose call has ended hold 80" in report.sentence
    assert "Remove such files" in report.sentence


# Processes and swap


FORKS = "i=0; while [ $i -lt 30 ]; do sleep 30 & i=$((i+1)); done 2>/dev/null; exit 0"


def test_processes_refused_at_the_calls_limit(daemon: DaemonProcess, agent: AgentProcess) -> None:
    run(agent, FORKS, pids_max="10", timeout=f"{3 * SLOW}")
    report = last(daemon)
    told = next(f for f in report.feedback if f.code == pb.FEEDBACK_CODE_PIDS_LIMIT)
    assert "the call may have 10" in told.sentence and told.numbers["pids_max"] == 10


def test_processes_refused_at_the_sessions_limit(daemon: DaemonProcess) -> None:
    agent = daemon.open("few", pids_max="12")
    run(agent, FORKS, timeout=f"{3 * SLOW}")
    report = last(daemon)
    told = [f for f in report.feedback if f.code == pb.FEEDBACK_CODE_PIDS_LIMIT]
    assert len(told) == 1 and told[0].numbers["pids_max"] == 12
    assert "all of the session together may have 12" in told[0].sentence


def test_processes_refused_in_a_cgroup_of_the_tools_own(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    script = f"{NESTED} echo 3 > $here/job/pids.max; inside '{FORKS}'; true"
    run(agent, script, timeout=f"{3 * SLOW}")
    report = last(daemon)
    told = [f for f in report.feedback if f.code == pb.FEEDBACK_CODE_PIDS_LIMIT]
    assert len(told) == 1 and told[0].numbers["pids_max"] == 3
    assert "the cgroup 'job' that the tool made below its call may have 3" in told[0].sentence


@pytest.fixture
def swap() -> Iterator[None]:
    """Swap on a device in memory."""
    if reason := zram.unavailable():
        pytest.skip(reason)
    zram.prepare(64 * MIB, 64 * MIB)
    yield
    zram.prepare("off", 0)


@pytest.mark.usefixtures("swap")
def test_swap_refused_at_the_sessions_limit_is_told(daemon: DaemonProcess) -> None:
    agent = daemon.open("swapless", memory_max="200M")
    (daemon.cgroup_dir / "swapless" / "memory.swap.max").write_text(str(4 * MIB))
    assert run(agent, GROW, memory_max="40M")[0] == -signal.SIGKILL
    report = last(daemon)
    assert report.verdict == pb.VERDICT_OOM_CALL
    assert "its session had all the swap that it may have (4 MiB)" in report.sentence


# Held calls, and tools that leave

COMMANDS = """
call_id = stub.BeginCall(pb.BeginCallRequest(name="h", intent=pb.Intent(memory_max="40M"))).id
for script in scripts:
    subprocess.call([EXEC, "--call", call_id, "--", "sh", "-c", script])
result = stub.EndCall(pb.EndCallRequest(call_id=call_id, reason=1)).SerializeToString()
"""


def test_an_earlier_commands_oom_kill_is_not_the_last_ones(agent: AgentProcess) -> None:
    report = pb.Report.FromString(agent.run(COMMANDS, scripts=[GROW, "kill -9 $$"]))
    assert report.verdict == pb.VERDICT_SIGNALED and report.oom_kills >= 1
    assert "memory.events counts no OOM kill since this command began" in report.sentence
    told = [f.sentence for f in report.feedback if f.code == pb.FEEDBACK_CODE_OOM]
    assert len(told) == 1 and "before its last command was started in it" in told[0]


def test_a_tool_out_of_memory_in_a_cgroup_that_it_left_for(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    """The kernel's log names it; the call's own counters say nothing."""
    elsewhere = daemon.cgroup_dir.with_name(f"{daemon.cgroup_dir.name}-elsewhere")
    elsewhere.mkdir()
    try:
        (elsewhere / "memory.max").write_text(str(30 * MIB))
        main = f"echo $$ > {elsewhere}/cgroup.procs; echo 1 {100 * MIB} 0 > $0; exec {LOAD} < $0"
        path = daemon.directory / "load"
        status, _ = agent.run(SPAWN, options=[], argv=["sh", "-c", main, str(path)])
        assert status == -signal.SIGKILL
        report = last(daemon)
        assert report.verdict == pb.VERDICT_OOM_HOST, report.sentence
        assert f"the kernel ended it in /{elsewhere.name}" in report.sentence
        assert set(codes(report)) == {"OOM", "LEFT_CALL"}
    finally:
        wait_until("it is empty", lambda: not (elsewhere / "cgroup.procs").read_text())
        elsewhere.rmdir()


@pytest.mark.parametrize("others", [0, 2])
def test_processes_that_are_ended_together_are_counted_once(
    daemon: DaemonProcess, agent: AgentProcess, others: int
) -> None:
    """The kernel counts the one that it chose twice."""
    start = "sleep 1000 & " * others
    inner = f"{start} exec {LOAD} < $0"
    path = daemon.directory / "load"
    path.write_text(f"1 {100 * MIB} 0\n")
    script = f"{EXEC} --name in --memory-max 30M -- sh -c '{inner}' {path}; exit 0"
    assert run(agent, script)[0] == 0
    report = last(daemon)
    assert report.verdict == pb.VERDICT_OK and report.oom_kills == 1 + others
    count = "1 process" if not others else f"{1 + others} processes"
    assert f"{count} of the call" in report.sentence
    assert f"ended {2 + others} " not in report.sentence
