"""How much of the CPUs is idle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentcgroupd.host import idle

TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """A machine of two CPUs, of which this process may use one or both."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, mine: set[int]) -> None:
        self.now, self.idle_s, self._path = 100.0, [5.0, 7.0], path
        monkeypatch.setattr(idle, "STAT", path)
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: mine)
        self.write()

    def write(self) -> None:
        lines = [f"cpu{n} 9 9 9 {round(s * TICKS)} 0 9" for n, s in enumerate(self.idle_s)]
        self._path.write_text("\n".join(["cpu 1 2 3 4 5", *lines, "intr 5"]) + "\n")

    def run(self, seconds: float, *idle_s: float) -> None:
        self.now += seconds
        self.idle_s = [before + s for before, s in zip(self.idle_s, idle_s, strict=True)]
        self.write()


@pytest.mark.parametrize(
    ("mine", "idle_s", "millicores"),
    [
        ({0, 1}, (0.5, 0.5), 2000),
        ({0, 1}, (0.0, 0.25), 500),
        ({0, 1}, (0.0, 0.0), 0),
        ({1}, (0.5, 0.1), 200),
        ({0, 1}, (0.6, 0.6), 2000),
    ],
)
def test_idle_time_of_the_cpus_that_may_be_used(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mine: set[int],
    idle_s: tuple[float, float],
    millicores: int,
) -> None:
    machine = Machine(monkeypatch, tmp_path / "stat", mine)
    cpus = idle.IdleCpus()
    machine.run(0.5, *idle_s)
    assert cpus.millicores() == pytest.approx(millicores, abs=25)


def test_what_was_long_ago_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path / "stat", {0, 1})
    cpus = idle.IdleCpus()
    machine.run(60, 0, 0)
    cpus.sample()
    machine.run(0.5, 0.5, 0.5)
    assert cpus.millicores() == pytest.approx(2000, abs=25)
    cpus.sample()
    machine.run(0.01, 0, 0)
    assert cpus.millicores() > 1900, "too short a time says little"


def test_this_machine() -> None:
    assert 0 <= idle.IdleCpus().millicores() <= 1000 * len(os.sched_getaffinity(0))
