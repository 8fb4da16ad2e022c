"""Swap in compressed memory, and what becomes possible with it: memory that waits leaves, what is
frozen leaves, what grows is slowed instead of stopped. Counts and contents; times only beside each
other."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.psi import PressureTrigger
from agentcgroupd.enforce.reclaimer import CacheHolder
from agentcgroupd.guard.host_capacity import read_host, zram_used_bytes
from agentcgroupd.guard.session_sampler import SessionSampler
from agentcgroupd.host import zram
from agentcgroupd.host.zram import Zram, ZramError
from agentcgroupd.policy.snapshot import Host
from agentcgroupd.state.session import Call, boottime_usec
from tests.conftest import StartDaemon
from tests.guest.place import Place, answer, ask
from tests.harness import EXEC, SLOW, wait_until

pytestmark = pytest.mark.controllers

LOAD = str(Path(EXEC).with_name("agentcg-load"))
MIB = 1 << 20
SWAP_BYTES = 256 * MIB
HELD_PAGES = 10 * 1024
HOLDER = """
import hashlib, sys
pages = int(sys.argv[1])
data = b"".join(hashlib.sha256(b"%d" % i).digest() * 128 for i in range(pages))
print("holding", flush=True)
for line in sys.stdin:
    print(hashlib.sha256(data).hexdigest(), flush=True)
"""
"""Every page differs, and each compresses well."""
GROWER = """
import sys, time
held, began = [], time.monotonic()
for _ in range(int(sys.argv[1])):
    held.append(b"".join(b"%016d" % i * 256 for i in range(256)))
print(time.monotonic() - began, flush=True)
sys.stdin.readline()
"""
"""Grows by 1 MiB at a time."""


@pytest.fixture(scope="module", autouse=True)
def no_swap() -> None:
    """Assert that the host has no swap: these tests are about making some."""
    assert zram.swaps() == ()


@pytest.fixture(scope="module")
def swap() -> Iterator[Zram]:
    """Swap for all tests that only use it."""
    made = zram.prepare(SWAP_BYTES, SWAP_BYTES)
    assert made is not None
    yield made
    swap = made.swap()
    assert swap is not None and swap.used_bytes < zram.SMALL_BYTES
    zram.prepare("off", SWAP_BYTES)


@pytest.fixture
def no_device_after() -> Iterator[None]:
    """What a daemon made stays when it ends; not so after a test."""
    yield
    zram.prepare("off", 0)


# Setting up


def test_a_setup_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    zram.prepare("off", 0)  # of a daemon before, whose device may be there still
    run = zram._run

    def no_mkswap(name: str, *arguments: str) -> None:
        run("false" if name == "mkswap" else name, *arguments)

    monkeypatch.setattr(zram, "_run", no_mkswap)
    with pytest.raises(ZramError, match="false failed"):
        zram.prepare("auto", 64 * MIB)
    assert zram.swaps() == () and zram.find() is None
    assert not list(Path("/sys/block").glob("zram*"))


def test_the_operators_swap_is_left_alone() -> None:
    theirs = Zram(int(Path("/sys/class/zram-control/hot_add").read_text()))
    theirs.write("disksize", str(32 * MIB))
    subprocess.run(["mkswap", "-L", "theirs", str(theirs.node)], check=True, capture_output=True)
    subprocess.run(["swapon", str(theirs.node)], check=True)
    try:
        before = zram.swaps()
        assert zram.prepare("auto", 256 * MIB) is None
        assert zram.prepare("off", 256 * MIB) is None
        assert zram.swaps() == before
        ours = zram.prepare(64 * MIB, 256 * MIB)
        assert ours is not None and ours.number != theirs.number
        assert zram.find() == ours
        line = ours.swap()
        assert line is not None and line.priority > before[0].priority
        zram.prepare("off", 256 * MIB)
        assert zram.swaps() == before
    finally:
        subprocess.run(["swapoff", str(theirs.node)], check=True)
        zram._destroy(theirs)


@pytest.mark.full_kernel
@pytest.mark.usefixtures("no_device_after")
def test_the_daemon_makes_it_once_and_finds_it_again(start_daemon: StartDaemon) -> None:
    def config(setting: str) -> str:
        return f'[pool]\nmemory_max = "512M"\nzram = "{setting}"\n[guard]\nenabled = false\n'

    running = start_daemon(config("auto"))
    (made,) = zram.swaps()
    assert made.is_zram and made.priority == zram.SWAP_PRIORITY
    assert 255 * MIB < made.size_bytes <= 256 * MIB
    device = zram.find()
    assert device is not None
    assert device.stat().limit_bytes == 128 * MIB
    assert "[zstd]" in device.read("comp_algorithm")
    agent = running.open("s")
    agent.run('tool = subprocess.Popen([EXEC, "--", "sleep", "600"])')
    wait_until("the call is there", lambda: len(running.call_dirs()) == 1)
    leaf = running.call_dirs()[0]
    wait_until("it runs", lambda: (leaf / "cgroup.procs").read_text() != "")
    # As a policy would, had it been killed at this moment.
    (leaf / "memory.high").write_text(str(300 * MIB))
    (leaf.parent / "cpu.weight").write_text("7")

    running.kill()
    assert zram.swaps() == (made,)
    running.start()
    assert zram.swaps() == (made,) and zram.find() == device
    assert (leaf / "memory.high").read_text().strip() == "max"
    assert (leaf.parent / "cpu.weight").read_text().strip() == "100"
    assert "is there already" in running.log.read_text()

    running.stop()
    assert zram.swaps() == (made,)
    text = running.config.read_text()
    running.config.write_text(text.replace('zram = "auto"', 'zram = "off"'))
    running.start()
    assert zram.swaps() == () and zram.find() is None
    assert not device.node.exists()


# What leaves


@pytest.mark.full_kernel
@pytest.mark.usefixtures("no_device_after")
def test_what_zram_takes_is_inside_the_pools_limit(start_daemon: StartDaemon) -> None:
    """Pages that do not compress take in zram what they took before, and no cgroup is charged."""
    config = '[pool]\nmemory_max = "256M"\nzram = "auto"\n[guard]\ncredit = false\n'
    running = start_daemon(config)
    agent = running.open("s")
    code = "import os, sys; held = os.urandom(64 << 20); print(1, flush=True); sys.stdin.read()"
    agent.run(
        """
tool = subprocess.Popen([EXEC, "--", sys.executable, "-S", "-c", script], stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE)
tool.stdout.readline()
""",
        script=code,
    )
    pool, (leaf,) = running.cgroup_dir, running.call_dirs()

    def limit() -> int:
        return int((pool / "memory.max").read_text())

    assert limit() == 256 * MIB
    (leaf / "memory.reclaim").write_text(f"{32 * MIB} swappiness=200")
    device = zram.find()
    assert device is not None
    taken = device.stat().used_bytes
    assert taken >= 24 * MIB
    wait_until("the limit follows", lambda: limit() <= 256 * MIB - taken + 8 * MIB, 20)
    assert limit() >= 256 * MIB - taken - 8 * MIB
    agent.run("tool.kill(); tool.wait()")
    wait_until("the limit is whole again", lambda: limit() == 256 * MIB, 20)


def test_an_idle_agents_memory_leaves_and_comes_back(place: Place, swap: Zram) -> None:
    holder = place.start(place.session.agent, HOLDER, HELD_PAGES)
    assert answer(holder) == "holding"
    ask(holder)
    before = answer(holder)
    leaf = place.session.agent
    held = leaf.read(knobs.MEMORY_CURRENT)
    assert held > HELD_PAGES * 4096
    sampler = SessionSampler(lambda: [place.session])
    assert sampler.views(boottime_usec())[0].reclaimed_usec is None

    async def run() -> int:
        lags: list[float] = []

        async def beat() -> None:
            while True:
                began = time.monotonic()
                await asyncio.sleep(0.01)
                lags.append(time.monotonic() - began - 0.01)

        beats = asyncio.get_running_loop().create_task(beat())
        task = place.actions.reclaim(place.session, 32 * MIB, (), "it waits")
        assert place.actions.reclaim(place.session, 32 * MIB, (), "again") is task
        began = time.monotonic()
        got = await task
        took = time.monotonic() - began
        beats.cancel()
        late = f"the loop was late by at most {max(lags) * 1e3:.0f} ms"
        print(f"reclaimed {got / MIB:.1f} MiB in {took:.2f} s; {late}")
        return got

    got = asyncio.run(run())
    assert 30 * MIB < got < 40 * MIB
    assert leaf.read(knobs.MEMORY_CURRENT) < held - 30 * MIB
    assert leaf.read(knobs.MEMORY_SWAP_CURRENT) > 24 * MIB
    (entry,) = place.events("reclaim")
    assert entry["reclaimed_bytes"] == got and entry["why"] == "it waits"
    host = read_host(Host(), place.pool)
    assert host.can_reclaim and host.swap_is_zram
    assert 0 < host.swap_free_bytes < SWAP_BYTES
    stat = swap.stat()
    used = zram_used_bytes(place.pool)
    print(
        f"zram holds {stat.held_bytes / MIB:.1f} MiB in {stat.used_bytes / MIB:.1f} MiB; "
        f"the pool's part {used / MIB:.1f} MiB"
    )
    assert 0 < used <= stat.used_bytes < stat.held_bytes / 2

    time.sleep(1.1)
    view = sampler.views(boottime_usec())[0]
    assert view.waiting_usec >= 1_000_000 and view.reclaimed_usec is not None
    assert view.refaults_per_s < 100, "an idle interpreter touches a page now and then"
    ask(holder)
    assert answer(holder) == before
    time.sleep(1.1)
    view = sampler.views(boottime_usec())[0]
    print(f"coming back: {view.refaults_per_s:.0f} refaults/s")
    assert view.refaults_per_s > 1000 and view.waiting_usec == 0


def test_what_a_reclaim_cannot_get_is_no_error(place: Place, swap: Zram) -> None:
    """EAGAIN: there was less."""

    async def run() -> int:
        return await place.actions.reclaim(place.session, 64 * MIB, (), "it waits")

    assert asyncio.run(run()) < MIB
    assert len(place.events("reclaim")) == 1


def test_a_call_that_begins_ends_the_reclaim(place: Place, swap: Zram) -> None:
    holder = place.start(place.session.agent, HOLDER, HELD_PAGES)
    assert answer(holder) == "holding"

    async def run() -> int:
        task = place.actions.reclaim(place.session, 40 * MIB, (), "it waits")
        await asyncio.sleep(0)
        place.call()
        return await task

    assert asyncio.run(run()) <= 16 * MIB


def test_a_frozen_call_is_swapped_out_and_goes_on_as_it_was(place: Place, swap: Zram) -> None:
    call = place.call()
    holder = place.start(call.cgroup, HOLDER, HELD_PAGES)
    assert answer(holder) == "holding"
    ask(holder)
    before = answer(holder)

    async def run() -> int:
        running = await place.actions.reclaim(place.session, 32 * MIB, (call,), "it is paused")
        assert running == 0, "it is not paused"
        place.actions.freeze(call, "to make room")
        got = await place.actions.reclaim(place.session, 32 * MIB, (call,), "it is paused")
        assert call.cgroup.read(knobs.CGROUP_EVENTS)["frozen"] == 1
        assert call.cgroup.read(knobs.MEMORY_SWAP_CURRENT) > 24 * MIB
        place.actions.thaw(call, "there is room")
        return got

    got = asyncio.run(run())
    print(f"{got / MIB:.1f} MiB of a frozen call")
    assert got > 30 * MIB
    ask(holder)
    assert answer(holder) == before


def test_what_is_reclaimed_from_the_pool_is_file_cache_and_nobody_is_swapped_out(
    place: Place, swap: Zram
) -> None:
    holder = place.start(place.session.agent, HOLDER, HELD_PAGES)
    assert answer(holder) == "holding"
    cached = large_file()
    drop_cache(cached)
    reader = place.start(place.session.agent, READER.replace("PATH", str(cached)), 0)
    assert answer(reader) == "read"

    async def run() -> int:
        return await place.actions.reclaim_pool(
            16 * MIB, "it is short", [CacheHolder(place.pool, 24 * MIB)]
        )

    took = asyncio.run(run())
    swapped = place.session.cgroup.read(knobs.MEMORY_SWAP_CURRENT)
    print(f"{took / MIB:.1f} MiB of file cache, {swapped / MIB:.1f} MiB swapped out")
    assert took > 8 * MIB and swapped == 0


READER = """
open("PATH", "rb").read(24 << 20)
print("read", flush=True)
sys.stdin.readline()
"""


def large_file() -> Path:
    """A file of 20 MB or more on a disk."""
    libraries = Path("/usr/lib/x86_64-linux-gnu").glob("*.so*")
    found = (p for p in libraries if p.is_file() and p.stat().st_size > 20_000_000)
    return next(found)


def drop_cache(path: Path) -> None:
    """Have the kernel forget the pages of a file, so that its next reader is charged for them."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# What is slowed


def grow(place: Place, mib: int, before: Callable[[Call], None]) -> tuple[float, Call]:
    """A call grows by `mib`; its own seconds for that."""
    call = place.call()
    grower = place.start(call.cgroup, f"import sys; sys.stdin.readline()\n{GROWER}", mib)
    before(call)
    ask(grower)
    took = float(answer(grower))
    return took, call


def test_with_zram_a_throttled_allocator_goes_on(place: Place, swap: Zram) -> None:
    free_s, free = grow(place, 100, lambda call: None)
    free.cgroup.kill()
    slack = 16 * MIB
    throttled_s, call = grow(place, 100, lambda c: place.actions.throttle(c, slack, "to slow it"))
    high = call.cgroup.read(knobs.MEMORY_HIGH)
    current = call.cgroup.read(knobs.MEMORY_CURRENT)
    swapped = call.cgroup.read(knobs.MEMORY_SWAP_CURRENT)
    print(
        f"100 MiB in {free_s:.2f} s free, {throttled_s:.2f} s throttled; then it held "
        f"{current / MIB:.1f} MiB with memory.high {(high or 0) / MIB:.1f} MiB and "
        f"{swapped / MIB:.1f} MiB swapped out"
    )
    assert high is not None and call.throttled_at_bytes == high - slack
    assert current < high + 4 * MIB and swapped > 60 * MIB
    # 8 to 10 s for each 10 MiB above memory.high without swap.
    assert throttled_s < free_s + 20
    (told,) = place.events("throttle")
    assert told["call"] == call.id
    place.actions.throttle(call, slack, "again")
    for why in ("there is room", "again"):
        place.actions.unthrottle(call, why)
    assert call.cgroup.read(knobs.MEMORY_HIGH) is None
    assert len(place.events("throttle")) == len(place.events("unthrottle")) == 1


def test_a_throttle_never_gives_more_than_the_grant(place: Place) -> None:
    call = place.call(high_bytes=8 * MIB)
    place.actions.throttle(call, 1 << 30, "to slow it")
    assert call.cgroup.read(knobs.MEMORY_HIGH) == 8 * MIB
    place.actions.let_go(call, "The daemon is stopping.")
    assert call.cgroup.read(knobs.MEMORY_HIGH) == 8 * MIB and call.throttled_at_bytes is None


def test_letting_go_undoes_everything(place: Place) -> None:
    call = place.call()
    place.actions.freeze(call, "x")
    place.actions.throttle(call, MIB, "x")
    place.actions.slow(place.session, 25, "x")
    assert place.session.cgroup.read(knobs.CPU_WEIGHT) == 25
    place.actions.let_go(call, "The daemon is stopping.")
    assert call.cgroup.read(knobs.MEMORY_HIGH) is None
    assert not call.cgroup.read(knobs.CGROUP_FREEZE)
    assert place.session.cgroup.read(knobs.CPU_WEIGHT) == 100 and not place.session.slowed


def test_a_slowed_session_is_restored(place: Place) -> None:
    actions, session = place.actions, place.session
    actions.restore(session, "not slowed")
    actions.slow(session, 50, "it stalls")
    actions.slow(session, 10, "again")
    assert session.cgroup.read(knobs.CPU_WEIGHT) == 50 and session.slowed
    actions.restore(session, "over")
    actions.restore(session, "again")
    assert session.cgroup.read(knobs.CPU_WEIGHT) == 100
    assert len(place.events("slow")) == len(place.events("restore")) == 1


@pytest.mark.psi
def test_stalls_on_memory_fire_a_trigger(place: Place, swap: Zram) -> None:
    call = place.call()
    grower = place.start(call.cgroup, f"import sys; sys.stdin.readline()\n{GROWER}", 100)

    async def run() -> None:
        fired: list[int] = []
        trigger = PressureTrigger(
            place.session.cgroup, "some", 20_000, 500_000, lambda: fired.append(boottime_usec())
        )
        trigger.start()
        await asyncio.sleep(1)
        assert not fired
        place.actions.throttle(call, 4 * MIB, "to slow it")
        began = boottime_usec()
        ask(grower)
        deadline = time.monotonic() + 2 * SLOW
        while not fired:
            assert time.monotonic() < deadline, "it did not fire"
            await asyncio.sleep(0.01)
        print(f"fired {(fired[0] - began) / 1e3:.0f} ms after the growth began")
        trigger.stop()

    asyncio.run(run())
