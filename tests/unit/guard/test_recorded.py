"""Mixes of the project's own recordings, on pools that they exceed, under the real guard."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from bench.isolation.machine import RECORDINGS, Speed
from bench.isolation.mixes import Settings, headers, make_mix
from tests.unit.guard.recorded_model import Outcome, replay
from tests.unit.guard.test_herd import made_up_clock

__all__ = ["made_up_clock"]
SETTINGS = Settings(
    length_s=10.0,
    speed=Speed(touch_bytes_per_s=9e9, spawn_s=0.002, free_bytes=120 << 30),
    cpus=16,
    emulated=False,
    lanes=4,
)


def outcomes(directory: Path, ratio: float, numbers: range) -> list[Outcome]:
    known = headers([RECORDINGS])
    mixes = [make_mix(number, known, SETTINGS) for number in numbers]
    found = [replay(mix, ratio, directory, SETTINGS.cpus) for mix in mixes if mix.feasible(ratio)]
    for one in found:
        print(one)
    return found


@pytest.mark.parametrize(
    ("ratio", "numbers", "lost_most", "mean_most"),
    [(1.5, range(2), 0, 1.25), (2.0, range(3), 1, 1.6)],
)
def test_calls_live_and_the_important_session_does_not_notice(
    tmp_path: Path, ratio: float, numbers: range, lost_most: int, mean_most: float
) -> None:
    found = outcomes(tmp_path, ratio, numbers)
    assert len(found) == len(numbers)
    assert sum(one.killed for one in found) <= lost_most
    assert max(one.important_ratio for one in found) <= 1.05
    assert fmean(one.makespan for one in found) <= mean_most
