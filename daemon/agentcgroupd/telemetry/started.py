"""What a daemon says once it has started: what it can enforce here, and where it is reached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from agentcgroupd.units import show_bytes

LIMITS = {"memory": "memory", "cpu": "CPU", "pids": "processes", "io": "I/O"}
"""What each controller is for, in words."""
DOCTOR = "`agentcg doctor` says why, and what to do"


def started(
    pool_path: Path,
    memory_max_bytes: int | None,
    cpu_millicores: int,
    controllers: Sequence[str],
    features: Iterable[tuple[str, bool]],
    run_dir: Path,
) -> tuple[str, str, str]:
    """Three lines. `features`: those of the kernel's programs, and whether each works."""
    memory = "memory without a limit"
    if memory_max_bytes is not None:
        memory = f"{show_bytes(memory_max_bytes)} of memory"
    cpus = f"{cpu_millicores / 1000:g} CPUs"
    enforced = _enforced(controllers)
    works = [name for name, is_there in features if is_there]
    missing = [name for name, is_there in features if not is_there]
    programs = f"programs in the kernel: {len(works)} of {len(works) + len(missing)} features"
    if missing:
        programs += f", not {', '.join(missing)}; {DOCTOR}"
    return (
        f"all sessions together have {memory} and {cpus}; limits of each call: {enforced}",
        programs,
        f"ready: pool {pool_path}, sockets in {run_dir}; next: agentcg session run NAME -- COMMAND",
    )


def _enforced(controllers: Sequence[str]) -> str:
    there = [word for name, word in LIMITS.items() if name in controllers]
    lacking = [word for name, word in LIMITS.items() if name not in controllers]
    if not there:
        return f"none is enforced; {DOCTOR}"
    text = ", ".join(there)
    return f"{text}, not {', '.join(lacking)}; {DOCTOR}" if lacking else text
