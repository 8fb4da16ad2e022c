"""The reclaim hooks' decisions about real memory cgroups. No kernel calls them yet; the program
`decide_for` makes the same decisions when it is asked."""

from __future__ import annotations

import ctypes
import errno
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agentcgroupd.bpf import abi, memcg_ops
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.bpf.loader import BpfMap, BpfObject
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.harness import EXEC, wait_until

pytestmark = [pytest.mark.controllers, pytest.mark.programs]

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB = 1 << 20
HELD_BYTES = 40 * MIB
UINT32_MAX = (1 << 32) - 1


def loaded_programs() -> set[int]:
    """Ids of all programs in the kernel now."""
    found, number = set(), ctypes.c_uint32(0)
    while libbpf().call("bpf_prog_get_next_id", number, ctypes.byref(number)) == 0:
        found.add(number.value)
    return found


class Tree:
    """A pool with a session `vip`, a session `batch` whose call holds memory two levels below it,
    and a neighbour that is no session. Cgroups by their path below the pool."""

    def __init__(self) -> None:
        self.path = cgroup2_mount() / f"agentcg-test-{secrets.token_hex(4)}"
        (cgroup2_mount() / "cgroup.subtree_control").write_text("+memory")
        self.path.mkdir()
        for inner in ("", "batch", "batch/call", "vip", "vip/call", "vip/call/nested"):
            (self.path / inner).mkdir(exist_ok=True)
            (self.path / inner / "cgroup.subtree_control").write_text("+memory")
        for leaf in ("batch/call/nested", "vip/call/nested/deep", "neighbour", "neighbour/plain"):
            (self.path / leaf).mkdir()
        self.holder = subprocess.Popen([LOAD], stdin=subprocess.PIPE)
        assert self.holder.stdin is not None
        (self.path / "batch/call/nested/cgroup.procs").write_text(str(self.holder.pid))
        self.holder.stdin.write(f"100 {HELD_BYTES} 0\n3600000 {HELD_BYTES} 0\n".encode())
        self.holder.stdin.close()
        used = self.path / "batch/call/nested/memory.current"
        wait_until("the call holds its memory", lambda: int(used.read_text()) > HELD_BYTES)

    def id(self, name: str) -> int:
        """Id of a cgroup."""
        return (self.path / name).stat().st_ino

    def write(self, name: str, file: str, value: object) -> None:
        """Write an interface file."""
        (self.path / name / file).write_text(str(value))

    def close(self) -> None:
        """End the process and remove everything."""
        pool = Cgroup.open(self.path)
        pool.kill_and_remove(20)
        pool.close()
        self.holder.wait()


@dataclass
class Decider:
    """The loaded program and what it reads."""

    bpf: BpfObject
    tree: Tree
    protections: BpfMap[abi.Protection]

    def set(
        self,
        session: str,
        protect: bool = False,
        stalled: bool = False,
        delay_percent: int = 0,
        delay_cap_ms: int = abi.ABI_DELAY_CAP_MS,
    ) -> None:
        """Set a session's protection and delay, as the daemon does."""
        self.protections[self.tree.id(session)] = abi.Protection(
            protect=protect,
            stalled=stalled,
            delay_percent=delay_percent,
            delay_cap_ms=delay_cap_ms,
        )

    def ask(self, name: str) -> abi.MemcgDecision:
        """What the hooks would answer for a cgroup."""
        decision = abi.MemcgDecision(cgroup_id=self.tree.id(name))
        assert self.bpf.run("decide_for", decision) == 0
        return decision

    def spared(self, name: str) -> tuple[int, int]:
        """(below_low, below_min)"""
        decision = self.ask(name)
        return decision.below_low, decision.below_min


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    made = Tree()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def loaded() -> Iterator[BpfObject]:
    """The object with its test program alone."""
    before = loaded_programs()
    with BpfObject.open("memcg_ops") as bpf:
        for program in bpf.programs():
            if program != "decide_for":
                bpf.skip_program(program)
        bpf.load()
        assert loaded_programs() - before
        yield bpf
    wait_until("nothing stays loaded", lambda: loaded_programs() <= before)


@pytest.fixture
def decider(loaded: BpfObject, tree: Tree) -> Iterator[Decider]:
    """With no session known and no limits set."""
    protections = loaded.map("protections", abi.Protection)
    yield Decider(loaded, tree, protections)
    for key in list(protections.keys()):
        protections.pop(key)
    for name in ("batch", "batch/call", "batch/call/nested", "vip", "vip/call"):
        tree.write(name, "memory.high", "max")
        tree.write(name, "memory.max", "max")


def test_this_kernel_lacks_the_hooks_and_says_so() -> None:
    before = loaded_programs()
    hooks, (state,) = memcg_ops.load()
    assert hooks is None
    assert not state.works
    assert state.reason == "the kernel has no struct memcg_bpf_ops"
    assert state.fallback == "memory.low and memory.high alone"
    assert loaded_programs() <= before


BELOW_VIP = ("vip", "vip/call", "vip/call/nested", "vip/call/nested/deep")


@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("stalled", [False, True])
def test_all_of_a_session_is_spared_while_it_is_protected_and_stalled(
    decider: Decider, protect: bool, stalled: bool
) -> None:
    decider.set("vip", protect=protect, stalled=stalled)
    expected = (1, 1) if protect and stalled else (0, 0)
    assert {name: decider.spared(name) for name in BELOW_VIP} == dict.fromkeys(BELOW_VIP, expected)
    assert {decider.ask(name).session_id for name in BELOW_VIP} == {decider.tree.id("vip")}


def test_nothing_is_decided_for_what_is_in_no_session(decider: Decider) -> None:
    decider.set("vip", protect=True, stalled=True, delay_percent=1000)
    decider.tree.write("batch/call", "memory.high", HELD_BYTES // 2)
    for name in ("", "neighbour", "batch", "batch/call", "batch/call/nested"):
        decision = decider.ask(name)
        assert decision.session_id == 0
        assert (decision.below_low, decision.below_min, decision.delay_ms) == (0, 0, 0)
    assert decider.ask("batch/call").usage_bytes > decider.ask("batch/call").high_bytes
    # The same cgroups once theirs is a session.
    decider.set("batch", delay_percent=1000)
    assert decider.ask("batch/call/nested").delay_ms == abi.ABI_DELAY_CAP_MS


def test_a_session_that_is_forgotten_is_spared_no_more(decider: Decider) -> None:
    decider.set("vip", protect=True, stalled=True)
    assert decider.spared("vip/call") == (1, 1)
    decider.protections.pop(decider.tree.id("vip"))
    assert decider.spared("vip/call") == (0, 0)


@pytest.mark.parametrize("limited", ["vip", "vip/call"])
@pytest.mark.parametrize("file", ["memory.high", "memory.max"])
def test_at_a_limit_of_its_own_a_session_is_not_spared_at_any_price(
    decider: Decider, limited: str, file: str
) -> None:
    decider.set("vip", protect=True, stalled=True)
    decider.tree.write(limited, file, MIB)
    assert decider.spared("vip/call/nested") == (1, 0)
    assert decider.spared("vip") == ((1, 0) if limited == "vip" else (1, 1))
    decider.tree.write(limited, file, 64 * MIB)
    assert decider.spared("vip/call/nested") == (1, 1)


def overage_percent(decision: abi.MemcgDecision) -> float:
    """How far a cgroup is above its own memory.high."""
    return 100 * (decision.usage_bytes / decision.high_bytes - 1)


def test_delay_is_in_proportion_to_the_overage(decider: Decider) -> None:
    shown = []
    for high in (32 * MIB, 20 * MIB):
        decider.tree.write("batch/call", "memory.high", high)
        for percent in (1, 5):
            decider.set("batch", delay_percent=percent)
            decision = decider.ask("batch/call")
            assert decision.high_bytes == high
            assert decision.delay_ms == pytest.approx(overage_percent(decision) * percent, abs=1)
            shown.append(decision.delay_ms)
    print("delays:", shown)
    assert 20 <= shown[0] < shown[1] < shown[3] < abi.ABI_DELAY_CAP_MS


def test_the_level_that_is_furthest_above_its_high_counts(decider: Decider) -> None:
    decider.set("batch", delay_percent=1)
    decider.tree.write("batch", "memory.high", 20 * MIB)
    decider.tree.write("batch/call", "memory.high", 32 * MIB)
    session = decider.ask("batch")
    assert session.delay_ms == pytest.approx(overage_percent(session), abs=1)
    assert decider.ask("batch/call").delay_ms == session.delay_ms
    assert decider.ask("batch/call/nested").delay_ms == session.delay_ms
    # What is above the session is not the session's.
    decider.tree.write("batch", "memory.high", "max")
    decider.tree.write("", "memory.high", 10 * MIB)
    try:
        assert decider.ask("batch").delay_ms == 0
        call = decider.ask("batch/call")
        assert call.delay_ms == pytest.approx(overage_percent(call), abs=1)
        assert decider.ask("batch/call/nested").delay_ms == call.delay_ms < session.delay_ms
    finally:
        decider.tree.write("", "memory.high", "max")


@pytest.mark.parametrize(
    ("delay_percent", "cap_ms"),
    [(1000, 2000), (1000, 150), (UINT32_MAX, 2000), (UINT32_MAX, UINT32_MAX), (1000, 0)],
)
def test_delay_is_capped(decider: Decider, delay_percent: int, cap_ms: int) -> None:
    decider.tree.write("batch/call", "memory.high", HELD_BYTES // 2)
    decider.set("batch", delay_percent=delay_percent, delay_cap_ms=cap_ms)
    assert decider.ask("batch/call/nested").delay_ms == cap_ms


def test_any_use_above_a_high_of_zero_gives_the_cap(decider: Decider) -> None:
    decider.tree.write("batch/call", "memory.high", 0)
    decider.set("batch", delay_percent=1)
    assert decider.ask("batch/call").delay_ms == abi.ABI_DELAY_CAP_MS


def test_no_delay_below_high_nor_for_the_protected(decider: Decider) -> None:
    decider.set("batch", delay_percent=1000)
    assert decider.ask("batch/call").delay_ms == 0
    decider.tree.write("batch/call", "memory.high", HELD_BYTES // 2)
    assert decider.ask("batch/call").delay_ms == abi.ABI_DELAY_CAP_MS
    for stalled in (False, True):
        decider.set("batch", protect=True, stalled=stalled, delay_percent=1000)
        assert decider.ask("batch/call").delay_ms == 0


def test_decisions_are_counted(decider: Decider) -> None:
    counters = decider.bpf.shared("counters", abi.MemcgOpsCounters)

    def counts() -> tuple[int, int, int]:
        return counters.spared_low, counters.spared_min, counters.delayed

    low, always, delayed = counts()
    decider.ask("vip")
    assert counts() == (low, always, delayed)
    decider.set("vip", protect=True, stalled=True)
    decider.set("batch", delay_percent=1000)
    decider.tree.write("batch/call", "memory.high", HELD_BYTES // 2)
    decider.ask("vip/call")
    decider.ask("batch/call")
    assert counts() == (low + 1, always + 1, delayed + 1)


def test_a_cgroup_without_memory_controller_and_one_that_is_none(decider: Decider) -> None:
    decision = abi.MemcgDecision(cgroup_id=decider.tree.id("neighbour/plain"))
    assert decider.bpf.run("decide_for", decision) == -errno.ENODEV
    decision.cgroup_id = 1 << 40
    assert decider.bpf.run("decide_for", decision) == -errno.ENOENT
