"""File systems of their own for tests: on a device of zram, the only kind that both guests have."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentcgroupd.host.zram import Zram
from tests.harness import wait_until


@contextmanager
def mounted_zram(point: Path, size_bytes: int) -> Iterator[Path]:
    """Make a device of this size with ext4 on it, and mount it at `point`; it is gone afterwards.
    For guests: this machine's own mounts are left alone."""
    subprocess.run(["modprobe", "zram", "num_devices=0"], check=True)
    made = Zram(int(Path("/sys/class/zram-control/hot_add").read_text()))
    try:
        made.write("disksize", str(size_bytes))
        command = ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(made.node)]
        subprocess.run(command, check=True)
        point.mkdir()
        subprocess.run(["mount", "-t", "ext4", str(made.node), str(point)], check=True)
        try:
            yield point
        finally:
            # A process that was killed lets go of its files a moment after its cgroup is empty.
            wait_until("it is not busy", lambda: _command_works("umount", str(point)), every_s=0.1)
    finally:
        Path("/sys/class/zram-control/hot_remove").write_text(str(made.number))


def _command_works(*argv: str) -> bool:
    return subprocess.run(argv).returncode == 0
