"""Tool calls of agents that say nothing: where a call begins is seen from the kernel's side.

A process that was forked in a session's agent leaf and executes what a rule names begins a call: it
is moved into a leaf of its own with everything that it forks, double-forked children and new
sessions (setsid) included. Nested shells stay in the call they are in. A process that was put into
the agent leaf from outside is the agent itself, never a call.

Between the exec and the move a few hundred microseconds pass. What the process forks meanwhile is
known by its fork event and moved after it; a process that has ended by then still gets its report,
from its exit event.
"""

from __future__ import annotations

import asyncio
import fnmatch
import logging
import os
import re
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.calls import Calls
from agentcgroupd.config import BoundariesConfig
from agentcgroupd.errors import (
    AgentcgroupdError,
    BpfError,
    CgroupGone,
    FailedPrecondition,
    KnobError,
)
from agentcgroupd.intent import NAME_CHARS_MAX
from agentcgroupd.policy.actions import Actions
from agentcgroupd.session import AGENT_LEAF, Call, Process, Session
from agentcgroupd.syscalls import cgroup_of, pidfd_alive, process_stat

log = logging.getLogger(__name__)

OWN_LAUNCHERS = ("agentcg", "agentcg-exec")
"""They ask for a call themselves."""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
CHECK_AFTER_S = 0.2
"""After events, until the kernel is asked whether it left some out; also how long a dead process's
exit event may be on its way."""
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

Key = tuple[int, int]
"""(pid, start time in clock ticks), as in the daemon's other records of processes."""


def key_of(process: abi.Process) -> Key:
    """Whose event it is."""
    return process.pid, process.start_ns // TICK_NS


def argv_of(event: abi.ExecEvent) -> list[str]:
    """The head of a program's arguments."""
    raw = bytes(event.argv[: event.argv_bytes])
    words = raw.split(b"\0")
    if not event.argv_cut and words:
        words.pop()  # what follows the last NUL
    return [word.decode("utf-8", "replace") for word in words]


def tool_name(comm: str, argv: list[str]) -> str:
    """What the call is called: the program, or the first command of a shell's `-c`."""
    name = comm
    script = shell_command(argv)
    if script is not None:
        name = _first_command(script) or comm
    name = _CONTROLS.sub("?", os.path.basename(name) or comm)
    return name[:NAME_CHARS_MAX] or "tool"


def shell_command(argv: list[str]) -> str | None:
    """The command of `sh -c COMMAND`, None for another way to start a shell: the first operand, if
    a `c` is among the options (POSIX.1-2024, sh)."""
    found, words = False, iter(argv[1:])
    for word in words:
        if word in ("-", "--") or word[:1] not in ("-", "+"):
            return (next(words, None) if word in ("-", "--") else word) if found else None
        if word.startswith("--"):
            if word in ("--rcfile", "--init-file"):
                next(words, None)
            continue
        found = found or (word[0] == "-" and "c" in word)
        if word[-1] in "oO":
            next(words, None)
    return None


def _first_command(script: str) -> str:
    try:
        words = shlex.split(script, comments=True)
    except ValueError:
        words = script.split()
    for word in words:
        head, assigned, _ = word.partition("=")
        if not (assigned and head.isidentifier()):
            return word.strip("(){};&|")
    return ""


def begins_call(config: BoundariesConfig, comm: str, argv: list[str]) -> bool:
    """Whether the rules say so; the first that fits decides, none: no."""
    if comm in OWN_LAUNCHERS:
        return False
    argument = argv[1] if len(argv) > 1 else ""
    for rule in config.rules:
        if any(fnmatch.fnmatchcase(comm, pattern) for pattern in rule.program) and (
            fnmatch.fnmatchcase(argument, rule.first_argument)
        ):
            if rule.shell_command and shell_command(argv) is None:
                continue
            return rule.begins_call
    return False


def may_begin_call(config: BoundariesConfig, comm: str) -> bool:
    """Whether the rules could say so for some arguments."""
    return comm not in OWN_LAUNCHERS and any(
        rule.begins_call and any(fnmatch.fnmatchcase(comm, pattern) for pattern in rule.program)
        for rule in config.rules
    )


@dataclass(slots=True)
class Forked:
    """A process that was forked in an agent leaf and has begun no call."""

    session: Session
    comm: str
    """When it was forked: its parent's."""
    at_ns: int
    executed: bool = False


@dataclass(slots=True, eq=False)
class Sighting:
    """A call that began with an exec in an agent leaf."""

    session: Session
    name: str
    argv: list[str]
    main: Key
    at_ns: int
    """Of the exec, CLOCK_MONOTONIC."""
    call: Call | None = None
    members: set[Key] = field(default_factory=set)
    exit: abi.ExitEvent | None = None


class Boundaries:
    """Turns processes' lives into calls. Runs on the event loop."""

    def __init__(
        self,
        config: BoundariesConfig,
        lifecycle: Lifecycle,
        calls: Calls,
        sessions: Callable[[], Iterable[Session]],
        actions: Actions,
    ) -> None:
        self._config = config
        self._lifecycle = lifecycle
        self._calls = calls
        self._sessions = sessions
        self._actions = actions
        self._agents: dict[int, Session] = {}
        self._call_of_cgroup: dict[int, Call] = {}
        self._forked: dict[Key, Forked] = {}
        self._seen: dict[Key, Sighting] = {}
        self._queue: deque[AnyEvent] = deque()
        self._busy = False
        self._dead: set[Key] = set()
        self._lost_before: dict[str, int] = {}
        self._missed_before: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._check: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin with what runs now."""
        self._lost_before = self._lifecycle.lost()
        self._missed_before = self._lifecycle.missed()
        self._lifecycle.start(self.handle)
        self.resync()

    # What is watched

    def session_opened(self, session: Session) -> None:
        """Watch its agent leaf. Raises BpfError."""
        self._lifecycle.manage(session.agent.id, abi.CgroupKind.AGENT)
        self._agents[session.agent.id] = session

    def session_closed(self, session: Session) -> None:
        """No more. Raises BpfError."""
        self._agents.pop(session.agent.id, None)
        self._lifecycle.unmanage(session.agent.id)

    def call_opened(self, call: Call) -> None:
        """Watch a call's leaf. Raises BpfError."""
        self._lifecycle.manage(call.cgroup.id, abi.CgroupKind.CALL)
        self._call_of_cgroup[call.cgroup.id] = call

    def call_closed(self, call: Call) -> None:
        """No more. Raises BpfError."""
        self._call_of_cgroup.pop(call.cgroup.id, None)
        self._lifecycle.unmanage(call.cgroup.id)

    # Events

    def handle(self, batch: list[AnyEvent]) -> None:
        """Events in the kernel's order. May come again while it runs; what comes then is dealt
        with after what was there before."""
        for event in batch:
            if isinstance(event, abi.ExitEvent):
                self._note_status(event)
        self._queue.extend(batch)
        if self._busy:
            return
        self._busy = True
        try:
            self._work_off()
            while self._were_lost():
                self.resync()
                self._work_off()
        finally:
            self._busy = False
        if self._check is None:
            self._check = self._loop.call_later(CHECK_AFTER_S, self._check_missed)

    def _work_off(self) -> None:
        while self._queue:
            self._one(self._queue.popleft())

    def _one(self, event: AnyEvent) -> None:
        try:
            match event:
                case abi.ForkEvent():
                    self._fork(event)
                case abi.ExecEvent():
                    self._exec(event)
                case abi.ExitEvent():
                    self._exit(event)
                case abi.OomEvent():
                    self._oom(event)
        except (AgentcgroupdError, OSError) as error:
            # One process that cannot be dealt with must not take the others with it.
            log.warning("%s: %s", type(event).__name__, error)

    def _note_status(self, event: abi.ExitEvent) -> None:
        """At once: the end of its call may be dealt with before this event's turn."""
        call = self._call_of_cgroup.get(event.event.cgroup_id)
        if call is not None and call.main is not None:
            if (call.main.pid, call.main.start_ticks) == key_of(event.process):
                call.exit_status = event.wait_status

    def _fork(self, event: abi.ForkEvent) -> None:
        session = self._agents.get(event.event.cgroup_id)
        if session is None or not event.child.pid:
            return
        child = key_of(event.child)
        if child in self._seen:
            return  # a resync was there first
        parent = event.child.parent_pid, event.parent_start_ns // TICK_NS
        sighting = self._seen.get(parent)
        if sighting is None:
            comm = event.child.comm.decode("utf-8", "replace")
            self._forked[child] = Forked(session, comm, event.event.at_ns)
        else:
            self._follow(sighting, child)

    def _exec(self, event: abi.ExecEvent) -> None:
        session = self._agents.get(event.event.cgroup_id)
        key = key_of(event.process)
        forked = self._forked.get(key)
        if session is None or forked is None:
            return
        forked.executed = True
        comm = event.process.comm.decode("utf-8", "replace")
        # Its page could not be read in the kernel: /proc waits for it.
        argv = argv_of(event) or _cmdline(key[0])
        if not begins_call(self._config, comm, argv):
            return
        del self._forked[key]
        self._begin(Sighting(session, tool_name(comm, argv), argv, key, event.event.at_ns))

    def _exit(self, event: abi.ExitEvent) -> None:
        key = key_of(event.process)
        forked = self._forked.pop(key, None)
        if forked is not None:
            self._exec_was_missed(forked, event)
            return
        sighting = self._seen.pop(key, None)
        if sighting is None:
            return
        sighting.members.discard(key)
        if key == sighting.main:
            sighting.exit = event
            if sighting.call is not None:
                sighting.call.exit_status = event.wait_status
        if not sighting.members:
            self._over(sighting)

    def _exec_was_missed(self, forked: Forked, event: abi.ExitEvent) -> None:
        """A process that ends under another name than it was forked with has executed something,
        whether or not that was told."""
        comm = event.process.comm.decode("utf-8", "replace")
        if forked.executed or comm == forked.comm or not may_begin_call(self._config, comm):
            return
        over = Sighting(forked.session, tool_name(comm, []), [], key_of(event.process),
                        forked.at_ns, exit=event)  # fmt: skip
        self._over(over)

    def _oom(self, event: abi.OomEvent) -> None:
        call = self._call_of_cgroup.get(event.event.cgroup_id)
        session = call.session if call else self._agents.get(event.event.cgroup_id)
        if session is not None:
            comm = event.process.comm.decode("utf-8", "replace")
            self._actions.oom_victim(session, call, event.process.pid, comm)

    # Calls

    def _begin(self, sighting: Sighting) -> None:
        self._seen[sighting.main] = sighting
        sighting.members.add(sighting.main)
        process = Process.find(*sighting.main)
        if process is None:
            return  # its exit event is on the way, and so are the fork events of its children
        try:
            self._enter(sighting, process, main=True)
        finally:
            process.close()

    def _follow(self, sighting: Sighting, child: Key) -> None:
        """A child that was forked before its parent was moved."""
        self._seen[child] = sighting
        sighting.members.add(child)
        process = Process.find(*child)
        if process is None:
            return
        try:
            # It may have been moved with its parent, or have gone to a call of its own.
            if cgroup_of(child[0]) == f"{sighting.session.cgroup_path}/{AGENT_LEAF}":
                self._enter(sighting, process, main=False)
        except FileNotFoundError:
            log.debug("process %d has ended", child[0])
        finally:
            process.close()

    def _enter(self, sighting: Sighting, process: Process, main: bool) -> None:
        """Move a process into the sighting's call, which is made if need be."""
        call = sighting.call
        if call is None or call.id not in self._calls.open:
            call = self._calls.begin(
                sighting.session, sighting.name, {}, sighting.argv, None, observed=True
            )
            sighting.call = call
        try:
            if main:
                self._calls.attach(call, process)
                self._actions.metrics.moved.observe((time.monotonic_ns() - sighting.at_ns) / 1e9)
            else:
                self._calls.admit(call, process)
        except (KnobError, FailedPrecondition):
            if pidfd_alive(process.pidfd):
                raise
            log.debug("process %d ended while it was moved", process.pid)
            # It may have been in the call for a moment: being empty is an end then.
            call.entered = True
        # What it forked before the move is in the buffer now, and is to be seen before anyone
        # finds the call empty.
        self._lifecycle.drain()

    def _over(self, sighting: Sighting) -> None:
        """The last process that was seen has ended."""
        call, event = sighting.call, sighting.exit
        if call is not None:
            self._calls.look(call)
            return
        cpu = {"user_usec": 0, "system_usec": 0, "usage_usec": 0}
        ended_ns = time.monotonic_ns()
        if event is not None:
            cpu = {"user_usec": event.user_ns // 1000, "system_usec": event.system_ns // 1000}
            cpu["usage_usec"] = cpu["user_usec"] + cpu["system_usec"]
            ended_ns = event.event.at_ns
        self._calls.record_short(
            sighting.session, sighting.name, sighting.argv,
            max(0, ended_ns - sighting.at_ns) // 1000, event.wait_status if event else None, cpu,
        )  # fmt: skip

    # When events were lost

    def _were_lost(self) -> bool:
        """Whether events were lost since the last look; said and counted if so."""
        lost = self._lifecycle.lost()
        if lost == self._lost_before:
            return False
        fresh = {kind: count - self._lost_before.get(kind, 0) for kind, count in lost.items()}
        self._lost_before = lost
        self._actions.events_lost({kind: count for kind, count in fresh.items() if count})
        return True

    def _check_missed(self) -> None:
        """The kernel counts what it left out, but sends no event: asked a moment after others."""
        self._check = None
        try:
            missed = self._lifecycle.missed()
        except BpfError as error:
            log.warning("%s", error)
            return
        if missed == self._missed_before:
            return
        before, self._missed_before = self._missed_before, missed
        self._actions.events_lost(
            {kind: count - before.get(kind, 0) for kind, count in missed.items()
             if count > before.get(kind, 0)}
        )  # fmt: skip
        self._lifecycle.drain()
        self.resync()
        self.prune()
        self._loop.call_later(CHECK_AFTER_S, self.prune)

    def resync(self) -> None:
        """Look at the agent leaves themselves: what should be in a call and is not, goes there."""
        for session in self._sessions():
            if session.agent.id not in self._agents or session.closing:
                continue
            try:
                self._resync_session(session)
            except CgroupGone:
                log.debug("session %s is gone", session.id)

    def prune(self) -> None:
        """Forget processes whose exit event was lost: those found dead twice, with time for their
        event in between."""
        dead = {key for key in (*self._forked, *self._seen) if not _lives(key)}
        for key in dead & self._dead:
            self._forked.pop(key, None)
            sighting = self._seen.pop(key, None)
            if sighting is not None:
                sighting.members.discard(key)
                if not sighting.members:
                    self._over(sighting)
        self._dead = dead

    def _resync_session(self, session: Session) -> None:
        here = session.agent.procs()
        keys: dict[int, Key] = {}
        for pid in here:
            try:
                keys[pid] = (pid, process_stat(pid).start_ticks)
            except (FileNotFoundError, ProcessLookupError):
                continue
        # Parents before their children, so that a child finds its parent's call.
        for pid, key in sorted(keys.items(), key=lambda item: item[1][1]):
            if key in self._seen:
                continue
            try:
                self._resync_process(session, keys, pid, key)
            except (FileNotFoundError, ProcessLookupError):
                continue
            except (AgentcgroupdError, OSError) as error:
                log.warning("process %d: %s", pid, error)

    def _resync_process(self, session: Session, keys: dict[int, Key], pid: int, key: Key) -> None:
        parent = keys.get(process_stat(pid).parent_pid)
        if parent is not None and parent in self._seen:
            self._forked.pop(key, None)
            self._follow(self._seen[parent], key)
            return
        if parent is None and key not in self._forked:
            return  # put here from outside: the agent itself
        forked = self._forked.setdefault(key, Forked(session, "", time.monotonic_ns()))
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            comm = file.read().rstrip("\n")
        argv = _cmdline(pid)
        forked.executed = forked.executed or comm != forked.comm
        if begins_call(self._config, comm, argv):
            del self._forked[key]
            self._begin(Sighting(session, tool_name(comm, argv), argv, key, time.monotonic_ns()))

    def close(self) -> None:
        """Forget everything; calls stay as they are."""
        if self._check is not None:
            self._check.cancel()
        self._agents.clear()
        self._forked.clear()
        self._seen.clear()
        self._queue.clear()


def _cmdline(pid: int) -> list[str]:
    """The head of a process's arguments; none of one that has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read(abi.ABI_ARGV_BYTES).rstrip("\0").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _lives(key: Key) -> bool:
    try:
        return process_stat(key[0]).start_ticks == key[1]
    except (FileNotFoundError, ProcessLookupError):
        return False
