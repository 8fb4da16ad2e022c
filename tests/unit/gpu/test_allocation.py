"""Parts of GPUs that are asked for, and the devices where they fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.errors import InvalidField
from agentcgroupd.gpu.allocation import Asking, Holding, admit, free_of, place
from agentcgroupd.gpu.gate import read_majors
from agentcgroupd.gpu.mps import environment
from agentcgroupd.intents.gpu import Device, DeviceSelection, GpuCeiling, parse_device
from agentcgroupd.intents.gpu_part import gpu_part
from agentcgroupd.intents.parse import parse_intent
from agentcgroupd.units import parse_percent

GIB = 1 << 30
DEVICES = tuple(Device(i, f"GPU-{i:08d}", i, "A GPU", 80 * GIB) for i in range(3))
CEILING = GpuCeiling(DEVICES)


@pytest.mark.parametrize(("text", "value"), [("10%", 10), ("10", 10), (" 100 % ", 100), ("1%", 1)])
def test_percent(text: str, value: int) -> None:
    assert parse_percent("gpu", text) == value


@pytest.mark.parametrize("text", ["0", "0%", "101%", "10.5%", "-1", "%", "10%%", "x", "1e1", ""])
def test_no_percent(text: str) -> None:
    with pytest.raises(InvalidField) as refused:
        parse_percent("gpu", text)
    assert "gpu" in str(refused.value) and "1% to 100%" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "plain", "count"),
    [
        ("any", "any", 1),
        ("ANY:2", "any:2", 2),
        ("any:1", "any", 1),
        (" 00 , 2", "0,2", 2),
        ("GPU-00000001", "GPU-00000001", 1),
    ],
)
def test_devices(text: str, plain: str, count: int) -> None:
    wanted = parse_device("gpu_device", text)
    assert (str(wanted), wanted.count) == (plain, count)
    assert parse_device("gpu_device", str(wanted)) == wanted


@pytest.mark.parametrize(
    "text", ["", "any:0", "any:x", "-1", "0,,1", "0,0", "0,00", "GPU-", "../0"]
)
def test_no_devices(text: str) -> None:
    with pytest.raises(InvalidField, match="gpu_device"):
        parse_device("gpu_device", text)


def test_what_is_left_out_is_in_proportion() -> None:
    def part(**intent: str) -> tuple[int, int]:
        found = gpu_part(parse_intent(intent), CEILING, 50, 50, [])
        assert found is not None
        return found.percent, found.memory_bytes

    assert part(gpu="25%") == (25, 20 * GIB)
    assert part(gpu_memory="8G") == (10, 8 * GIB)
    assert part(gpu_memory="1M") == (1, 1 << 20)
    assert part(gpu="50%", gpu_memory="1G") == (50, GIB)
    assert gpu_part(parse_intent({"memory": "1G"}), CEILING, 50, 50, []) is None


def test_priority_is_at_most_the_sessions() -> None:
    advice: list[str] = []
    intent = parse_intent({"gpu": "10%", "gpu_priority": "important"})
    part = gpu_part(intent, CEILING, 50, 50, advice)
    assert part is not None and part.priority == 50
    assert "gpu_priority" in advice[0] and "80" in advice[0]


def test_a_host_without_gpus_says_why() -> None:
    nothing = GpuCeiling(why_none="NVML: driver not loaded")
    with pytest.raises(InvalidField, match="driver not loaded"):
        gpu_part(parse_intent({"gpu": "10%"}), nothing, 50, 50, [])


parts = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 100), st.integers(1, 80)), max_size=40)


@given(parts)
def test_no_device_is_granted_twice(asked: list[tuple[int, int, int]]) -> None:
    holdings: list[Holding] = []
    for count, percent, gib in asked:
        found = place(DeviceSelection(count), percent, gib * GIB, DEVICES, holdings)
        if found is not None:
            assert len(set(found)) == count
            holdings.append(Holding(found, percent, gib * GIB))
        else:
            left = [free_of(device, holdings) for device in DEVICES]
            fits = [f.percent >= percent and f.memory_bytes >= gib * GIB for f in left]
            assert sum(fits) < count
    for device in DEVICES:
        mine = [h for h in holdings if device.uuid in h.devices]
        assert sum(h.percent for h in mine) <= 100
        assert sum(h.memory_bytes for h in mine) <= 80 * GIB


def test_small_parts_leave_room_for_large_ones() -> None:
    holdings = [Holding((DEVICES[1].uuid,), 50, 10 * GIB)]
    assert place(DeviceSelection(), 20, GIB, DEVICES, holdings) == (DEVICES[1].uuid,)
    assert place(DeviceSelection(), 60, GIB, DEVICES, holdings) == (DEVICES[0].uuid,)


def asking(name: str, percent: int, priority: int = 50, since: int = 0) -> Asking:
    """A call that waits for at most 100 s."""
    devices = DeviceSelection(named=("0",))
    return Asking(name, priority, since, since + 100_000_000, devices, percent, GIB)


def test_who_starts() -> None:
    busy = [Holding((DEVICES[0].uuid,), 60, GIB)]
    found = admit(0, [asking("low", 30, 20), asking("high", 30, 80)], DEVICES, busy)
    assert list(found) == ["high"]
    # Age outweighs priority.
    waited = [asking("low", 30, 20, 0), asking("high", 30, 80, 70_000_000)]
    assert list(admit(75_000_000, waited, DEVICES, busy)) == ["low"]


def test_nobody_waits_for_ever() -> None:
    """A small call may pass a large one until that has waited for half of its time."""
    busy = [Holding((DEVICES[0].uuid,), 60, GIB)]
    large, small = asking("large", 80), asking("small", 10, since=1)
    assert list(admit(1_000, [large, small], DEVICES, busy)) == ["small"]
    assert list(admit(60_000_000, [large, small], DEVICES, busy)) == []


def test_majors() -> None:
    text = """Character devices:
  1 mem
195 nvidia
195 nvidia-modeset
195 nvidiactl
234 nvidia-nvswitch
235 nvidia-caps
510 nvidia-uvm

Block devices:
  7 loop
195 nvidia-fake
"""
    majors = read_majors(text)
    names = {major: kind.name for major, kind in majors.items()}
    assert names == {195: "DEVICES", 234: "SHARED", 235: "SHARED", 510: "SHARED"}


def test_mps_variables() -> None:
    found = environment(Path("/run/x/mps"), 25, 4 * GIB + 5, 2)
    assert found == {
        "CUDA_MPS_PIPE_DIRECTORY": "/run/x/mps",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=4096M,1=4096M",
    }
