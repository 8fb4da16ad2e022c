"""The CPU scheduler on real tasks: shares, limits, boosts, penalties, and that nobody starves."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agentcgroupd.bpf import abi, features, sched
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.bpf.memory import MemoryPrograms
from agentcgroupd.bpf.sched import CpuNumbers, Scheduler
from agentcgroupd.cgroup.tree import cgroup2_mount
from agentcgroupd.config import GuardConfig
from agentcgroupd.units import CgroupId
from tests.guest.cpu_load import SETTINGS, Load, settled, shares, spin
from tests.harness import SLOW, patient, wait_until

pytestmark = [
    pytest.mark.controllers,
    pytest.mark.programs,
    pytest.mark.usefixtures("needs_sched_ext"),
]

MIB = 1 << 20
HZ = 250
"""Of the slowest kernels; slices end with the clock's tick."""
TURNS = 1 if SLOW == 1 else 2
"""Emulated CPUs take turns on one thread, so that a task's ticks last twice as long."""


@pytest.fixture(scope="module")
def memory() -> Iterator[MemoryPrograms]:
    """The memory programs, whose map the scheduler reads."""
    bpf, _ = features.load("memory")
    assert bpf is not None
    programs = MemoryPrograms(bpf, GuardConfig())
    yield programs
    programs.close()


@pytest.fixture(scope="module")
def scheduler(memory: MemoryPrograms) -> Iterator[Scheduler]:
    """Attached; once for the module, because the verifier takes seconds here."""
    scheduler = Scheduler.load(SETTINGS, memory.states_fd)
    scheduler.attach()
    assert sched.running().startswith(sched.NAME)
    yield scheduler
    assert scheduler.ending() is None, "the kernel has let go of it"
    scheduler.close()
    wait_until("the kernel has none", lambda: sched.running() == "")


# --- Shares ---------------------------------------------------------------------------------------

SHAPES = {
    "flat": lambda n: {f"c{i}": 100 * (1 + i % 3) for i in range(n)},
    # Sessions with calls: as agents have them.
    "sessions": lambda n: {f"s{i % max(2, n // 8)}/c{i}": 50 * (1 + i % 4) for i in range(n)},
    # One call on each level, and everything else below: what comes last has next to nothing.
    "lopsided": lambda n: {
        "/".join(["d"] * min(i, 3)) + f"/c{i}" if i else "c0": 100 + 100 * (i % 2) for i in range(n)
    },
}
SESSION_WEIGHTS = (100, 300)


def weights_of(leaves: dict[str, int]) -> dict[str, int]:
    """Weights for all cgroups: the leaves' as given, those above them in turn."""
    found = dict(leaves)
    paths = [name.split("/") for name in leaves]
    inner = {"/".join(parts[:i]) for parts in paths for i in range(1, len(parts))}
    for i, name in enumerate(sorted(inner)):
        found[name] = SESSION_WEIGHTS[i % 2]
    return found


def expected_shares(weights: dict[str, int]) -> dict[str, float]:
    """Shares in percent, when every leaf always has something to run."""
    found = {}
    for name in weights:
        share, parts = 100.0, name.split("/")
        for i in range(len(parts)):
            here, above = "/".join(parts[: i + 1]), "/".join(parts[:i])
            beside = [w for n, w in weights.items() if n.rpartition("/")[0] == above]
            share *= weights[here] / sum(beside)
        found[name] = share
    return found


def wrong_shares(
    used: dict[str, int] | dict[str, float], expected: dict[str, float]
) -> dict[str, Any]:
    """Return the shares that are more than two points off: found, expected."""
    total = sum(used.values())
    found = {name: 100 * value / total for name, value in used.items()}
    wrong = [name for name in found if abs(found[name] - expected[name]) > 2]
    return {name: (round(found[name], 1), round(expected[name], 1)) for name in wrong}


@pytest.fixture(scope="module")
def crew() -> Iterator[list[int]]:
    """Stopped tasks that spin when they are let go: to fork as many for each tree takes longer
    than to look at it."""
    with Load() as load:
        load.make("crew")
        yield [load.start("crew", stop_and_spin) for _ in range(70)]


def stop_and_spin() -> None:
    """Until someone sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)
    spin()


@contextmanager
def at_work(load: Load, places: dict[int, str]) -> Iterator[None]:
    """Members of the crew in cgroups of a tree, and then back where they were."""
    home = {pid: Path(f"/proc/{pid}/cgroup").read_text().strip()[3:] for pid in places}
    for pid, name in places.items():
        load.write(name, "cgroup.procs", pid)
    for pid in places:
        os.kill(pid, signal.SIGCONT)
    try:
        yield
    finally:
        for pid in places:
            os.kill(pid, signal.SIGSTOP)
        for pid, path in home.items():
            (cgroup2_mount() / path.strip("/") / "cgroup.procs").write_text(str(pid))


@pytest.mark.parametrize("count", [2, 8, 64])
@pytest.mark.parametrize("shape", SHAPES)
@patient
def test_shares_follow_the_weights(
    scheduler: Scheduler, crew: list[int], shape: str, count: int
) -> None:
    """Within two points. One with more than a third gets two tasks: there are two CPUs."""
    weights = weights_of(SHAPES[shape](count))
    leaves = [n for n in weights if not any(m.startswith(f"{n}/") for m in weights)]
    expected = expected_shares(weights)
    with Load() as load:
        for name in sorted(weights):
            load.make(name, weights[name])
        places = [n for n in leaves for _ in range(2 if expected[n] > 33 else 1)]
        with at_work(load, dict(zip(crew, places, strict=False))):
            time.sleep(0.3)
            used = settled(load, leaves, lambda used, _: not wrong_shares(used, expected))
    assert not wrong_shares(used, expected), "found, expected"


@patient
def test_the_numbers_are_the_kernels(scheduler: Scheduler) -> None:
    """Run time as in cpu.stat; wait time is what was not run of the time that there was."""
    names = ("a", "b", "c", "d")
    with Load() as load:

        def numbers_of(name: str) -> CpuNumbers:
            numbers = scheduler.numbers(CgroupId(load.id(name)))
            assert numbers is not None
            return numbers

        for name in names:
            load.make(name)
            load.start(name)
        time.sleep(0.3)  # on a busy machine the first ones run alone for a while
        first = {name: numbers_of(name) for name in names}
        time.sleep(2)
        for name in names:
            # The kernel's count is read on both sides: between two reads, too, a CPU may be late.
            least = load.usage_usec(name)
            numbers = numbers_of(name)
            most = load.usage_usec(name)
            assert 0.9 * least - 50_000 < numbers.run_usec < 1.1 * most + 50_000
            ran = numbers.run_usec - first[name].run_usec
            waited = numbers.wait_usec - first[name].wait_usec
            assert 0.3 * waited < ran < 2 * waited, "two CPUs for four"
            assert numbers.slices > 5 and numbers.wait_usec > numbers.wait_max_usec > 2_000
        before = numbers_of("").run_usec
        each = [numbers_of(name).run_usec for name in names]
        after = numbers_of("").run_usec
        assert 0.9 * before - 50_000 < sum(each) < 1.1 * after + 50_000


@patient
def test_one_that_slept_is_not_paid_for_it(scheduler: Scheduler) -> None:
    """Thirty calls of a session wake at once, after a second of sleep; who ran all the time loses
    no more than its share."""
    with Load() as load:
        load.make("busy")
        load.start("busy")
        load.start("busy")
        load.make("herd")
        for i in range(30):
            load.make(f"herd/c{i}")
            load.start(f"herd/c{i}", lambda: sleep_and_spin(1.0))
        time.sleep(1.1)
        found = shares(load.used_usec(["busy", "herd"], 1.0))
    assert 46 < found["busy"] < 56


def sleep_and_spin(seconds: float) -> None:
    """Want nothing at first, and then all there is."""
    time.sleep(seconds)
    spin()


# --- cpu.max --------------------------------------------------------------------------------------


@patient
def test_cpu_max_is_kept(scheduler: Scheduler) -> None:
    """Within two percent of the limit, beside others, below a limit, and for two tasks at once."""
    limits = {"a": 200, "b": 100, "two": 250, "s": 200}
    with Load() as load:
        for name, permille in limits.items():
            load.make(name, 100, f"{permille * 100} 100000")
        for name in ("s/x", "s/y"):
            load.make(name)
        for name in ("a", "b", "two", "two", "s/x", "s/y"):
            load.start(name)
        time.sleep(0.6)
        wrong: dict[str, float] = {}

        def is_kept(used: dict[str, int], took: float) -> bool:
            wrong.clear()
            kept = {n: used[n] / took / (p * 1000) for n, p in limits.items()}
            wrong.update({n: share for n, share in kept.items() if abs(share - 1) > 0.02})
            return not wrong

        settled(load, list(limits), is_kept, 2.0)
        numbers = scheduler.numbers(CgroupId(load.id("b")))
    assert not wrong, "of the limit"
    assert numbers is not None and numbers.stalls > 10 and numbers.stalled_usec > 1_000_000


@patient
def test_a_burst_may_be_saved_up(scheduler: Scheduler) -> None:
    """cpu.max.burst: what was not used before may be used at once, and no more than that."""
    used = {}
    for burst in (0, 100_000):
        with Load() as load:
            load.make("a", 100, "50000 100000")
            load.write("a", "cpu.max.burst", min(burst, 50_000))
            load.start("a", lambda: sleep_and_spin(0.8))
            time.sleep(0.8)
            used[burst] = load.used_usec(["a"], 0.4)["a"]
    assert 25_000 < used[100_000] - used[0] < 75_000


@patient
def test_a_limit_that_is_lifted(scheduler: Scheduler) -> None:
    """The leaf runs at once, also one that is paused for long."""
    with Load() as load:
        load.make("a", 100, "1000 1000000")
        load.start("a")
        time.sleep(0.3)
        assert load.used_usec(["a"], 0.3)["a"] < 30_000
        load.write("a", "cpu.max", "max 100000")
        assert load.used_usec(["a"], 0.3)["a"] > 200_000


# --- Going first ----------------------------------------------------------------------------------


def wake_often(rounds: int, run_usec: int) -> None:
    """Sleep, and then run a little, in turns."""
    for _ in range(rounds):
        time.sleep(0.01)
        end = time.monotonic() + run_usec / 1e6
        while time.monotonic() < end:
            pass


@patient
def test_a_boost_makes_waking_prompt_and_shares_stay(scheduler: Scheduler) -> None:
    """Beside eight tasks on two CPUs: with a budget the task begins at once; and over all, nobody
    gets more than by its weight."""
    found = {}
    for boost_usec in (0, 60_000):
        with Load() as load:
            load.make("s")
            load.make("s/call")
            session, call = CgroupId(load.id("s")), CgroupId(load.id("s/call"))
            assert scheduler.describe(session, abi.CgroupKind.SESSION, 4 * boost_usec, 200)
            assert scheduler.describe(call, abi.CgroupKind.CALL, boost_usec, 100)
            for i in range(8):
                load.make(f"hog{i}")
                load.start(f"hog{i}")
            time.sleep(0.2)
            load.wait(load.start("s/call", lambda: wake_often(60, 500)))
            numbers = scheduler.numbers(call)
            assert numbers is not None
            assert (numbers.boosts > 20) == (boost_usec > 0)
            found[boost_usec] = numbers.wait_usec / numbers.slices
    assert found[60_000] < 0.8 * found[0], "time waited for each slice"


@patient
def test_a_call_that_turns_out_long_falls_back(scheduler: Scheduler) -> None:
    """The budget of a boost is paid out, and then its cgroup waits as everyone does."""
    with Load() as load:
        for name in ("long", "a", "b", "c"):
            load.make(name)
        call = CgroupId(load.id("long"))
        assert scheduler.describe(call, abi.CgroupKind.CALL, 50_000, 10)
        for name in ("a", "b", "c", "long"):
            load.start(name)
        time.sleep(0.5)
        names = ["long", "a", "b", "c"]
        equal = dict.fromkeys(names, 25.0)
        used = settled(load, names, lambda used, _: not wrong_shares(used, equal))
        numbers = scheduler.numbers(call)
    assert not wrong_shares(used, equal)
    assert numbers is not None and 0 < numbers.boosted_usec < 0.5 * numbers.run_usec


# --- Memory ---------------------------------------------------------------------------------------


@patient
def test_an_allocator_above_its_mark_grows_slower(
    scheduler: Scheduler, memory: MemoryPrograms
) -> None:
    """The penalty grows with the distance, on an idle machine too; with penalties off there is
    none."""
    took = {}
    for most in (1, 8):
        scheduler.control.penalty_most = most
        with Load() as load:
            load.make("s")
            load.make("s/call")
            call = CgroupId(load.id("s/call"))
            assert scheduler.describe(call, abi.CgroupKind.CALL, 0, 0)
            memory.watch(call, abi.CgroupKind.CALL, None)
            memory.set_throttle_mark(call, 32 * MIB)

            def grow() -> None:
                block = mmap.mmap(-1, 80 * MIB)
                for place in range(0, 80 * MIB, mmap.PAGESIZE):
                    block[place] = 1

            began = time.monotonic()
            load.wait(load.start("s/call", grow))
            took[most] = time.monotonic() - began
            numbers = scheduler.numbers(call)
            assert numbers is not None
            assert (numbers.penalties > 0) == (most > 1)
            memory.forget(call)
    scheduler.control.penalty_most = SETTINGS.penalty_most
    assert took[8] > 1.5 * took[1]
    assert took[8] < 12 * took[1], "there is a cap"


# --- Nothing is left, nobody starves --------------------------------------------------------------


@patient
def test_churn_leaves_nothing(scheduler: Scheduler) -> None:
    """A thousand cgroups a minute (a third of that where the CPU is emulated), a third of them
    with a task that runs."""
    control = scheduler.control
    with Load(controllers="+cpu") as load:
        load.make("s")
        load.make("s/rest")
        before = control.cgroups + 1, control.queues + 1, scheduler.places() + 1
        load.make("rest")
        pid = load.start("rest")
        old = load.make("s/first")
        began, count = time.monotonic(), 150
        for i in range(count):
            path = load.make(f"s/c{i}", 50 + i, "50000 100000" if i % 2 else "max")
            if i % 3 == 0:  # to move a task takes longer than the rest
                load.write(f"s/c{i}", "cgroup.procs", pid)
            else:
                path.rmdir()
                continue
            old.rmdir()
            old = path
        load.write("rest", "cgroup.procs", pid)
        old.rmdir()
        took = time.monotonic() - began

        def is_as_before() -> bool:
            return (control.cgroups, control.queues, scheduler.places()) == before

        wait_until("nothing is left", is_as_before)
    assert count / took * 60 > 1000 / (1 if SLOW == 1 else 3), "cgroups a minute"
    wait_until("nobody waits", lambda: control.waiting == 0 == control.in_lanes)
    assert control.without_entry == 0


CHURN = int(os.environ.get("AGENTCG_CHURN", "1000"))
"""Cgroups that are made and removed beside load: AGENTCG_CHURN=10000 for a release."""


@pytest.mark.timeout(600 if CHURN <= 1000 else 7200)
@patient
def test_cgroups_that_come_and_go_beside_load(scheduler: Scheduler) -> None:
    """The kernel does not let go of the scheduler, and the load has its shares by weight. A cgroup
    is removed as soon as the kernel allows it, one in ten while a process that was killed in it is
    still ending, which is when the kernel's own scx_flatcg fails."""
    control, weights = scheduler.control, {"one": 100, "three": 300}
    with Load(controllers="+cpu") as load:
        for name, weight in weights.items():
            load.make(name, weight)
            for _ in range(2):
                load.start(name)
        churn = load.make("churn", 100)
        (churn / "cgroup.subtree_control").write_text("+cpu")
        before = control.cgroups, control.queues, scheduler.places()
        began, used = time.monotonic(), {name: load.usage_usec(name) for name in weights}
        left: dict[Path, int] = {}
        for i in range(CHURN):
            path = churn / f"c{i}"
            path.mkdir()
            left[path] = 0
            if i % 10 == 0:
                left[path] = load.start(f"churn/c{i}")
                wait_until("it is in it", partial(has_processes, path))
                load.write(f"churn/c{i}", "cgroup.kill", 1)
            remove(load, left)
        wait_until("all are removed", lambda: remove(load, left) == 0)
        took = time.monotonic() - began
        used = {name: load.usage_usec(name) - usec for name, usec in used.items()}
        assert scheduler.ending() is None
        wait_until(
            "nothing is left",
            lambda: (control.cgroups, control.queues, scheduler.places()) == before,
        )
    print(f"{CHURN} cgroups in {took:.0f} s, {shares(used)}")
    assert control.without_entry == 0
    assert not wrong_shares(used, {"one": 25.0, "three": 75.0}), "found, expected"


def has_processes(path: Path) -> bool:
    """Tell whether something is in a cgroup."""
    return (path / "cgroup.procs").read_text() != ""


def remove(load: Load, left: dict[Path, int]) -> int:
    """Remove those cgroups in which nothing is left, and have their processes waited for (0: there
    was none). Returns how many remain."""
    for path, pid in list(left.items()):
        try:
            path.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            continue
        if pid:
            load.wait(pid)
        del left[path]
    return len(left)


def turns_of(pid: int) -> int:
    """How often a task has been given a CPU, as the kernel itself counts."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[2])


@pytest.mark.parametrize("seed", [1, 2])
@patient
def test_nobody_waits_longer_than_the_bound(scheduler: Scheduler, seed: int) -> None:
    """Any tree, any weights, limits that are always exceeded: every task gets a turn in the stated
    time, twice wait_max and two ticks for each task. (Without that rule the least
    weight here would wait for minutes, and the kernel would take the scheduler away.)"""
    control, dice = scheduler.control, random.Random(seed)
    wait_max_ns = control.wait_max_ns
    control.wait_max_ns = 400 * 1_000_000
    try:
        with Load() as load:
            names: list[str] = []
            for i in range(12):
                above = dice.choice([n for n in names if n.count("/") < 3] or [""])
                name = f"{above}/g{i}".strip("/")
                load.make(name, dice.choice([1, 1, 100, 10_000]))
                names.append(name)
            inner = {n.rpartition("/")[0] for n in names}
            leaves = [n for n in names if n not in inner]
            pids = [load.start(leaves[i % len(leaves)], spin) for i in range(24)]
            time.sleep(0.5)
            for name in names:
                load.write(name, "cpu.max", dice.choice(["max", "1000 1000000", "2000 100000"]))
            for pid in pids[::5]:
                os.setpriority(os.PRIO_PROCESS, pid, 19)
            seen: dict[int, int] = {}
            since, longest, slowest = dict.fromkeys(pids, time.monotonic()), 0.0, 0.0
            end = time.monotonic() + 4
            while (began := time.monotonic()) < end:
                for pid in pids:
                    turns, now = turns_of(pid), time.monotonic()
                    longest = max(longest, now - since[pid])
                    if turns != seen.get(pid):
                        seen[pid], since[pid] = turns, now
                time.sleep(0.02)
                slowest = max(slowest, time.monotonic() - began)
            numbers = scheduler.numbers(CgroupId(load.root.stat().st_ino))
            assert numbers is not None and numbers.rescues > 0, "the rule was not needed here"
            bound_s = 2 * 0.4 + len(pids) * 2 * TURNS / HZ + slowest
            assert longest < bound_s, f"a task waited for {longest:.2f} s of {bound_s:.2f}"
            for name in names:
                load.write(name, "cpu.max", "max")
    finally:
        control.wait_max_ns = wait_max_ns


@patient
def test_newcomers_do_not_keep_a_task_from_its_turn(scheduler: Scheduler) -> None:
    """A chain of short-lived processes gets turn after turn; the one beside it in the same cgroup,
    on the same CPU and as nice as can be, is not forgotten for that."""
    control = scheduler.control
    wait_max_ns, slice_ns = control.wait_max_ns, control.slice_ns
    control.wait_max_ns = 400 * 1_000_000
    control.slice_ns = 100 * 1_000_000  # an emulated CPU forks in less than that

    def hog() -> None:
        os.sched_setaffinity(0, {0})
        os.setpriority(os.PRIO_PROCESS, 0, 19)
        spin()

    def chain() -> None:
        os.sched_setaffinity(0, {0})
        while os.fork() == 0:
            pass

    try:
        with Load() as load:
            load.make("c")
            pid = load.start("c", hog)
            for _ in range(3):
                load.start("c", chain)
            time.sleep(0.5)
            turns, since, longest = turns_of(pid), time.monotonic(), 0.0
            end = since + 4
            while (now := time.monotonic()) < end:
                if (seen := turns_of(pid)) != turns:
                    longest, turns, since = max(longest, now - since), seen, now
                time.sleep(0.02)
            longest = max(longest, now - since)
    finally:
        control.wait_max_ns, control.slice_ns = wait_max_ns, slice_ns
    assert longest < 2 * 0.4 + 0.4, f"it waited for {longest:.2f} s"


@patient
def test_tasks_bound_to_one_cpu(scheduler: Scheduler) -> None:
    """Tasks bound to one CPU share it with others, and do not keep the other one idle."""
    with Load() as load:
        for name in ("bound", "free"):
            load.make(name)

        def bound() -> None:
            os.sched_setaffinity(0, {0})
            spin()

        def alike(used: dict[str, int]) -> bool:
            return 0.8 < used["bound"] / used["free"] < 1.25

        load.start("bound", bound)
        load.start("bound", bound)
        load.start("free")
        load.start("free")
        time.sleep(0.3)
        used = settled(load, ["bound", "free"], lambda used, _: alike(used))
    assert alike(used), used


@patient
def test_more_cgroups_bound_to_a_cpu_than_are_tried_at_once(scheduler: Scheduler) -> None:
    """The other CPU passes over all of them, again and again: its own two take turns."""
    with Load(controllers="+cpu") as load:

        def bound() -> None:
            os.sched_setaffinity(0, {0})
            spin()

        for i in range(80):
            load.make(f"b{i}")
            load.start(f"b{i}", bound)
        for name in ("one", "two"):
            load.make(name)
            load.start(name)
        equal = {"one": 50.0, "two": 50.0}
        used = settled(load, list(equal), lambda used, took: not wrong_shares(used, equal))
        took_s = sum(used.values()) / 1e6
    assert not wrong_shares(used, equal)
    assert took_s > 0.4, "they have a CPU for themselves"


@patient
def test_tasks_bound_to_some_cpus(scheduler: Scheduler) -> None:
    """Sets of two of three CPUs, which overlap: by weight, inside a set, between sets and beside
    what may run anywhere."""
    switch = Path("/sys/devices/system/cpu/cpu2/online")
    if not switch.exists():
        pytest.skip("this machine has no third CPU that can be switched")
    was = switch.read_text()
    demands: dict[str, tuple[int, set[int], int]] = {
        "a": (100, {0, 1}, 2),
        "b": (300, {0, 1}, 3),
        "c": (200, {1, 2}, 3),
        "free": (100, {0, 1, 2}, 2),
    }
    expected = {name: weight / 7 for name, (weight, _, _) in demands.items()}
    switch.write_text("1")
    try:
        with Load(controllers="+cpu") as load:
            for name, (weight, mask, count) in demands.items():
                load.make(name, weight)
                for _ in range(count):
                    load.start(name, bound_to(mask))
            time.sleep(0.5)
            used = settled(load, list(demands), lambda used, _: not wrong_shares(used, expected))
    finally:
        switch.write_text(was)
    assert not wrong_shares(used, expected), "found, expected"


def bound_to(cpus: set[int]) -> Callable[[], None]:
    """Spin on these CPUs only."""

    def run() -> None:
        os.sched_setaffinity(0, cpus)
        spin()

    return run


@patient
def test_cpus_come_and_go(scheduler: Scheduler) -> None:
    """Five times, as when a laptop is suspended: the kernel does not let go of the scheduler, and
    tasks go on: one that may run anywhere, and one that was bound to that CPU. The kernel lets that
    one run on all CPUs from then on; when it is bound anew, it goes on too."""
    switch = Path("/sys/devices/system/cpu/cpu1/online")
    if not switch.exists():
        pytest.skip("this machine cannot switch its second CPU off")
    with Load() as load:
        for name in ("free", "bound"):
            load.make(name)
        load.start("free")
        bound = load.start("bound", bound_to_last)
        # The kernel binds nothing to a CPU that is off: it refuses, and the process would end.
        wait_until("it is bound", lambda: os.sched_getaffinity(bound) == {1})
        try:
            for _ in range(5):
                switch.write_text("0")
                switch.write_text("1")
        finally:
            switch.write_text("1")
        found = [load.used_usec(["free", "bound"], 1.0)]
        assert os.sched_getaffinity(bound) == {0, 1}
        os.sched_setaffinity(bound, {1})
        found.append(load.used_usec(["free", "bound"], 1.0))
        assert scheduler.ending() is None
    assert all(usec > 100_000 for used in found for usec in used.values()), found


def bound_to_last() -> None:
    """Spin on the second CPU only."""
    os.sched_setaffinity(0, {1})
    spin()


@patient
def test_it_is_the_object_that_the_daemon_loads() -> None:
    """What is tested here is what is installed."""
    with BpfObject.open(sched.OBJECT) as bpf:
        assert {"enqueue", "dispatch", "cgroup_set_bandwidth"} <= set(bpf.programs())
