"""What a launcher in a sandbox asks by its arguments, and the answer that fits into a signal."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentcgroupd.boundaries.rules import DECLARES, declares
from agentcgroupd.bpf import abi
from agentcgroupd.config import LimitsConfig
from agentcgroupd.errors import InvalidField
from agentcgroupd.host.syscalls import queue_signal
from agentcgroupd.intents.parse import PARSERS
from agentcgroupd.rpc import sealed
from agentcgroupd.rpc.budgets import Budgets
from agentcgroupd.rpc.packets import PACKET_BYTES_MAX
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Session
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.turns import Turns
from tests.harness import ROOT

HEAD = DECLARES + b"0:1f\0"
HEADER = (ROOT / "agent_sdk/exec/sealed.h").read_text()


def test_the_words_before_the_launchers_own_arguments_are_the_request() -> None:
    own = b"--\0agentcg-exec\0--name=other\0--\0rm\0"
    request = sealed.request_in(HEAD + b"begin\0name=a\0memory=1G\0arg=x\0arg=--\0" + own)
    assert (request.verb, request.args) == ("begin", ["x", "--"])
    assert request.values == {"name": "a", "memory": "1G"}


@pytest.mark.parametrize(
    "rest",
    [b"", b"begin\0", b"begin\0name=a\0", b"--\0", b"begin\0name\0--\0", b"begin\0a=1\0a=2\0--\0"],
)
def test_what_is_no_request_is_refused(rest: bytes) -> None:
    with pytest.raises(InvalidField):
        sealed.request_in(HEAD + rest)


def test_a_request_has_the_length_of_a_packet_at_most() -> None:
    fits = PACKET_BYTES_MAX - len(HEAD) - len(b"begin\0arg=")
    sealed.request_in(HEAD + b"begin\0arg=" + b"x" * fits + sealed.END)
    with pytest.raises(InvalidField):
        sealed.request_in(HEAD + b"begin\0arg=" + b"x" * (fits + 1) + sealed.END)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (HEAD, True),
        (DECLARES, False),  # the mark has a value
        (b"agentcg-exec\0--sealed\0begin\0", False),
        (b"x" + HEAD, False),
        (b"agentcg-exec\0--name=--sealed=0:1\0", False),
    ],
)
def test_a_declaration_is_known_by_its_first_two_arguments(arguments: bytes, found: bool) -> None:
    event = abi.ExecEvent(argv_bytes=len(arguments))
    event.argv[: len(arguments)] = list(arguments)
    assert declares(event) is found


def test_each_field_has_a_mark_of_its_own() -> None:
    marks = {sealed.name_mark(field) for field in ("name", "call", *PARSERS)}
    assert len(marks) == 2 + len(PARSERS) and 0 not in marks
    assert max(marks) < 1 << 16
    assert sealed.name_mark("") == 0


def test_the_launcher_has_the_same_numbers() -> None:
    for name, value in (("OK", sealed.OK), ("REFUSED", sealed.REFUSED), ("WAIT", sealed.WAIT)):
        assert re.search(rf"ANSWER_{name} = {value}\b", HEADER), name
    assert f"0x{sealed.ANSWER_MAGIC:x}ULL" in HEADER
    assert f"ANSWER_SIGNAL = {sealed.ANSWER_SIGNAL.name}," in HEADER
    name, option = DECLARES.decode().split("\0")
    assert re.search(rf'SEALED_NAME\s+"{name}"', HEADER)
    assert re.search(rf'SEALED_OPTION "{option}"', HEADER)
    program = (Path(ROOT) / "bpf/lifecycle.bpf.c").read_text()
    assert f'"{name}\\0{option}"' in program


WAITS = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])
print("blocked", flush=True)
info = signal.sigtimedwait([signal.SIGURG], 60)
print(info.si_code, info.si_pid, info.si_uid)
"""
"""A process with one thread: of several, one that does not wait could get the signal."""


def test_a_value_comes_with_a_signal() -> None:
    value = sealed.ANSWER_MAGIC << 32 | 0xABCDEF
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "blocked\n"
        pidfd = os.pidfd_open(child.pid)
        try:
            queue_signal(pidfd, signal.SIGURG, value)
        finally:
            os.close(pidfd)
        assert child.stdout.readline().split() == ["-1", str(os.getpid()), str(os.getuid())]


class Crowded:
    """A door whose sessions may ask for little, and what is done for those who ask."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, packets_per_s: int) -> None:
        # No token comes back meanwhile, however busy the machine is.
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 1000.0)
        metrics = Metrics()
        limits = LimitsConfig(packets_per_s=packets_per_s)
        budgets = Budgets(limits, 8, metrics)
        self.looked_up: list[int] = []
        self.served: list[int] = []
        self.answers: list[int] = []
        monkeypatch.setattr(Process, "find", self._find)
        monkeypatch.setattr(sealed, "queue_signal", lambda fd, number, v: self.answers.append(v))
        monkeypatch.setattr(sealed.SealedDoor, "_serve", lambda _, peer, *rest: self._serve(peer))
        notices = cast(Any, SimpleNamespace(metrics=metrics))
        turns = cast(Turns, SimpleNamespace(submit_or_do=lambda key, serve: serve()))
        self.door = sealed.SealedDoor({}, budgets, turns, notices)

    def _find(self, pid: int, start_ticks: int) -> Any:
        self.looked_up.append(pid)
        return SimpleNamespace(pid=pid, start_ticks=start_ticks, pidfd=-1, close=lambda: None)

    def _serve(self, peer: Any) -> None:
        self.served.append(peer.process.pid)

    def ask(self, session: str, pid: int, head: bytes = HEAD, is_whole: bool = False) -> None:
        """A launcher declares a call."""
        of = cast(Session, SimpleNamespace(turns_key=f"session {session}"))
        self.door.declared(of, (pid, 1), head, is_whole)


def test_nothing_is_opened_for_who_asks_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many declarations: a few are served, some are refused, and for the rest nothing is opened;
    another session is served all the same."""

    async def ask() -> None:
        crowded = Crowded(monkeypatch, packets_per_s=20)
        for pid in range(1, 5001):
            crowded.ask("greedy", pid)
        assert len(crowded.served) == 20
        assert len(crowded.answers) == 16  # a fifth of its packets, a quarter for each
        assert len(crowded.looked_up) == 36
        assert {answer & 0xFF for answer in crowded.answers} == {sealed.REFUSED}
        crowded.ask("other", 9000)
        assert crowded.served[-1] == 9000

    asyncio.run(ask())


def test_what_holds_no_request_takes_a_token_and_is_read_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def ask() -> None:
        crowded = Crowded(monkeypatch, packets_per_s=20)
        for pid in range(1, 21):
            crowded.ask("greedy", pid, is_whole=True)
        assert crowded.served == []
        assert len(crowded.answers) == 20
        crowded.ask("greedy", 21, HEAD + b"begin\0--\0", is_whole=True)
        assert crowded.served == []  # all its tokens were spent on nothing

    asyncio.run(ask())
