"""The disk of its own that a guest may have, whose contents are nobody's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.guest.vm import DISK_SERIAL


def find_disk() -> Path:
    """Return its device; a guest without one skips the test."""
    subprocess.run(["modprobe", "virtio_blk"], check=False)
    for serial in Path("/sys/block").glob("vd*/serial"):
        if serial.read_text().strip() == DISK_SERIAL:
            return Path("/dev") / serial.parent.name
    pytest.skip("the guest has no disk of its own (--disk MIB:MIB_PER_S)")
