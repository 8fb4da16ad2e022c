"""The daemon with fakes for NVML and MPS, which show what the file in $AGENTCG_TEST_GPUS says."""

from __future__ import annotations

import os
from pathlib import Path

from agentcgroupd import __main__ as program
from agentcgroupd import daemon
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.gpu.service import Gpus
from agentcgroupd.sessions.registry import Sessions
from tests.gpu_fakes import MAJORS, FakeControl, FakeNvml

STATE = Path(os.environ["AGENTCG_TEST_GPUS"])


class FakedDaemon(daemon.Daemon):
    """All else is real."""

    def make_gpus(self, sessions: Sessions, actions: Actions) -> Gpus:
        """The real one, on faked devices."""
        gpus = super().make_gpus(sessions, actions)
        gpus.make_nvml = lambda: FakeNvml(STATE)
        gpus.read_majors = lambda: MAJORS
        gpus.make_control = lambda pipes, logs, devices: FakeControl(STATE, pipes)
        return gpus


def main() -> int:
    """As the daemon's."""
    setattr(program, "Daemon", FakedDaemon)  # noqa: B010  # its own name is not exported
    return program.main()
