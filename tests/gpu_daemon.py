"""The daemon with fakes for NVML and MPS, which show what the file in $AGENTCG_TEST_GPUS says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from agentcgroupd import __main__ as program
from agentcgroupd import daemon
from tests.gpu_fakes import MAJORS, FakeControl, FakeNvml

STATE = Path(os.environ["AGENTCG_TEST_GPUS"])


class FakedDaemon(daemon.Daemon):
    """All else is real."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gpus.make_nvml = lambda: FakeNvml(STATE)
        self.gpus.read_majors = lambda: MAJORS
        self.gpus.make_control = lambda pipes, logs, devices: FakeControl(STATE, pipes)


def main() -> int:
    """As the daemon's."""
    setattr(program, "Daemon", FakedDaemon)  # noqa: B010  # its own name is not exported
    return program.main()
