"""What a replay runs on: registered backends, the program that plays calls, and what is missing."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from agentcgroup_lab.replay import backends
from agentcgroup_lab.replay.backends import ReplayError, current_bytes, make_backend, register
from agentcgroup_lab.replay.engine import find_load
from agentcgroupd.errors import CgroupGone, KnobError


def test_a_strategy_that_somebody_registered_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    with pytest.raises(ValueError, match=r"'mine'; allowed: none, static, high, ours"):
        make_backend("mine", 1, 1, tmp_path)
    made: list[tuple[int, int, Path, float]] = []

    def make(*arguments: Any) -> Any:
        made.append(arguments)
        return "a backend"

    register("mine", make)
    backend: object = make_backend("mine", 1 << 30, 3, tmp_path, 0.5)
    assert backend == "a backend"
    assert made == [(1 << 30, 3, tmp_path, 0.5)]


def test_what_a_cgroup_that_is_gone_holds_is_not_known() -> None:
    class Gone:
        def read(self, knob: object) -> int:
            raise CgroupGone(OSError(errno.ENODEV, "gone"), "a/cgroup", "memory.current")

    cgroup: Any = Gone()
    assert current_bytes(cgroup) is None


def test_agentcg_load_is_looked_for_as_programs_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "agentcg-load"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    monkeypatch.delenv("AGENTCG_LOAD", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_load() == str(program)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(ReplayError, match="AGENTCG_LOAD"):
        find_load()
    monkeypatch.setenv("AGENTCG_LOAD", str(program))
    assert find_load() == str(program)


def test_the_replayed_daemon_runs_as_its_unit_says() -> None:
    unit = Path(__file__).parents[3] / "systemd/agentcgroupd.service"
    assert f"\nNice={backends.NICE}\n" in unit.read_text(encoding="utf-8")


class Pool:
    """A cgroup that refuses its CPU weight."""

    def __init__(self, number: int) -> None:
        self._number = number

    def write(self, knob: object, value: int) -> None:
        raise KnobError(OSError(self._number, "no"), "a/pool", "cpu.weight", str(value))


def test_a_pool_without_a_cpu_controller_has_no_weight_and_any_other_refusal_is_told() -> None:
    absent: Any = Pool(errno.ENOENT)
    backends._weigh_cpu(absent)
    refusing: Any = Pool(errno.EACCES)
    with pytest.raises(KnobError):
        backends._weigh_cpu(refusing)
