"""What the daemon pins in bpffs, one directory for each pool: removing it with the service."""

from __future__ import annotations

import os
from pathlib import Path

PINS = Path("/sys/fs/bpf/agentcgroup")
"""Made by the unit (ExecStartPre=); daemon/agentcgroupd/bpf/pins.py has it too."""
MOUNTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


def remove_pins(place: Path = PINS, mounts: tuple[Path, ...] = MOUNTS) -> bool:
    """Remove the pins of pools that are gone, and the directory if nothing else is in it; returns
    whether it is gone now and was there. Another daemon, in a pool of its own, keeps its pins.
    Raises OSError."""
    if not place.is_dir():
        return False
    living = {number for mount in mounts for number in _cgroups(mount)}
    for pool in place.iterdir():
        if pool.name not in living and pool.is_dir():
            for pin in pool.iterdir():
                pin.unlink(missing_ok=True)
            pool.rmdir()
    if any(place.iterdir()):
        return False
    place.rmdir()
    return True


def _cgroups(mount: Path) -> set[str]:
    """Ids of all cgroups below a mount, as the kernel gives them to their directories."""
    found = set()
    for directory, _, _ in os.walk(mount):
        try:
            found.add(str(os.stat(directory).st_ino))
        except FileNotFoundError:  # removed meanwhile
            continue
    return found
