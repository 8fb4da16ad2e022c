"""The daemon with a real driver, a real GPU and an unchanged PyTorch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.vram import VramPrograms
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.gpu.libraries import Libraries
from agentcgroupd.gpu.nvml import DriverNvml
from tests.gpu.conftest import TORCH_PYTHON, Gpu, environment
from tests.harness import wait_until

GIB = 1 << 30
AVAILABLE = "import torch; print(torch.cuda.is_available(), torch.cuda.device_count())"
GRAB = """
import json, torch
kept, said = [], ""
for _ in range(8):
    try:
        kept.append(torch.empty(1 << 30, device="cuda", dtype=torch.uint8))
    except torch.OutOfMemoryError as error:
        said = "OutOfMemoryError"
        break
print(json.dumps({"got": len(kept), "said": said}), flush=True)
if said:
    kept.pop()
    kept.append(torch.ones(1 << 20, device="cuda"))
    print(float(kept[-1].sum()))
else:
    import time
    time.sleep(20)
"""
WORK = """
import time, torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
until = time.time() + {seconds}
while time.time() < until:
    for _ in range(4):
        b = a @ a
    torch.cuda.synchronize()
"""


def test_nvml_and_the_driver_agree() -> None:
    nvml = DriverNvml()
    try:
        devices = nvml.devices()
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
        assert [d.uuid in listed.stdout for d in devices] == [True] * len(devices) != []
        for device in devices:
            assert Path(f"/dev/nvidia{device.minor}").exists()
        (sample, *_) = nvml.sample([d.uuid for d in devices])
        assert sample.lost == "" and sample.energy_mj
    finally:
        nvml.close()


def test_the_gate(turns: Gpu) -> None:
    closed, _ = turns.torch(AVAILABLE)
    assert closed.splitlines()[-1] == "False 0"
    granted, report = turns.torch(AVAILABLE, gpu="10%", gpu_memory="2G")
    assert granted.splitlines()[-1] == "True 1"
    assert report.grant.gpu_percent == 10 and report.HasField("gpu")


def test_what_a_call_did_is_in_its_report(turns: Gpu) -> None:
    _, report = turns.torch(WORK.format(seconds=3), gpu="50%", gpu_memory="4G")
    assert report.verdict == pb.VERDICT_OK
    usage = report.gpu
    assert usage.memory_peak_bytes > 256 << 20
    assert usage.sm_percent > 5
    assert usage.energy_mj > 1000


def test_probes_and_torch_agree() -> None:
    """The probes' account is what PyTorch says that it holds, though the CUDA runtime finds the
    functions of libcuda in ways of its own."""
    programs = VramPrograms.load()
    libraries = Libraries(programs)
    root = Cgroup.open(cgroup2_mount())
    cgroup = root.make_child(f"agentcg-test-probes-{os.getpid()}")
    code = """
import json, sys, torch
sys.stdin.readline()
def say():
    torch.cuda.synchronize()
    print(json.dumps(torch.cuda.memory_reserved()), flush=True)
    sys.stdin.readline()
x = [torch.empty(256 << 20, device="cuda", dtype=torch.uint8) for _ in range(4)]
say()
x.clear(); torch.cuda.empty_cache()
say()
"""
    try:
        assert libraries.probe_host() != [] and libraries.failures == []
        programs.set_quota(cgroup.id, None)
        process = subprocess.Popen(
            [TORCH_PYTHON, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert process.stdin is not None and process.stdout is not None
        cgroup.attach(process.pid)
        seen = []
        for _ in range(2):
            process.stdin.write("\n")
            process.stdin.flush()
            reserved = json.loads(process.stdout.readline())
            account = programs.account(cgroup.id)
            seen.append((reserved, int(account.used_bytes), int(account.allocations)))
        print(f"(reserved by torch, used by account, allocations): {seen}")
        (held, used, count), (_, after, _) = seen
        assert held >= GIB and count >= 4
        assert held <= used <= held + (128 << 20)
        assert after <= used - GIB
        process.stdin.write("\n")
        process.stdin.close()
        process.wait()
        process.stdout.close()
        wait_until("its end gives all back", lambda: programs.account(cgroup.id).used_bytes == 0)
        assert programs.account(cgroup.id).untracked == 0
    finally:
        cgroup.kill_and_remove()
        root.close()
        libraries.close()
        programs.close()


def _grabbed(out: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(
        next(line for line in out.splitlines() if line.startswith("{"))
    )
    return answer


def test_a_quota_by_the_strongest_rung(turns: Gpu) -> None:
    """A call over its quota is refused memory where the kernel lets probes refuse, else ended."""
    out, report = turns.torch(GRAB, gpu="20%", gpu_memory="4G")
    if report.gpu.memory_held_by == "probes":
        assert _grabbed(out) == {"got": 4, "said": "OutOfMemoryError"}
        assert report.gpu.refused > 0 and report.verdict == pb.VERDICT_OK
    else:
        assert report.gpu.memory_held_by == "counting"
        assert report.verdict == pb.VERDICT_STOPPED and "quota" in report.sentence


def test_a_quota_by_mps(mps: Gpu) -> None:
    """A tool over its quota is refused memory, and lives."""
    out, report = mps.torch(GRAB, gpu="20%", gpu_memory="4G")
    assert report.gpu.share_held_by == "mps"
    answer = _grabbed(out)
    assert answer["said"] == "OutOfMemoryError" and 2 <= answer["got"] <= 4, out
    assert report.verdict == pb.VERDICT_OK, (out, report.sentence)


def test_a_share_by_mps(mps: Gpu) -> None:
    """A call has its share of the multiprocessors, as the driver tells the process itself."""
    code = "import torch; print(torch.cuda.get_device_properties(0).multi_processor_count)"
    whole = int(mps.torch(code, gpu="100%", gpu_memory="2G")[0].splitlines()[-1])
    part = int(mps.torch(code, gpu="25%", gpu_memory="2G")[0].splitlines()[-1])
    print(f"multiprocessors: {part} of {whole}")
    assert 0.2 <= part / whole <= 0.3


def test_past_mps_is_told_and_counted(mps: Gpu) -> None:
    """A tool that unsets its environment is held to its quota by counting."""
    code = f"""
import os, subprocess, sys
env = {{k: v for k, v in os.environ.items() if not k.startswith("CUDA_MPS")}}
sys.exit(subprocess.run([{TORCH_PYTHON!r}, "-c", {GRAB!r}], env=env).returncode)
"""
    _, report = mps.torch(code, gpu="20%", gpu_memory="4G")
    assert report.verdict == pb.VERDICT_STOPPED, report.sentence
    assert pb.FEEDBACK_CODE_GPU_MEMORY_OVER in [f.code for f in report.feedback]


def test_mps_is_started_again(mps: Gpu) -> None:
    (pid_file,) = (mps.daemon.run_dir / "agent/mps").glob("*.pid")
    before = int(pid_file.read_text())
    os.kill(before, signal.SIGKILL)
    earlier = ("", str(before))
    wait_until(
        "another runs",
        lambda: pid_file.exists() and pid_file.read_text().strip() not in earlier,
        20,
    )
    time.sleep(1)
    out, report = mps.torch(AVAILABLE, gpu="10%", gpu_memory="2G")
    assert out.splitlines()[-1] == "True 1" and report.gpu.share_held_by == "mps"


def test_two_that_work_have_time_slices(turns: Gpu) -> None:
    begin = (
        "calls = [agent.tool_call('w', gpu=p, gpu_memory='3G') for p in ('60%', '30%')]\n"
        "for c in calls: c.begin()\n"
        "ps = [c.popen([python, '-c', script], env=env) for c in calls]\n"
        "for p in ps: p.wait()\n"
        "for c in calls: c.end()\n"
        "result = [c.id for c in calls]"
    )
    work = WORK.format(seconds=6)
    ids = turns.agent.run(begin, python=TORCH_PYTHON, script=work, env=environment())
    reports = [turns.daemon.admin.GetReport(pb.GetReportRequest(call_id=i)) for i in ids]
    held = [r.gpu.held_back_usec for r in reports]
    print(f"held back: {held} us, sm {[r.gpu.sm_percent for r in reports]}")
    assert all(r.verdict == pb.VERDICT_OK for r in reports)
    assert held[1] > held[0] > 0
