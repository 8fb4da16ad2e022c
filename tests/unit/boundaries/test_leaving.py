"""Floods of processes that leave a call: all are counted at once, few are told, in their turn."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentcgroupd.boundaries import leaving
from agentcgroupd.boundaries.leaving import Moves
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.state.ending import Account
from agentcgroupd.state.session import Call
from agentcgroupd.telemetry.notices import Notices

CALL_ID = 17


class Told:
    """What is told, in its order."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def process_left(self, call: Call, gone: Any, is_main: bool, words: str) -> None:
        self.words.append(words)

    def more_left(self, call: Call) -> None:
        self.words.append("more")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    cgroup = SimpleNamespace(set_xattr=lambda value: None)
    main = SimpleNamespace(pid=5, start_ticks=0)
    session = SimpleNamespace(cgroup=None)
    monkeypatch.setattr(leaving, "outside_path", lambda call, pool, found: None)
    return cast(
        Call,
        SimpleNamespace(
            account=Account(), cgroup=cgroup, main=main, session=session, record=lambda: b""
        ),
    )


def left(pid: int, mover: int = 1, path: bytes = b"/x", more: int = 0) -> abi.LeftEvent:
    """The event that tell_left in lifecycle.bpf.c would send."""
    event = abi.LeftEvent(
        event=abi.Event(cgroup_id=CALL_ID),
        process=abi.Process(pid=pid, comm=b"sleep"),
        mover=abi.Process(pid=mover, comm=b"systemd"),
        more=more,
    )
    event.path[: len(path)] = list(path)
    return event


def test_of_a_flood_four_are_told_and_that_there_are_more(call: Call) -> None:
    told = Told()
    moves = Moves(cast(Lifecycle, None), cast(Notices, told), {CALL_ID: call})
    later = [tell for pid in range(100, 400) for tell in moves.count(left(pid))]
    assert call.account.gone_count == 300 and told.words == []
    for tell in later:
        tell()
    where = "to /x, where its limits do not hold."
    assert told.words == [
        *(f"sleep ({pid}) was moved by systemd (1) {where}" for pid in range(100, 104)),
        "more",
    ]
    assert len(call.account.facts) == 4 and not call.account.gone_more


def test_what_the_program_or_the_buffer_left_out_is_known(call: Call) -> None:
    moves = Moves(cast(Lifecycle, None), cast(Notices, Told()), {CALL_ID: call})
    moves.count(left(100, more=1))
    assert call.account.gone_more
    call.account.command_begins(None)
    moves.lost()
    moves.lost()
    assert call.account.gone_more and len(call.account.facts) == 2


def test_the_main_process_counts_apart_and_the_daemon_not_at_all(call: Call) -> None:
    moves = Moves(cast(Lifecycle, None), cast(Notices, Told()), {CALL_ID: call})
    for _ in range(100):
        moves.count(left(5))
    assert moves.count(left(100, mover=os.getpid())) == []
    assert (call.account.gone_count, call.account.main_moves) == (0, 100)
    assert len(call.account.facts) == 4


def test_a_place_that_is_gone_is_said_so(call: Call) -> None:
    moves = Moves(cast(Lifecycle, None), cast(Notices, Told()), {CALL_ID: call})
    moves.count(left(100, path=b""))
    assert call.account.gone[0].path == "a cgroup that is gone"
