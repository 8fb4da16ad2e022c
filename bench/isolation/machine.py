"""How fast this machine is, and what it has: the sizes of the mixes follow from it."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from agentcgroup_lab.replay import engine

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = ROOT / "bench/recordings"
EMULATED = os.environ.get("AGENTCG_EMULATED") == "1"


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of this machine."""

    touch_bytes_per_s: float
    spawn_s: float
    free_bytes: int


def measure() -> Speed:
    """Start some processes, and touch some memory as calls do. The best of three counts: a guest's
    memory is its host's only once it has been touched."""
    load, spawns, n_bytes = engine.find_load(), 5, 64 << 20
    started = time.monotonic()
    for _ in range(spawns):
        subprocess.run([load, "--help"], stdout=subprocess.DEVNULL, check=True)
    spawn_s = (time.monotonic() - started) / spawns
    touches_s = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([load], input=f"0 {n_bytes} 0\n", text=True, check=True)
        touches_s.append(max(time.monotonic() - started - spawn_s, 0.001))
    fields = dict(line.split(":", 1) for line in open("/proc/meminfo", encoding="ascii"))
    free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    return Speed(n_bytes / min(touches_s), spawn_s, free_bytes)
