"""The daemon with GPUs: grants, the gate, the queue, quotas, time slices, faults, a restart.

NVML and MPS are stand-ins (tests/gpu_fakes.py), and device files have a major that no driver
answers; the kernel, the probes and the processes are real.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.gpu_fakes import DEVICES_MAJOR, GIB, SHARED_MAJOR, uuid_of, write_state
from tests.harness import EXEC, AgentProcess, DaemonProcess, RemoteRpcError, wait_until
from tests.standin import build

CONFIG = """
[gpu]
share = "turns"
sample = "50ms"
over_quota_after = "200ms"
context_allowance = "1M"
period = "100ms"
watch_launches = "all"
libraries = [{library!r}]
"""

NODES = {
    "nvidia0": (DEVICES_MAJOR, 0),
    "nvidia1": (DEVICES_MAJOR, 1),
    "nvidiactl": (DEVICES_MAJOR, 255),
    "uvm": (SHARED_MAJOR, 0),
}
"""Device files: name -> major and minor."""


class Machine:
    """A daemon with the stand-ins, and what these show."""

    def __init__(self, directory: Path, config: str = CONFIG) -> None:
        self.state_path = directory / "gpus.json"
        self.show()
        self.daemon = DaemonProcess(directory, config.format(library=str(build())))
        self.daemon.module = "tests.gpu_daemon"
        self.daemon.environment = {"AGENTCG_TEST_GPUS": str(self.state_path)}
        self.nodes = directory / "dev"
        self.nodes.mkdir()
        for name, number in NODES.items():
            os.mknod(self.nodes / name, 0o666 | stat.S_IFCHR, os.makedev(*number))

    def show(self, **state: Any) -> None:
        """Set what the stand-ins show from now on; two devices unless said otherwise."""
        write_state(self.state_path, **{"devices": 2, "memory_gib": 81, **state})


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A daemon that shares by time slices."""
    made = Machine(tmp_path_factory.mktemp("d"))
    try:
        made.daemon.start()
        yield made
    finally:
        made.daemon.close()
        print(made.daemon.log.read_text())


@pytest.fixture(autouse=True)
def no_call_is_left(machine: Machine) -> Iterator[None]:
    """End the calls that a failed test has left, so that the next one finds the devices free."""
    yield
    process = machine.daemon.process
    if process is not None and process.poll() is None:
        machine.show()
        for call in machine.daemon.admin.ListCalls(pb.ListCallsRequest()).calls:
            machine.daemon.admin.EndCall(pb.EndCallRequest(call_id=call.id))


@pytest.fixture(scope="module")
def agent(machine: Machine) -> AgentProcess:
    """An agent in a session of that daemon."""
    return machine.daemon.open("alpha", priority="100")


RUN = """
import sys
r = agent.run([sys.executable, '-c', script], capture_output=True, text=True, **intent)
result = (r.stdout + r.stderr, r.report.to_dict())
"""


def run_script(agent: AgentProcess, script: str, **intent: str) -> tuple[str, dict[str, Any]]:
    """Run a script as a call with this intent; returns all its output and the report."""
    found: tuple[str, dict[str, Any]] = agent.run(RUN, script=script, intent=intent)
    return found


OPEN = """
import errno, os
def can(path):
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as error:
        return errno.errorcode[error.errno]
    return "opened"
print(*[can(p) for p in paths])
"""


def opens(machine: Machine, agent: AgentProcess, **intent: str) -> list[str]:
    """Open each device file, and /dev/null, in a call with this intent; returns what happened."""
    paths = [*(str(machine.nodes / name) for name in NODES), "/dev/null"]
    out, _ = run_script(agent, f"paths = {paths!r}\n{OPEN}", **intent)
    return out.split()


@pytest.mark.programs
def test_the_gate(machine: Machine, agent: AgentProcess) -> None:
    closed = ["EPERM", "EPERM", "EPERM", "EPERM", "opened"]
    assert opens(machine, agent) == closed
    granted = opens(machine, agent, gpu="10%", gpu_device="0")
    assert granted == ["ENXIO", "EPERM", "ENXIO", "ENXIO", "opened"]
    assert opens(machine, agent, gpu="10%", gpu_device="any:2")[:2] == ["ENXIO", "ENXIO"]
    # The agent itself has no part, and neither has a call after the one that had.
    assert opens(machine, agent) == closed
    code = "import os\ntry:\n os.open(path, os.O_RDWR)\nexcept OSError as e:\n result = e.errno"
    assert agent.run(code, path=str(machine.nodes / "nvidia0")) == 1


INSIDE = """
import os, subprocess, sys
inside = [EXEC, "--name", "inside", *options, "--", sys.executable, "-c", script]
print(subprocess.run(inside, capture_output=True, text=True))
"""


def inside(agent: AgentProcess, script: str, *options: str, **intent: str) -> str:
    """Run a script as a call inside a call with this intent; returns what became of it."""
    code = f"EXEC = {EXEC!r}\noptions = {options!r}\nscript = {script!r}\n{INSIDE}"
    return run_script(agent, code, **intent)[0]


@pytest.mark.programs
def test_a_call_inside_shares_the_part_of_the_outer_one(
    machine: Machine, agent: AgentProcess
) -> None:
    paths = [str(machine.nodes / name) for name in NODES]
    show = f"paths = {paths!r}\n{OPEN}\nprint(os.environ['CUDA_VISIBLE_DEVICES'])"
    out = inside(agent, show, gpu="10%", gpu_device="0")
    assert f"ENXIO EPERM ENXIO ENXIO\\n{uuid_of(0)}" in out
    # Another call beside it has none.
    assert opens(machine, agent)[0] == "EPERM"
    asked = inside(agent, "print('ran')", "--gpu", "5%", gpu="10%", gpu_device="0")
    assert "returncode=0" in asked and "ran" in asked
    # The part is counted once: what is left can be had beside both.
    assert "returncode=0" in inside(agent, "", "--gpu", "60%", gpu="60%", gpu_device="0")


def test_a_call_inside_has_no_more_of_a_gpu_than_the_outer_one(
    machine: Machine, agent: AgentProcess
) -> None:
    more = inside(agent, "print('ran')", "--gpu", "20%", gpu="10%", gpu_device="0")
    assert "returncode=125" in more and "at most 10%" in more and "stdout=''" in more
    none = inside(agent, "print('ran')", "--gpu", "5%")
    assert "returncode=125" in none and "has no part of a GPU" in none and "stdout=''" in none


@pytest.mark.full_speed
def test_who_is_refused_is_told_what_to_ask_for(machine: Machine, agent: AgentProcess) -> None:
    code = """
stream = agent.feedback()
import sys, threading
got = []
def listen():
    for item in stream:
        if str(item.code) == "gpu_closed":
            got.append(item.sentence)
            return
t = threading.Thread(target=listen); t.start()
import time
for _ in range(20):
    agent.run([sys.executable, "-c", f"open({path!r}, 'rb')"], capture_output=True)
    t.join(0.2)
    if got: break
stream.close()
result = got
"""
    sentences = agent.run(code, path=str(machine.nodes / "nvidia0"))
    assert len(sentences) == 1 and 'gpu="10%"' in sentences[0]


BEGIN = "c = agent.tool_call('t', **intent); c.begin(); result = (c.id, c.grant.to_dict())"


def begin(agent: AgentProcess, **intent: str) -> tuple[str, dict[str, Any]]:
    """Begin a call; returns its id and grant."""
    found: tuple[str, dict[str, Any]] = agent.run(BEGIN, intent=intent)
    return found


def end(machine: Machine, call_id: str) -> pb.Report:
    """End a call; returns its report."""
    return machine.daemon.admin.EndCall(pb.EndCallRequest(call_id=call_id))


def test_grants(machine: Machine, agent: AgentProcess) -> None:
    call, grant = begin(agent, gpu="25%", gpu_device="1", gpu_priority="batch")
    assert (grant["gpu_percent"], grant["gpu_devices"]) == (25, [uuid_of(1)])
    assert grant["gpu_memory_bytes"] == 20 * GIB and grant["gpu_priority"] == 20
    assert grant["environment"]["CUDA_VISIBLE_DEVICES"] == uuid_of(1)
    budget = agent.run("result = agent.budget().to_dict()")
    left = [(g["percent_available"], g["memory_available_bytes"]) for g in budget["gpus"]]
    assert [g["index"] for g in budget["gpus"]] == [0, 1]
    assert left == [(100, 80 * GIB), (75, 60 * GIB)]
    end(machine, call)
    other, grant = begin(agent, gpu_memory="8G")
    assert (grant["gpu_percent"], grant["gpu_memory_bytes"]) == (10, 8 * GIB)
    end(machine, other)


@pytest.mark.full_speed
def test_the_launcher_sets_the_environment(machine: Machine, agent: AgentProcess) -> None:
    code = """
import subprocess
result = subprocess.run([launcher, "--gpu", "10%", "--gpu-device", "1", "--", "env"],
                        capture_output=True, text=True).stdout
"""
    out = agent.run(code, launcher=EXEC)
    assert f"CUDA_VISIBLE_DEVICES={uuid_of(1)}" in out.splitlines()


@pytest.mark.full_speed
@pytest.mark.parametrize(
    ("intent", "words"),
    [
        ({"gpu": "0%"}, ["gpu", "'0%'", "1%"]),
        ({"gpu": "ten"}, ["gpu", "'ten'"]),
        ({"gpu": "10%", "gpu_device": "7"}, ["gpu_device", "'7'", uuid_of(0)]),
        ({"gpu": "10%", "gpu_device": "any:3"}, ["gpu_device", "2 only"]),
        ({"gpu": "10%", "gpu_device": "0,0"}, ["gpu_device", "twice"]),
        ({"gpu_memory": "200G"}, ["gpu_memory", "80 GiB"]),
        ({"gpu_priority": "50"}, ["gpu_priority", "gpu or gpu_memory"]),
        ({"gpu": "60%", "gpu_device": "0,1", "wait": "0"}, ["is not there", "device 0: 50 %"]),
    ],
)
def test_refusals_say_what_is_allowed(
    machine: Machine, agent: AgentProcess, intent: dict[str, str], words: list[str]
) -> None:
    held = begin(agent, gpu="50%", gpu_device="0")[0]
    code = "stub.BeginCall(pb.BeginCallRequest(name='t', intent=pb.Intent(**intent)))"
    try:
        with pytest.raises(RemoteRpcError) as refused:
            agent.run(code, intent=intent)
        for word in words:
            assert word in refused.value.details
    finally:
        end(machine, held)


@pytest.mark.full_speed
def test_a_session_may_have_a_part_of_its_own(machine: Machine, agent: AgentProcess) -> None:
    """A session's part is for the agent itself, not for its calls."""
    own = machine.daemon.open("own", gpu="30%", gpu_device="1", gpu_memory="8G")
    code = (
        "import os\ntry:\n os.open(path, os.O_RDWR)\nexcept OSError as e:\n"
        " result = e.errno, os.environ.get('CUDA_VISIBLE_DEVICES')"
    )
    number, visible = own.run(code, path=str(machine.nodes / "nvidia1"))
    assert (number, visible) == (6, uuid_of(1))
    assert opens(machine, own)[0] == "EPERM"
    budget = own.run("result = agent.budget().to_dict()")
    assert [g["percent_available"] for g in budget["gpus"]] == [100, 70]
    machine.daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="own"))
    assert agent.run("result = agent.budget().gpus[1].percent_available") == 100


@pytest.mark.full_speed
def test_the_queue(machine: Machine, agent: AgentProcess) -> None:
    """A call that waits starts when a part is given back, by priority and age, or is refused when
    its time is over."""
    first = begin(agent, gpu="80%", gpu_device="0")[0]
    machine.daemon.enter("alpha")
    waiting = machine.daemon.agents[-1]
    code = """
import threading
started = []
def run(priority):
    with agent.tool_call("w", gpu="60%", gpu_device="0", gpu_priority=priority):
        started.append(priority)
threads = [threading.Thread(target=run, args=(p,)) for p in (20, 60)]
for t in threads: t.start()
result = None
"""
    waiting.run(code)
    admin = machine.daemon.admin

    def states() -> list[int]:
        return [c.state for c in admin.ListCalls(pb.ListCallsRequest()).calls]

    wait_until("both wait", lambda: states().count(pb.CALL_STATE_WAITING) == 2)
    with pytest.raises(RemoteRpcError) as refused:
        agent.run(
            "intent = pb.Intent(gpu='30%', gpu_device='0', wait='100ms')\n"
            "stub.BeginCall(pb.BeginCallRequest(name='t', intent=intent))"
        )
    assert refused.value.code == "RESOURCE_EXHAUSTED" and "of waiting" in refused.value.details
    end(machine, first)
    assert waiting.run("[t.join() for t in threads]\nresult = started") == [60, 20]
    assert states() == []


LOAD = """
import ctypes, os, sys, time
cuda = ctypes.CDLL(library)
try: os.open(node, os.O_RDWR)
except OSError: pass
"""


def with_libcuda(machine: Machine, code: str) -> str:
    """A script that has loaded the stand-in for libcuda and opened the device, and then runs
    `code`."""
    names = f"library, node = {str(build())!r}, {str(machine.nodes / 'nvidiactl')!r}\n"
    return names + LOAD + code


USE = """
out = ctypes.c_uint64()
results = [cuda.cuMemAlloc_v2(ctypes.byref(out), ctypes.c_uint64(1 << 30)) for _ in range(6)]
print(results, flush=True)
"""


@pytest.mark.programs
def test_the_quota_reaches_the_agent(machine: Machine, agent: AgentProcess) -> None:
    """Memory over the quota is refused where this kernel can; else told and counted."""
    out, report = run_script(agent, with_libcuda(machine, USE), gpu_memory="4G")
    usage = report["gpu"]
    if usage["memory_held_by"] == "probes":
        assert out.split("]")[0] == "[0, 0, 0, 0, 2, 2"
        assert usage["refused"] == 2 and usage["memory_peak_bytes"] == 4 * GIB
        assert [f["code"] for f in report["feedback"]] == ["gpu_memory_denied"]
    else:
        assert out.split("]")[0] == "[0, 0, 0, 0, 0, 0"
        assert usage["memory_held_by"] == "counting" and usage["memory_peak_bytes"] == 6 * GIB


@pytest.mark.full_speed
def test_managed_memory_counts(machine: Machine, agent: AgentProcess) -> None:
    """Managed memory is held to the quota, though NVML does not show it."""
    use = USE.replace("cuMemAlloc_v2", "cuMemAllocManaged").replace("(1 << 30))", "(1 << 30), 1)")
    use += "time.sleep(10 if sum(results) == 0 else 0)\n"
    _, report = run_script(agent, with_libcuda(machine, use), gpu_memory="4G")
    if report["gpu"]["memory_held_by"] == "probes":
        assert report["gpu"]["refused"] == 2 and report["verdict"] == "ok"
    else:
        assert report["verdict"] == "stopped" and "6 GiB" in report["sentence"]


SLEEP = """
import time
c = agent.tool_call('t', **intent)
c.begin()
p = c.popen(['sleep', '60'])
while 'agentcg' in open(f'/proc/{p.pid}/comm').read():
    time.sleep(0.01)
result = (c.id, p.pid)
"""


def _sleeper(agent: AgentProcess, **intent: str) -> tuple[str, int]:
    """Begin a call with one process that waits; returns its id and the process's pid."""
    found: tuple[str, int] = agent.run(SLEEP, intent=intent)
    return found


def _until_report(machine: Machine, call_id: str) -> pb.Report:
    """Wait until a call has ended; returns its report."""
    admin = machine.daemon.admin

    def ended() -> bool:
        return call_id not in [c.id for c in admin.ListCalls(pb.ListCallsRequest()).calls]

    wait_until("it has ended", ended)
    return admin.GetReport(pb.GetReportRequest(call_id=call_id))


@pytest.mark.full_speed
def test_the_last_rung(machine: Machine, agent: AgentProcess) -> None:
    """A call that holds more than its quota, however that came about, is told, then ended."""
    call, pid = _sleeper(agent, gpu_memory="1G", gpu_device="0")
    machine.show(processes=[[pid, 0, 3 * GIB, 50.0]])
    report = _until_report(machine, call)
    machine.show()
    assert report.verdict == pb.VERDICT_STOPPED and "3 GiB" in report.sentence
    assert pb.FEEDBACK_CODE_GPU_MEMORY_OVER in [f.code for f in report.feedback]
    assert report.gpu.memory_peak_bytes == 3 * GIB
    assert report.gpu.sm_percent > 1 and report.gpu.energy_mj > 0


@pytest.mark.full_speed
def test_what_nvml_cannot_tell_is_missing(machine: Machine, agent: AgentProcess) -> None:
    """Use of the processors that is unknown is left out of the report, and not zero."""
    call, pid = _sleeper(agent, gpu_memory="2G", gpu_device="0")
    machine.show(untold=True, processes=[[pid, 0, GIB, 50.0]])
    time.sleep(0.5)
    usage = end(machine, call).gpu
    machine.show()
    assert usage.memory_peak_bytes == GIB
    assert not usage.HasField("sm_percent") and not usage.HasField("energy_mj")


def _frozen(machine: Machine, call_id: str) -> bool:
    (path,) = machine.daemon.cgroup_dir.glob(f"*/call-{call_id}/cgroup.freeze")
    return path.read_text().strip() == "1"


def _sampled(condition: Callable[[], bool], seconds: float) -> float:
    """Share of the time for which a condition holds."""
    answers = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        answers.append(condition())
        time.sleep(0.002)
    return sum(answers) / len(answers)


def _until_never_held(machine: Machine, call_id: str) -> None:
    """Wait until a call is not held back for 0.4 s."""

    def never() -> bool:
        return _sampled(lambda: _frozen(machine, call_id), 0.4) == 0

    wait_until("it is not held back for an idle one", never)


@pytest.mark.full_speed
def test_time_slices(machine: Machine, agent: AgentProcess) -> None:
    """Two that use one device have it in turn, in proportion; alone, nobody waits."""
    large, one = _sleeper(agent, gpu="60%", gpu_device="0")
    small, two = _sleeper(agent, gpu="20%", gpu_device="0")
    machine.show(processes=[[one, 0, GIB, 90.0]])
    time.sleep(0.3)
    assert _sampled(lambda: _frozen(machine, large), 0.3) == 0
    machine.show(processes=[[one, 0, GIB, 60.0], [two, 0, GIB, 30.0]])
    wait_until("slices begin", lambda: _frozen(machine, small))
    assert _sampled(lambda: _frozen(machine, small) and _frozen(machine, large), 0.5) < 0.05
    held = _sampled(lambda: _frozen(machine, large), 2.0)
    assert 0.15 < held < 0.35, held
    machine.show(processes=[[one, 0, GIB, 90.0], [two, 0, GIB, 0.0]])
    _until_never_held(machine, large)
    machine.show()
    assert end(machine, large).call_id == large
    report = end(machine, small)
    assert report.call_id == small
    assert report.gpu.share_held_by == "turns" and report.gpu.held_back_usec > 500_000


LAUNCH = """
while not os.path.exists(end):
    cuda.cuLaunchKernel(None, 0)
    time.sleep(0.002)
time.sleep(60)
"""


@pytest.mark.full_speed
def test_who_launches_is_not_taken_for_idle(
    machine: Machine, agent: AgentProcess, tmp_path: Path
) -> None:
    """A call that launches has its slices though NVML never shows it; nobody waits for one that
    launches no more."""
    end_file = tmp_path / "end"
    small = agent.run(
        "import sys\nc = agent.tool_call('t', gpu='20%', gpu_device='0'); c.begin()\n"
        "p = c.popen([sys.executable, '-c', script])\nresult = c.id",
        script=with_libcuda(machine, f"end = {str(end_file)!r}\n{LAUNCH}"),
    )
    large, pid = _sleeper(agent, gpu="60%", gpu_device="0")
    machine.show(processes=[[pid, 0, GIB, 90.0]])
    wait_until("slices begin", lambda: _frozen(machine, large))
    held = _sampled(lambda: _frozen(machine, large), 3.0)
    assert 0.15 < held < 0.35, held
    end_file.touch()
    _until_never_held(machine, large)
    machine.show()
    for call in (small, large):
        end(machine, call)


@pytest.mark.full_speed
def test_a_daemon_that_is_killed_in_a_slice(machine: Machine, agent: AgentProcess) -> None:
    """A call that was held back waits for the next daemon, and goes on then."""
    large, one = _sleeper(agent, gpu="60%", gpu_device="0")
    small, two = _sleeper(agent, gpu="20%", gpu_device="0")
    machine.show(processes=[[one, 0, GIB, 60.0], [two, 0, GIB, 30.0]])
    wait_until("slices begin", lambda: _frozen(machine, small))
    machine.daemon.kill()
    assert _frozen(machine, small) or _frozen(machine, large)
    machine.show()
    machine.daemon.start()
    wait_until("all go on", lambda: not _frozen(machine, small) and not _frozen(machine, large))
    assert _sampled(lambda: _frozen(machine, small) or _frozen(machine, large), 0.5) == 0
    for call in (small, large):
        end(machine, call)


@pytest.mark.full_speed
def test_faults_are_feedback(machine: Machine, agent: AgentProcess) -> None:
    call, pid = _sleeper(agent, gpu="10%", gpu_device="1")
    other = _sleeper(agent, gpu="10%", gpu_device="0")[0]
    machine.show(faults=[[1, 31]], processes=[[pid, 1, GIB, 5.0]])
    time.sleep(0.5)
    assert machine.daemon.process is not None and machine.daemon.process.poll() is None
    report = end(machine, call)
    assert [f.code for f in report.feedback if f.numbers.get("xid") == 31] == [
        pb.FEEDBACK_CODE_GPU_FAULT
    ]
    assert all("xid" not in f.numbers for f in end(machine, other).feedback)


@pytest.mark.full_speed
def test_a_restarted_daemon_finds_it_all_again(machine: Machine, agent: AgentProcess) -> None:
    code = f"""
import os, sys, time
try: os.open({str(machine.nodes / "nvidia1")!r}, os.O_RDWR)
except OSError as e: print(e.errno, flush=True)
sys.stdin.readline()
try: os.open({str(machine.nodes / "nvidia1")!r}, os.O_RDWR)
except OSError as e: print(e.errno, flush=True)
"""
    start = """
import sys, subprocess
c = agent.tool_call('t', gpu="70%", gpu_device="1"); c.begin()
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
p = c.popen([sys.executable, "-c", script], **pipes)
result = c.id, p.stdout.readline()
"""
    call, before = agent.run(start, script=code)
    assert before == "6\n"
    machine.daemon.kill()
    refused = "import os\ntry:\n os.open(path, os.O_RDWR)\nexcept OSError as e:\n result = e.errno"
    assert agent.run(refused, path=str(machine.nodes / "nvidia1")) == 1
    machine.daemon.start()
    out = agent.run("p.stdin.write('\\n'); p.stdin.flush(); result = p.stdout.readline()")
    assert out == "6\n"
    budget = agent.run("result = agent.budget().to_dict()")
    assert [g["percent_available"] for g in budget["gpus"]] == [100, 30]
    report = machine.daemon.admin.EndCall(pb.EndCallRequest(call_id=call))
    assert report.grant.gpu_percent == 70


@pytest.mark.full_speed
def test_a_lost_device(machine: Machine, agent: AgentProcess) -> None:
    """A lost device is told, and nothing more is granted on it. Last in this module, for the device
    stays lost."""
    call, _ = _sleeper(agent, gpu="10%", gpu_device="0")
    machine.show(lost=[0])
    wait_until("it is noticed", lambda: agent.run("result = agent.budget().gpus[0].lost"))
    assert pb.FEEDBACK_CODE_GPU_LOST in [f.code for f in end(machine, call).feedback]
    again, grant = begin(agent, gpu="10%")
    assert grant["gpu_devices"] == [uuid_of(1)]
    end(machine, again)
