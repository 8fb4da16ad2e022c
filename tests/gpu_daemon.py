"""The daemon with stand-ins for NVML and MPS, which show what is in the file $AGENTCG_TEST_GPUS."""

from __future__ import annotations

import os
from pathlib import Path

from agentcgroupd import __main__ as program
from agentcgroupd import daemon
from agentcgroupd.gpu.enforcement import GpuSources
from tests.gpu_fakes import MAJORS, FakeMpsControl, FakeNvml

STATE = Path(os.environ["AGENTCG_TEST_GPUS"])


class FakedDaemon(daemon.Daemon):
    """The real daemon but for the sources of its GPUs."""

    gpu_sources = GpuSources(
        nvml=lambda: FakeNvml(STATE),
        majors=lambda: MAJORS,
        mps=lambda pipes, logs, devices: FakeMpsControl(STATE, pipes),
    )


def main() -> int:
    """Run the daemon's main function with the class above."""
    setattr(program, "Daemon", FakedDaemon)  # noqa: B010  # its own name is not exported
    return program.main()
