"""memory.bpf.c on a real kernel with a memory controller: what it refuses, tells and protects."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.events import AnyEvent, RingBuffer
from agentcgroupd.bpf.features import DENY, HIGH_EVENTS, MARKS, RATES, URGENT, load
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.config import GuardConfig
from tests.harness import SLOW, wait_until

pytestmark = [pytest.mark.controllers, pytest.mark.programs]

MIB = 1 << 20
PR_SET_THP_DISABLE = 41
"""include/uapi/linux/prctl.h; a huge page is one fault."""
CHILD = """
import os, subprocess, sys
held = []
def alloc(size):
    held.append(bytearray(size))
    return "ok"
def fork():
    pid = os.fork()
    if not pid:
        os._exit(5)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def read(path, times):
    for _ in range(times):
        with open(path, "rb", 0) as file:
            while file.read(1 << 20):
                pass
print("ready", flush=True)
for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except (MemoryError, OSError):
        print("MemoryError", flush=True)
"""


class Child:
    """A Python process in a cgroup that evaluates what it is sent."""

    def __init__(self, cgroup: Cgroup) -> None:
        procs = cgroup.path / "cgroup.procs"
        self.process = subprocess.Popen(
            ["sh", "-c", f'echo $$ > {procs} && exec {sys.executable} -S -c "$0"', CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == "ready"

    def answer(self) -> str:
        """The next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, expression: str) -> None:
        """Without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def run(self, expression: str) -> str:
        """Return the value of an expression as text, or MemoryError."""
        self.send(expression)
        return self.answer()


@dataclass
class Tree:
    """pool / vip and batch / one call each, known to the programs."""

    pool: Cgroup
    memory: MemoryPrograms
    sessions: dict[str, Cgroup]
    calls: dict[str, Cgroup]
    ring: RingBuffer
    seen: list[AnyEvent]
    children: list[Child] = field(default_factory=list)

    def child(self, cgroup: Cgroup) -> Child:
        """A process there."""
        self.children.append(Child(cgroup))
        return self.children[-1]

    def events(self, kind: type[AnyEvent]) -> list[AnyEvent]:
        """All of one kind so far."""
        self.ring.drain()
        return [event for event in self.seen if type(event) is kind]


@pytest.fixture
def tree() -> Iterator[Tree]:
    """Everything removed and detached after each test."""
    bpf, states = load("memory")
    missing = [f"{s.name}: {s.reason}" for s in states if not s.works]
    if bpf is None:
        pytest.skip("; ".join(missing))
    assert {s.name for s in states if s.works} >= {DENY, MARKS, HIGH_EVENTS, RATES, URGENT}
    times = {"stall_threshold": "2ms", "stall_window": "1s", "urgent_lease": "400ms"}
    config = GuardConfig.model_validate({"deny_allowance": "8M", **times})
    memory = MemoryPrograms(bpf, config)
    root = Cgroup.open(cgroup2_mount())
    root.enable(("memory",))
    pool = root.make_child(f"agentcg-mem-{secrets.token_hex(4)}")
    seen: list[AnyEvent] = []
    made = Tree(pool, memory, {}, {}, RingBuffer(bpf.map_fd("events"), seen.extend), seen)
    try:
        pool.enable(("memory",))
        memory.watch(pool.id, abi.CgroupKind.POOL, None)
        for name, priority in (("vip", 80), ("batch", 20)):
            session = pool.make_child(name)
            session.enable(("memory",))
            call = session.make_child("call")
            memory.watch(session.id, abi.CgroupKind.SESSION, pool.id, priority)
            memory.watch(call.id, abi.CgroupKind.CALL, session.id, priority)
            made.sessions[name], made.calls[name] = session, call
        yield made
    finally:
        pool.kill_and_remove(20)
        for child in made.children:
            child.process.wait()
            with contextlib.suppress(BrokenPipeError):
                child.process.__exit__(None, None, None)
        made.ring.close()
        memory.close()
        root.close()


def test_denied_growth_is_an_error_that_a_program_survives(tree: Tree) -> None:
    call, other = tree.calls["batch"], tree.calls["vip"]
    tool, bystander = tree.child(call), tree.child(other)
    assert tool.run(f"alloc({8 * MIB})") == "ok"
    usage = call.read(knobs.MEMORY_CURRENT)
    tree.memory.deny_above(call.id, usage + 16 * MIB)
    assert tool.run(f"alloc({8 * MIB})") == "ok", "below the mark"
    assert tool.run(f"alloc({64 * MIB})") == "MemoryError"
    assert tool.run(f"alloc({64 * MIB})") == "MemoryError"
    assert tool.run("fork()") == "5", "a fork needs no memory yet"
    assert tool.run("subprocess.call(['true'])") == "0"
    assert tool.run(f"alloc({MIB})") == "ok", "the allowance"
    assert bystander.run(f"alloc({64 * MIB})") == "ok"
    (event,) = tree.events(abi.DeniedEvent)
    assert isinstance(event, abi.DeniedEvent)
    assert (event.event.cgroup_id, event.pid, event.urgent) == (call.id, tool.process.pid, 0)
    assert 64 * MIB <= event.request_bytes < 66 * MIB
    state = tree.memory.state(call.id)
    assert state is not None and state.denied >= 2

    tree.memory.allow(call.id)
    assert tool.run(f"alloc({64 * MIB})") == "ok"
    tree.memory.deny_above(call.id, usage)
    assert tool.run(f"alloc({64 * MIB})") == "MemoryError"
    assert len(tree.events(abi.DeniedEvent)) == 2, "told once for each denial"


def test_the_allowance_ends(tree: Tree) -> None:
    call = tree.calls["batch"]
    tool = tree.child(call)
    tree.memory.deny_above(call.id, call.read(knobs.MEMORY_CURRENT))
    results = [tool.run(f"alloc({MIB})") for _ in range(12)]
    assert results[0] == "ok" and results[-1] == "MemoryError"
    assert results == sorted(results, reverse=True), "what is refused once stays refused"
    assert tool.run("1 + 1") == "2"


def test_a_cgroup_inside_a_call_is_denied_with_it(tree: Tree) -> None:
    call = tree.calls["batch"]
    call.enable(("memory",))
    inner = call.make_child("inner")
    tool = tree.child(inner)
    tree.memory.deny_above(call.id, call.read(knobs.MEMORY_CURRENT) + MIB)
    assert tool.run(f"alloc({32 * MIB})") == "MemoryError"


def test_a_mark_is_told_once_for_each_crossing(tree: Tree) -> None:
    call, session = tree.calls["batch"], tree.sessions["batch"]
    tool = tree.child(call)
    base = call.read(knobs.MEMORY_CURRENT)
    marks = {call.id: base + 32 * MIB, session.id: base + 64 * MIB, tree.pool.id: base + 512 * MIB}
    for cgroup, mark in marks.items():
        tree.memory.set_mark(cgroup, mark, mark - 16 * MIB)

    def crossings() -> list[tuple[int, int]]:
        found = tree.events(abi.MarkEvent)
        return [(e.event.cgroup_id, e.above) for e in found if isinstance(e, abi.MarkEvent)]

    assert tool.run(f"alloc({16 * MIB})") == "ok"
    assert crossings() == []
    assert tool.run(f"alloc({24 * MIB})") == "ok"
    assert crossings() == [(call.id, 1)]
    event = tree.events(abi.MarkEvent)[0]
    assert isinstance(event, abi.MarkEvent)
    # At most one huge page above it.
    assert 0 <= event.usage_bytes - marks[call.id] <= 2 * MIB, "told at the charge that passes it"
    assert tool.run(f"alloc({40 * MIB})") == "ok"
    assert crossings() == [(call.id, 1), (session.id, 1)]
    assert tool.run("held.clear()") == "None"
    assert tool.run(f"alloc({4 * MIB})") == "ok"
    assert crossings()[2:] == [(call.id, 0), (session.id, 0)]
    assert tool.run(f"alloc({80 * MIB})") == "ok"
    assert crossings()[4:] == [(call.id, 1), (session.id, 1)]


def test_passing_memory_high_is_told_and_not_at_every_page(tree: Tree) -> None:
    call = tree.calls["batch"]
    tool = tree.child(call)
    high = call.read(knobs.MEMORY_CURRENT) + 8 * MIB
    call.write(knobs.MEMORY_HIGH, high)
    started = time.monotonic()
    assert tool.run(f"alloc({10 * MIB})") == "ok"
    took_s = time.monotonic() - started
    found = [e for e in tree.events(abi.HighEvent) if isinstance(e, abi.HighEvent)]
    assert found
    assert {e.event.cgroup_id for e in found} == {call.id}
    assert found[0].usage_bytes > found[0].high_bytes == high // 4096 * 4096
    state = tree.memory.state(call.id)
    assert state is not None
    assert len(found) <= 2 + took_s * 10
    assert state.high_events >= len(found)


def _large_file() -> Path:
    """A file of 30 MB or more that the kernel has to read from somewhere."""
    libraries = Path("/usr/lib/x86_64-linux-gnu").glob("*.so*")
    candidates = (path for path in libraries if path.is_file() and path.stat().st_size > 30_000_000)
    found = next(candidates, None)
    if found is None:
        pytest.skip("no file of 30 MB in /usr/lib")
    return found


def test_faults_and_refaults_pass_their_rate(tree: Tree) -> None:
    call, session = tree.calls["batch"], tree.sessions["batch"]
    tool = tree.child(call)
    tree.memory.set_rates(session.id, 2000, 100)
    assert (
        tool.run(f"__import__('ctypes').CDLL(None).prctl({PR_SET_THP_DISABLE}, 1, 0, 0, 0)") == "0"
    )
    assert tool.run(f"alloc({96 * MIB})") == "ok"
    found = [e for e in tree.events(abi.RatesEvent) if isinstance(e, abi.RatesEvent)]
    assert found and found[0].above and found[0].faults_per_s > 2000
    assert found[0].event.cgroup_id == session.id
    state = tree.memory.state(session.id)
    assert state is not None and state.faults >= 96 * MIB // 4096 * 0.9
    assert tool.run("held.clear()") == "None"

    call.write(knobs.MEMORY_MAX, 24 * MIB)
    assert tool.run(f"read({str(_large_file())!r}, 3)") == "None"
    state = tree.memory.state(session.id)
    assert state is not None and state.refaults > 1000
    found = [e for e in tree.events(abi.RatesEvent) if isinstance(e, abi.RatesEvent)]
    assert any(e.refaults_per_s > 100 for e in found)


def test_a_protected_session_that_stalls_stops_the_others_growth_at_once(tree: Tree) -> None:
    vip, batch = tree.child(tree.calls["vip"]), tree.child(tree.calls["batch"])
    tree.memory.set_willing(tree.calls["batch"].id, True)
    # A pool that is short: above its mark at the next charge.
    tree.memory.set_mark(tree.pool.id, 1, 0)
    fitted = tree.memory.protect([(tree.sessions["vip"].id, 80)], tree.pool.id)
    assert fitted == 1
    assert batch.run(f"alloc({8 * MIB})") == "ok"
    tree.calls["vip"].write(knobs.MEMORY_MAX, 24 * MIB)
    vip.send(f"read({str(_large_file())!r}, 20)")
    results = []

    def refused() -> bool:
        results.append(batch.run(f"alloc({8 * MIB})"))
        return results[-1] == "MemoryError"

    wait_until("growth is denied", refused)
    urgent = [e for e in tree.events(abi.UrgentEvent) if isinstance(e, abi.UrgentEvent)]
    denied = [e for e in tree.events(abi.DeniedEvent) if isinstance(e, abi.DeniedEvent)]
    assert urgent[0].event.cgroup_id == tree.sessions["vip"].id
    assert urgent[0].stalled_ns >= 2_000_000
    assert denied[0].urgent and denied[0].event.at_ns >= urgent[0].event.at_ns
    # The unwilling get what they ask for, however urgent it is.
    tree.memory.confirm_urgent(3_600_000_000)
    tree.memory.set_willing(tree.calls["batch"].id, False)
    assert batch.run(f"alloc({8 * MIB})") == "ok"
    tree.memory.set_willing(tree.calls["batch"].id, True)
    assert batch.run(f"alloc({8 * MIB})") == "MemoryError"
    tree.memory.confirm_urgent(400_000)
    assert vip.answer() == "None"
    assert vip.run(f"alloc({2 * MIB})") == "ok", "the protected one may grow"
    # Nobody confirms it: it ends by itself.
    wait_until("the lease is over", lambda: batch.run(f"alloc({2 * MIB})") == "ok", 5)


def test_an_urgent_denial_waits_for_a_pool_that_is_short(tree: Tree) -> None:
    vip, batch = tree.child(tree.calls["vip"]), tree.child(tree.calls["batch"])
    tree.memory.set_mark(tree.pool.id, 4 << 30, 2 << 30)
    tree.memory.protect([(tree.sessions["vip"].id, 80)], tree.pool.id)
    tree.calls["vip"].write(knobs.MEMORY_MAX, 24 * MIB)
    vip.send(f"read({str(_large_file())!r}, 5)")
    deadline = time.monotonic() + 0.2 * SLOW
    while time.monotonic() < deadline:
        assert batch.run(f"alloc({2 * MIB})") == "ok"
        batch.run("held.clear()")
    assert vip.answer() == "None"
    assert tree.events(abi.UrgentEvent) == []


def test_promises_are_added_up_and_what_would_kill_is_not_refused(tree: Tree) -> None:
    """Small mappings that are not touched do not get around the allowance; programs still
    start."""
    call = tree.calls["batch"]
    tool = tree.child(call)
    tree.memory.deny_above(call.id, call.read(knobs.MEMORY_CURRENT))
    script = "[m for m in (__import__('mmap').mmap(-1, 1 << 20) for _ in range(64))]"
    assert tool.run(f"len({script})") != "64"
    assert tool.run("subprocess.call(['true'])") == "0"
    state = tree.memory.state(call.id)
    assert state is not None and state.allowed_bytes <= abi.ABI_SMALL_REQUEST_BYTES
    assert tree.memory.control.allowed_bytes <= 8 * MIB


def test_all_denied_calls_share_one_allowance(tree: Tree) -> None:
    """Each may make tiny requests beside it, to say what happened."""
    promised = []
    script = "len([m for m in (__import__('mmap').mmap(-1, 1 << 18) for _ in range(64))])"
    for name in ("batch", "vip"):
        call = tree.calls[name]
        tool = tree.child(call)
        tree.memory.deny_above(call.id, call.read(knobs.MEMORY_CURRENT))
        tool.run(script)
        state = tree.memory.state(call.id)
        assert state is not None
        promised.append(state.allowed_bytes)
    assert all(size <= abi.ABI_SMALL_REQUEST_BYTES for size in promised)
    assert 7 * MIB < tree.memory.control.allowed_bytes <= 8 * MIB
    for call in tree.calls.values():
        tree.memory.allow(call.id)
    tree.memory.deny_above(tree.calls["vip"].id, 0)
    assert tree.memory.control.allowed_bytes == 0


def test_each_denial_is_told_again(tree: Tree) -> None:
    call = tree.calls["batch"]
    tool = tree.child(call)
    for number in range(1, 4):
        tree.memory.deny_above(call.id, call.read(knobs.MEMORY_CURRENT))
        assert tool.run(f"alloc({64 * MIB})") == "MemoryError"
        assert len(tree.events(abi.DeniedEvent)) == number
        tree.memory.allow(call.id)


def test_lifting_an_urgent_denial_holds(tree: Tree) -> None:
    control = tree.memory.control
    tree.memory.confirm_urgent(1_000_000)
    assert control.urgent_until_ns > time.monotonic_ns()
    tree.memory.lift_urgent(1_000_000)
    assert control.urgent_until_ns == 0
    assert control.lifted_until_ns > time.monotonic_ns()
