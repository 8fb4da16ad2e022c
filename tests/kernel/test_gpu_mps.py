"""The daemon with a stand-in for MPS: the environment of a grant, an end of MPS that nobody asked
for, a tool that uses the GPU past MPS; and a host without a driver."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.gpu_fakes import GIB, uuid_of
from tests.harness import AgentProcess, RemoteRpcError, wait_until
from tests.kernel.test_gpu_calls import Machine, begin, end

pytestmark = pytest.mark.full_speed

CONFIG = """
[gpu]
share = "mps"
quota = "mps"
sample = "50ms"
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A daemon that shares by MPS."""
    made = Machine(tmp_path_factory.mktemp("d"), CONFIG)
    made.show(mps=True)
    try:
        made.daemon.start()
        yield made
    finally:
        made.daemon.close()
        print(made.daemon.log.read_text())


@pytest.fixture(scope="module")
def agent(machine: Machine) -> AgentProcess:
    """An agent in a session of that daemon."""
    return machine.daemon.open("alpha", priority="100")


def test_the_environment(machine: Machine, agent: AgentProcess) -> None:
    call, grant = begin(agent, gpu="25%", gpu_memory="4G", gpu_device="0")
    assert grant["environment"] == {
        "CUDA_VISIBLE_DEVICES": uuid_of(0),
        "CUDA_MPS_PIPE_DIRECTORY": str(machine.daemon.run_dir / "agent/mps"),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=4096M",
    }
    updated = agent.run("result = c.update(gpu='50%').to_dict()")
    assert updated["environment"]["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50"
    assert "from now on" in updated["advice"][-1]
    with pytest.raises(RemoteRpcError, match="gpu_device"):
        agent.run(
            "intent = pb.Intent(gpu_device='1')\n"
            "stub.UpdateIntent(pb.UpdateIntentRequest(call_id=c.id, intent=intent))"
        )
    report = end(machine, call)
    assert (report.gpu.share_held_by, report.gpu.memory_held_by) == ("mps", "mps")


def test_an_end_that_nobody_asked_for(machine: Machine, agent: AgentProcess) -> None:
    call, _ = begin(agent, gpu="10%")
    (path,) = (machine.daemon.run_dir / "agent/mps").glob("*.pid")
    before = int(path.read_text())
    os.kill(before, signal.SIGKILL)
    wait_until("another runs", lambda: int(path.read_text()) != before)
    told = [f for f in end(machine, call).feedback if f.code == pb.FEEDBACK_CODE_GPU_FAULT]
    assert len(told) == 1 and "MPS has ended" in told[0].sentence
    again, grant = begin(agent, gpu="10%")
    assert "CUDA_MPS_PIPE_DIRECTORY" in grant["environment"]
    end(machine, again)


@pytest.mark.waits
def test_past_mps(machine: Machine, agent: AgentProcess) -> None:
    """Only the call whose process is no client of MPS is told."""
    start = (
        "cs = [agent.tool_call('t', gpu='10%') for _ in range(2)]\nresult = []\n"
        "for c in cs:\n c.begin()\n p = c.popen(['sleep', '60'])\n result.append((c.id, p.pid))"
    )
    (inside, one), (outside, two) = agent.run(start)
    processes = [[one, 0, GIB, 10.0], [two, 0, GIB, 10.0]]
    machine.show(mps=True, clients=[one], processes=processes)
    agent.run("import time; time.sleep(6)")  # MPS is asked for its clients every five seconds

    def told(call: str) -> list[float]:
        feedback = end(machine, call).feedback
        return [f.numbers["pid"] for f in feedback if f.code == pb.FEEDBACK_CODE_GPU_UNSHARED]

    assert (told(inside), told(outside)) == ([], [two])


def test_a_host_without_a_driver(tmp_path_factory: pytest.TempPathFactory) -> None:
    machine = Machine(tmp_path_factory.mktemp("d"), "")
    machine.show(devices=-1)
    try:
        machine.daemon.start()
        agent = machine.daemon.open("alpha")
        with pytest.raises(RemoteRpcError, match="driver not loaded"):
            agent.run("stub.BeginCall(pb.BeginCallRequest(name='t', intent=pb.Intent(gpu='1%')))")
        assert agent.run("result = agent.run(['true']).returncode") == 0
        assert agent.run("result = agent.budget().gpus") == ()
    finally:
        machine.daemon.close()
