"""Calls that are seen in more than one way, by events and by a look at the agent leaf, have one
report each. The processes are real ones; the kernel's events are written here."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentcgroupd.boundaries import events, processes, startup
from agentcgroupd.boundaries.events import Boundaries
from agentcgroupd.boundaries.processes import TICK_NS, Forked, Key, KnownProcesses
from agentcgroupd.boundaries.startup import is_at_startup
from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.config import BoundariesConfig
from agentcgroupd.errors import KnobError
from agentcgroupd.host.proc import children_of, command_line
from agentcgroupd.host.syscalls import process_stat
from agentcgroupd.intents.request import CallRequest
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Call, Session
from agentcgroupd.telemetry.notices import Notices
from tests.harness import wait_until
from tests.trees.wraps import codex

AGENT_ID = 17
ARGV = ["sh", "-c", "echo ready; read line; exit 3"]
EXIT_3 = 3 << 8
UNKNOWN = None


class FakeLifecycle:
    """Has the events that a test puts into its buffer, and the counts of those that were lost."""

    def __init__(self) -> None:
        self.buffer: list[AnyEvent] = []
        self.lost_now: dict[str, int] = {}
        self.handle: Callable[[list[AnyEvent]], None] = lambda batch: None

    def start(self, handle: Callable[[list[AnyEvent]], None]) -> None:
        self.handle = handle

    def drain(self) -> None:
        batch, self.buffer = self.buffer, []
        if batch:
            self.handle(batch)

    def lost(self) -> dict[str, int]:
        return self.lost_now

    def missed(self) -> dict[str, int]:
        return {}

    def manage(self, cgroup: int, kind: abi.CgroupKind) -> None:
        pass

    def read(self, on: bool) -> None:
        pass


class FakeCalls:
    """Reports a call when it is looked at, and a short one at once: (name, wait status)."""

    def __init__(self) -> None:
        self.open: dict[str, Call] = {}
        self.reports: list[tuple[str, int | None]] = []
        self.begun = 0
        self.fails = False

    def begin(
        self, session: Session, request: CallRequest, owner: Process | None, age_usec: int
    ) -> Call:
        assert request.observed and owner is None and age_usec >= 0
        if self.fails:
            raise KnobError(OSError(5, "it is busy"), "/pool/s/call-1", "cgroup.procs")
        self.begun += 1
        name = request.name
        call = cast(Call, SimpleNamespace(id=f"{self.begun}", name=name, exit_status=None))
        self.open[call.id] = call
        return call

    def attach(self, call: Call, process: Process) -> None:
        assert call.id in self.open

    def end_if_empty(self, call: Call) -> None:
        del self.open[call.id]  # KeyError: it had its report
        self.reports.append((call.name, call.exit_status))

    def check_postponed(self) -> None:
        pass

    def record_short(
        self, session: Session, name: str, argv: list[str], usec: int, status: int | None, *_: Any
    ) -> None:
        self.reports.append((name, status))


class Tool:
    """A shell command that is this process's child, and whose agent this process is."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(ARGV, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # Until it speaks, /proc may show it as it was before its exec.
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"
        self.key: Key = (self.process.pid, process_stat(self.process.pid).start_ticks)

    def end(self) -> None:
        """Let the tool end, and wait until it is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(10) == 3

    def _of_itself(self) -> abi.Process:
        return abi.Process(
            start_ns=self.key[1] * TICK_NS, pid=self.key[0], parent_pid=os.getpid(), comm=b"sh"
        )

    def fork(self) -> AnyEvent:
        """The event of its fork that on_fork in lifecycle.bpf.c would send."""
        parent_ns = process_stat(os.getpid()).start_ticks * TICK_NS
        return abi.ForkEvent(
            event=abi.Event(cgroup_id=AGENT_ID), child=self._of_itself(), parent_start_ns=parent_ns
        )

    def exec(self, argv: Sequence[str] = ARGV) -> AnyEvent:
        """The event of its exec that on_exec would send."""
        raw = b"".join(word.encode() + b"\0" for word in argv)
        is_cut = len(raw) > abi.ABI_ARGV_BYTES
        raw = raw[: abi.ABI_ARGV_BYTES]
        event = abi.ExecEvent(
            event=abi.Event(cgroup_id=AGENT_ID),
            process=self._of_itself(),
            argv_bytes=len(raw),
            argv_cut=is_cut,
        )
        event.argv[: len(raw)] = list(raw)
        return event

    def exit(self) -> AnyEvent:
        """The event of its end that on_exit would send."""
        return abi.ExitEvent(
            event=abi.Event(cgroup_id=AGENT_ID),
            process=self._of_itself(),
            wait_status=EXIT_3,
            executed=1,
        )


LIMITS = SimpleNamespace(exec_is_call=False)


class World:
    """Boundaries with one session, whose agent leaf holds this process and the tool."""

    def __init__(self, tool: Tool | Shell) -> None:
        self.lifecycle = FakeLifecycle()
        self.calls = FakeCalls()
        self.lost_counts: list[dict[str, int]] = []
        self.decided: list[tuple[int, int, int]] = []
        self.here = [os.getpid(), tool.key[0]]
        agent = SimpleNamespace(id=AGENT_ID, procs=lambda: self.here)
        session = SimpleNamespace(
            id="s", agent=agent, cgroup_path="/pool/s", closing=False, limits=LIMITS
        )
        notices = SimpleNamespace(moved=lambda *_: None, events_lost=self.lost_counts.append)
        self.boundaries = Boundaries(
            BoundariesConfig(),
            cast(Lifecycle, self.lifecycle),
            cast(Calls, self.calls),
            lambda: [cast(Session, session)],
            cast(Notices, notices),
            settled_ticks=0,
            declared=lambda *_: None,
            decided=self._note_decision,
        )
        self.here, there = [], self.here
        self.boundaries.session_opened(cast(Session, session))
        self.boundaries.start()
        self.here = there

    def _note_decision(self, pid: int, at_ns: int) -> None:
        self.decided.append((pid, at_ns, self.calls.begun))

    def events(self, *events: AnyEvent) -> None:
        """The kernel sends these, and they are read."""
        self.lifecycle.buffer += events
        self.lifecycle.drain()

    def lose_some(self) -> None:
        """Events are lost, which is found out after the next one."""
        self.lifecycle.lost_now = {"fork": len(self.lost_counts) + 1}
        self.events(abi.ForkEvent())
        assert self.lost_counts[-1] == {"fork": 1}


@pytest.fixture
def one_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes are in the agent leaf as far as their cgroup says."""
    for module in ("placement", "insiders"):
        where = f"agentcgroupd.boundaries.{module}.cgroup_of"
        monkeypatch.setattr(where, lambda pid: "/pool/s/agent")
    # A busy machine must not end a slice between two events that belong together here.
    monkeypatch.setattr("agentcgroupd.boundaries.events.SLICE_S", 10.0)


@pytest.fixture
def tool(one_leaf: None) -> Iterator[Tool]:
    """A tool that runs in the agent leaf."""
    made = Tool()
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.end()


def in_world(tool: Tool, test: Callable[[World], Awaitable[None]]) -> list[tuple[str, int | None]]:
    """Run this on a loop; the reports that came of it."""

    async def main() -> World:
        world = World(tool)
        await test(world)
        world.boundaries.close()
        return world

    world = asyncio.run(main())
    assert not world.calls.open
    return world.calls.reports


def test_what_a_resync_saw_is_not_seen_again_by_its_late_events(tool: Tool) -> None:
    async def test(world: World) -> None:
        world.lose_some()
        assert (world.calls.begun, world.calls.reports) == (1, [])
        world.events(tool.fork(), tool.exec())
        tool.end()
        world.events(tool.exit())
        assert world.calls.begun == 1

    assert in_world(tool, test) == [("echo", EXIT_3)]


@pytest.mark.parametrize("fails", [False, True])
def test_each_exec_is_decided_on(tool: Tool, fails: bool) -> None:
    """A program waits for that: when its call has begun, and also if none could."""

    async def test(world: World) -> None:
        event = tool.exec()
        event.event.at_ns = 5
        world.calls.fails = fails
        world.events(tool.fork(), event)
        assert world.decided == [(tool.key[0], 5, 0 if fails else 1)]
        world.calls.fails = False
        tool.end()
        world.events(tool.exit())

    in_world(tool, test)


def test_what_has_ended_is_not_seen_again_by_a_resync(tool: Tool) -> None:
    """A process is in its cgroup for a moment after its exit event."""

    async def test(world: World) -> None:
        world.events(tool.fork(), tool.exec(), tool.exit())
        assert len(world.calls.reports) == 1
        world.lose_some()
        assert world.calls.begun == 1

    assert in_world(tool, test) == [("echo", EXIT_3)]


@pytest.mark.parametrize("moved", [True, False])
def test_what_prune_found_dead_is_not_seen_again_by_its_late_events(
    tool: Tool, moved: bool
) -> None:
    """Whether it ended in a call or before it had one."""

    async def test(world: World) -> None:
        if moved:
            world.lose_some()
        tool.end()
        world.here.remove(tool.key[0])
        if not moved:
            world.events(tool.fork(), tool.exec())
        world.boundaries.prune()
        assert world.calls.reports == []  # its exit event may be on its way
        world.boundaries.prune()
        assert world.calls.reports == [("echo", UNKNOWN)]
        world.events(tool.fork(), tool.exec(), tool.exit())
        world.boundaries.prune()
        world.boundaries.prune()

    assert in_world(tool, test) == [("echo", UNKNOWN)]


def test_nothing_is_pruned_while_events_are_queued(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit event of what is dead may be one of them, and has its status."""

    async def test(world: World) -> None:
        tool.end()
        world.here.remove(tool.key[0])
        world.events(tool.fork(), tool.exec())
        world.boundaries.prune()
        world.lifecycle.buffer = [tool.exit()]
        with monkeypatch.context() as patch:
            patch.setattr(events, "SLICE_S", 0.0)  # so that none is dealt with at once
            world.boundaries.prune()
        assert world.boundaries.behind
        assert world.calls.reports == []
        await asyncio.sleep(0)
        assert world.calls.reports == [("echo", EXIT_3)]
        world.boundaries.prune()

    assert in_world(tool, test) == [("echo", EXIT_3)]


@pytest.mark.parametrize(
    ("second", "name"),
    [
        (["/bin/bash", "-c", "make -j2"], "make"),
        (["/bin/bash", "script"], "__CODEX_SNAPSHOT_OVERRID"),
        (["make", "-c", "x"], "__CODEX_SNAPSHOT_OVERRID"),
    ],
)
def test_a_long_script_that_becomes_a_shell_is_named_by_that_where_both_have_ended(
    tool: Tool, second: list[str], name: str
) -> None:
    """Only the head of the first is known; the second is what an agent ran for its model."""

    async def test(world: World) -> None:
        tool.end()
        world.here.remove(tool.key[0])
        first = tool.exec(["/bin/bash", "-c", codex("make -j2")])
        world.events(tool.fork(), first, tool.exec(second), tool.exit())

    ((found, status),) = in_world(tool, test)
    assert found.startswith(name) and status == EXIT_3


class Shell:
    """An interactive shell that keeps reading what its startup file has it run; both count as in
    the agent leaf."""

    def __init__(self, directory: Path, line: str) -> None:
        rc, self.fifo = directory / "rc", directory / "fifo"
        os.mkfifo(self.fifo)
        rc.write_text(line.format(fifo=self.fifo) + "\n")
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.execvp("bash", ["bash", "--noprofile", "--rcfile", str(rc), "-i"])
        self.key: Key = (self.pid, process_stat(self.pid).start_ticks)

    def child(self, *argv: str) -> int:
        """The process below it that runs this."""
        found: list[int] = []

        def runs() -> bool:
            found[:] = [pid for pid in self.below() if command_line(pid) == list(argv)]
            return bool(found)

        wait_until(f"{argv} runs", runs)
        return found[0]

    def below(self) -> list[int]:
        """All processes below it, parents first."""
        pids = [self.pid]
        for pid in pids:
            pids += [child for thread in children_of(pid) for child in thread]
        return pids[1:]

    def go_on(self) -> None:
        """Let go of what waits for the fifo."""
        os.close(os.open(self.fifo, os.O_WRONLY))

    def end(self) -> None:
        for pid in [*self.below(), self.pid]:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.terminal)


@pytest.mark.parametrize(
    "line", ["cat {fifo}", "x=$(cat {fifo})", "sh -c 'cat {fifo}; true'", "env -i cat {fifo} | cat"]
)
def test_what_startup_files_run_while_events_are_lost_is_no_call(
    one_leaf: None, tmp_path: Path, line: str
) -> None:
    shell = Shell(tmp_path, line)

    async def test() -> None:
        world = World(shell)
        startup = shell.child("cat", str(shell.fifo))
        world.here = [os.getpid(), shell.pid, *shell.below()]
        assert is_at_startup(startup)
        world.lose_some()
        assert world.calls.begun == 0
        shell.go_on()
        os.write(shell.terminal, f"/bin/cat {shell.fifo}\n".encode())
        job = shell.child("/bin/cat", str(shell.fifo))
        world.here = [os.getpid(), shell.pid, *shell.below()]
        assert not is_at_startup(job)
        world.lose_some()
        assert world.calls.begun == 1
        world.boundaries.close()

    try:
        asyncio.run(test())
    finally:
        shell.end()


def test_the_time_tells_what_is_of_startup_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell(tmp_path, "cat {fifo}")
    try:
        child = shell.child("cat", str(shell.fifo))
        assert is_at_startup(child) and not is_at_startup(os.getpid())
        monkeypatch.setattr(startup, "STARTUP_TICKS", -1)
        assert not is_at_startup(child)
    finally:
        shell.end()


def test_a_process_goes_from_forked_to_seen_to_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest that have ended are remembered, and no others."""
    monkeypatch.setattr(processes, "ENDED_MAX", 2)
    session = cast(Session, SimpleNamespace(id="s"))
    known = KnownProcesses()
    observed = processes.ObservedCall(session, "t", [], (1, 0), 0)
    for pid in (1, 2, 3):
        known.fork((pid, 0), Forked(session, "t", 0))
    known.join(observed, (1, 0))
    known.join(observed, (2, 0))
    assert [known.settled((pid, 0)) for pid in (1, 2, 3, 4)] == [True, True, False, False]
    assert known.forked((1, 0)) is None and known.seen((1, 0)) is observed
    assert known.end((1, 0)) == (None, observed)
    assert observed.members == {(2, 0)}
    assert known.end((1, 0)) == (None, None)
    assert known.end((4, 0)) == (None, None) and not known.settled((4, 0))
    known.end((2, 0))
    known.end((3, 0))
    assert [known.settled((pid, 0)) for pid in (1, 2, 3)] == [False, True, True]
    assert known.keys() == []
