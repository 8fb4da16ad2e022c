"""Which processes are known as agents' own."""

from __future__ import annotations

import os

import pytest

from agentcgroupd.boundaries import insiders
from agentcgroupd.boundaries.insiders import Insiders
from agentcgroupd.host.syscalls import process_stat


def test_processes_whose_end_nobody_told_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insiders, "PRUNED_MOST", 3)
    known = Insiders()
    ours = os.getpid(), process_stat(os.getpid()).start_ticks
    known.add_pid(ours[0])
    for number in range(9):
        known.add((os.getpid(), ours[1] + 1 + number))
    for _ in range(6):
        known.prune()
    assert list(known._keys) == [ours]
