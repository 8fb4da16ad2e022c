"""The daemon with GPUs: grants, the gate, the queue, quotas, turns, faults, a restart. NVML and MPS
are fakes (tests/gpu_fakes.py), device files have a major that no driver answers; the kernel, the
probes and the processes are real."""

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


NODES = (("nvidia0", DEVICES_MAJOR, 0), ("nvidia1", DEVICES_MAJOR, 1),
         ("nvidiactl", DEVICES_MAJOR, 255), ("uvm", SHARED_MAJOR, 0))  # fmt: skip


class Machine:
    """A daemon, and what its fakes show."""

    def __init__(self, directory: Path, config: str = CONFIG) -> None:
        self.state_path = directory / "gpus.json"
        self.show()
        self.daemon = DaemonProcess(directory, config.format(library=str(build())))
        self.daemon.module = "tests.gpu_daemon"
        self.daemon.environment = {"AGENTCG_TEST_GPUS": str(self.state_path)}
        self.nodes = directory / "dev"
        self.nodes.mkdir()
        for name, major, minor in NODES:
            os.mknod(self.nodes / name, 0o666 | stat.S_IFCHR, os.makedev(major, minor))

    def show(self, **state: Any) -> None:
        """From now on."""
        write_state(self.state_path, **{"devices": 2, "memory_gib": 81, **state})


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """For all tests here."""
    made = Machine(tmp_path_factory.mktemp("d"))
    try:
        made.daemon.start()
        yield made
    finally:
        made.daemon.close()
        print(made.daemon.log.read_text())


@pytest.fixture(scope="module")
def agent(machine: Machine) -> AgentProcess:
    """An agent."""
    return machine.daemon.open("alpha", priority="100")


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
    """What becomes of each device file in a call with this intent."""
    paths = [str(machine.nodes / n) for n in ("nvidia0", "nvidia1", "nvidiactl", "uvm")]
    paths.append("/dev/null")
    code = f"paths = {paths!r}\n{OPEN}"
    text: str = agent.run(
        "import sys\nr = agent.run([sys.executable, '-c', script], capture_output=True, text=True,"
        " **intent)\nresult = r.stdout + r.stderr", script=code, intent=intent,
    )  # fmt: skip
    return text.split()


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
    """An open call: its id and grant."""
    found: tuple[str, dict[str, Any]] = agent.run(BEGIN, intent=intent)
    return found


def end(machine: Machine, call_id: str) -> pb.Report:
    """End it."""
    return machine.daemon.admin.EndCall(pb.EndCallRequest(call_id=call_id))


def test_grants(machine: Machine, agent: AgentProcess) -> None:
    call, grant = begin(agent, gpu="25%", gpu_device="1", gpu_priority="batch")
    assert (grant["gpu_percent"], grant["gpu_devices"]) == (25, [uuid_of(1)])
    assert grant["gpu_memory_bytes"] == 20 * GIB and grant["gpu_priority"] == 20
    assert grant["environment"]["CUDA_VISIBLE_DEVICES"] == uuid_of(1)
    budget = agent.run("result = agent.budget().to_dict()")
    left = {g["index"]: (g["percent_available"], g["memory_available_bytes"])
            for g in budget["gpus"]}  # fmt: skip
    assert left == {0: (100, 80 * GIB), 1: (75, 60 * GIB)}
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
    try:
        with pytest.raises(RemoteRpcError) as refused:
            agent.run("stub.BeginCall(pb.BeginCallRequest(name='t', intent=pb.Intent(**intent)))",
                      intent=intent)  # fmt: skip
        for word in words:
            assert word in refused.value.details
    finally:
        end(machine, held)


@pytest.mark.full_speed
def test_a_session_may_have_a_part_of_its_own(machine: Machine, agent: AgentProcess) -> None:
    """For the agent itself, not for its calls."""
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
    """By priority and age; whoever waits starts when a part is given back, or is refused when its
    time is over."""
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
        agent.run("stub.BeginCall(pb.BeginCallRequest(name='t', intent=pb.Intent("
                  "gpu='30%', gpu_device='0', wait='100ms')))")  # fmt: skip
    assert refused.value.code == "RESOURCE_EXHAUSTED" and "of waiting" in refused.value.details
    end(machine, first)
    assert waiting.run("[t.join() for t in threads]\nresult = started") == [60, 20]
    assert states() == []


USE = """
import ctypes, os, sys, time
cuda = ctypes.CDLL(library)
try: os.open(node, os.O_RDWR)
except OSError: pass
out = ctypes.c_uint64()
results = [cuda.cuMemAlloc_v2(ctypes.byref(out), ctypes.c_uint64(1 << 30)) for _ in range(6)]
print(results, flush=True)
"""


@pytest.mark.programs
def test_the_quota_reaches_the_agent(machine: Machine, agent: AgentProcess) -> None:
    """Refused where this kernel can; told and counted where it cannot."""
    code = f"library, node = {str(build())!r}, {str(machine.nodes / 'nvidiactl')!r}\n{USE}"
    out, report = agent.run(
        "import sys\nr = agent.run([sys.executable, '-c', script], gpu_memory='4G',"
        " capture_output=True, text=True)\nresult = (r.stdout + r.stderr, r.report.to_dict())",
        script=code,
    )  # fmt: skip
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
    """NVML does not show it."""
    code = f"library, node = {str(build())!r}, {str(machine.nodes / 'nvidiactl')!r}\n"
    code += USE.replace("cuMemAlloc_v2", "cuMemAllocManaged").replace("(1 << 30))", "(1 << 30), 1)")
    code += "time.sleep(10 if sum(results) == 0 else 0)\n"
    report = agent.run(
        "import sys\nr = agent.run([sys.executable, '-c', script], gpu_memory='4G',"
        " capture_output=True, text=True)\nresult = r.report.to_dict()", script=code,
    )  # fmt: skip
    if report["gpu"]["memory_held_by"] == "probes":
        assert report["gpu"]["refused"] == 2 and report["verdict"] == "ok"
    else:
        assert report["verdict"] == "stopped" and "6 GiB" in report["sentence"]


def _sleeper(agent: AgentProcess, **intent: str) -> tuple[str, int]:
    """A call with one process that waits: its id, and the pid as the daemon sees it."""
    found: tuple[str, int] = agent.run(
        "c = agent.tool_call('t', **intent); c.begin()\np = c.popen(['sleep', '60'])\n"
        "import time\n"
        "while 'agentcg' in open(f'/proc/{p.pid}/comm').read(): time.sleep(0.01)\n"
        "result = (c.id, p.pid)", intent=intent,
    )  # fmt: skip
    return found


def _until_report(machine: Machine, call_id: str) -> pb.Report:
    admin = machine.daemon.admin
    wait_until("it has ended", lambda: all(
        c.id != call_id for c in admin.ListCalls(pb.ListCallsRequest()).calls))  # fmt: skip
    return admin.GetReport(pb.GetReportRequest(call_id=call_id))


@pytest.mark.full_speed
def test_the_last_rung(machine: Machine, agent: AgentProcess) -> None:
    """More is held than the quota allows, however it came by it: told, then ended."""
    call, pid = _sleeper(agent, gpu_memory="1G", gpu_device="0")
    machine.show(processes=[[pid, 0, 3 * GIB, 50.0]])
    report = _until_report(machine, call)
    machine.show()
    assert report.verdict == pb.VERDICT_STOPPED and "3 GiB" in report.sentence
    assert pb.FEEDBACK_CODE_GPU_MEMORY_OVER in [f.code for f in report.feedback]
    assert report.gpu.memory_peak_bytes == 3 * GIB
    assert report.gpu.sm_percent > 1 and report.gpu.energy_mj > 0


def _frozen(machine: Machine, call_id: str) -> bool:
    (path,) = machine.daemon.cgroup_dir.glob(f"*/call-{call_id}/cgroup.freeze")
    return path.read_text().strip() == "1"


def _sampled(condition: Callable[[], bool], seconds: float) -> float:
    """Share of looks at which something was so."""
    looks, hits, until = 0, 0, time.monotonic() + seconds
    while time.monotonic() < until:
        looks, hits = looks + 1, hits + condition()
        time.sleep(0.002)
    return hits / looks


@pytest.mark.full_speed
def test_turns(machine: Machine, agent: AgentProcess) -> None:
    """Two that use one device have it in turn, in proportion; alone, nobody waits."""
    (large, one), (small, two) = (_sleeper(agent, gpu="60%", gpu_device="0"),
                                  _sleeper(agent, gpu="20%", gpu_device="0"))  # fmt: skip
    machine.show(processes=[[one, 0, GIB, 90.0]])
    time.sleep(0.3)
    assert _sampled(lambda: _frozen(machine, large), 0.3) == 0
    machine.show(processes=[[one, 0, GIB, 60.0], [two, 0, GIB, 30.0]])
    wait_until("turns begin", lambda: _frozen(machine, small))
    assert _sampled(lambda: _frozen(machine, small) and _frozen(machine, large), 0.5) < 0.05
    held = _sampled(lambda: _frozen(machine, large), 2.0)
    assert 0.15 < held < 0.35, held
    machine.show(processes=[[one, 0, GIB, 90.0], [two, 0, GIB, 0.0]])
    wait_until("the idle one is let alone", lambda: _sampled(
        lambda: _frozen(machine, large), 0.4) == 0)  # fmt: skip
    machine.show()
    reports = {end(machine, call).call_id: machine for call in (large, small)}
    assert len(reports) == 2
    report = machine.daemon.admin.GetReport(pb.GetReportRequest(call_id=small))
    assert report.gpu.share_held_by == "turns" and report.gpu.held_back_usec > 500_000


LAUNCH = """
import ctypes, os, sys, time
cuda = ctypes.CDLL(library)
try: os.open(node, os.O_RDWR)
except OSError: pass
while not os.path.exists(end):
    cuda.cuLaunchKernel(None, 0)
    time.sleep(0.002)
time.sleep(60)
"""


@pytest.mark.full_speed
def test_who_launches_is_not_taken_for_idle(
    machine: Machine, agent: AgentProcess, tmp_path: Path
) -> None:
    """Though NVML never shows it; and who launches no more is no longer waited for."""
    end_file = tmp_path / "end"
    code = (f"library, node, end = {str(build())!r}, {str(machine.nodes / 'nvidiactl')!r}, "
            f"{str(end_file)!r}\n{LAUNCH}")  # fmt: skip
    small = agent.run(
        "import sys\nc = agent.tool_call('t', gpu='20%', gpu_device='0'); c.begin()\n"
        "p = c.popen([sys.executable, '-c', script])\nresult = c.id", script=code,
    )  # fmt: skip
    large, pid = _sleeper(agent, gpu="60%", gpu_device="0")
    machine.show(processes=[[pid, 0, GIB, 90.0]])
    wait_until("turns begin", lambda: _frozen(machine, large))
    held = _sampled(lambda: _frozen(machine, large), 3.0)
    assert 0.15 < held < 0.35, held
    end_file.touch()
    wait_until("the idle one is let alone", lambda: _sampled(
        lambda: _frozen(machine, large), 0.4) == 0)  # fmt: skip
    machine.show()
    for call in (small, large):
        end(machine, call)


@pytest.mark.full_speed
def test_a_daemon_that_is_killed_in_a_turn(machine: Machine, agent: AgentProcess) -> None:
    """Whom it held back waits for the next daemon, and goes on then."""
    (large, one), (small, two) = (_sleeper(agent, gpu="60%", gpu_device="0"),
                                  _sleeper(agent, gpu="20%", gpu_device="0"))  # fmt: skip
    machine.show(processes=[[one, 0, GIB, 60.0], [two, 0, GIB, 30.0]])
    wait_until("turns begin", lambda: _frozen(machine, small))
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
    """The last of this module: it stays lost."""
    call, _ = _sleeper(agent, gpu="10%", gpu_device="0")
    machine.show(lost=[0])
    wait_until("it is noticed", lambda: agent.run("result = agent.budget().gpus[0].lost"))
    assert pb.FEEDBACK_CODE_GPU_LOST in [f.code for f in end(machine, call).feedback]
    again, grant = begin(agent, gpu="10%")
    assert grant["gpu_devices"] == [uuid_of(1)]
    end(machine, again)
