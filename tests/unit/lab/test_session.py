"""A replayed session that cannot even start is an error with its reason, never a lost one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentcgroup_lab.replay.backends import Place, ReplayError
from agentcgroup_lab.replay.session import Session, SessionSpec
from agentcgroup_lab.trace.plan import AgentStep, Options, Plan, PlannedCall, Step


class FakeCgroup:
    """What is asked of a session's cgroup: whether something in it was killed for memory."""

    def __init__(self, oom_kills: int = 0) -> None:
        self._oom_kills = oom_kills

    def read_if(self, knob: object) -> dict[str, int]:
        return {"oom_kill": self._oom_kills}


class FakeBackend:
    """A strategy without words of its own."""

    def call_prefix(self, tool: str) -> tuple[str, ...]:
        return ()


CALL = PlannedCall(0, "a", "g++", 0.0, 0.01, 0.0, False, (Step(10, 4096, 0),))
PLAN = Plan("t", 0.02, (AgentStep(0.0, 4096, 0),), (CALL,), Options())


def session(work: Path, *prefix: str, oom_kills: int = 0) -> Session:
    cgroup: Any = FakeCgroup(oom_kills)
    return Session(SessionSpec("s1", "r", PLAN), Place(cgroup, prefix), work)


def run(made: Session, load: str) -> Session:
    """Run it to its end."""
    backend: Any = FakeBackend()
    made.start(made.write_job(backend, load, made.work / "no-gate"), {})
    assert made.driver is not None
    made.driver.wait(60)
    made.poll(1.0)
    return made


def test_a_driver_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    made = session(tmp_path, "/bin/sh", "-c", "echo no such session >&2; exit 125")
    with pytest.raises(ReplayError, match=r"s1 could not start \(status 125\): no such session"):
        run(made, "/bin/true")


def test_one_that_was_killed_for_memory_is_lost(tmp_path: Path) -> None:
    made = session(tmp_path, "/bin/sh", "-c", "kill -9 $$", oom_kills=1)
    assert run(made, "/bin/true").state == "lost"


def test_a_call_whose_program_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"call 0 of session s1 cannot run: .*no/program"):
        run(session(tmp_path), str(tmp_path / "no/program"))


def test_a_call_that_does_not_understand_its_schedule_is_told(tmp_path: Path) -> None:
    load = tmp_path / "load"
    load.write_text("#!/bin/sh\necho line 1: nonsense >&2\nexit 2\n")
    load.chmod(0o755)
    with pytest.raises(ReplayError, match="cannot run: line 1: nonsense"):
        run(session(tmp_path), str(load))


def test_what_runs_to_its_end_has_finished(tmp_path: Path) -> None:
    made = run(session(tmp_path), "/bin/true")
    assert made.state == "finished" and made.call_ended(0)
    assert json.loads((made.work / "job.json").read_text())["calls"][0]["index"] == 0
