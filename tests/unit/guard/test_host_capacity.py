"""What the host can do, from what the kernel shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.guard import host_capacity
from agentcgroupd.host import zram
from agentcgroupd.host.zram import Swap, ZramStat
from agentcgroupd.policy.snapshot import Host

MIB = 1 << 20
SIZES = st.integers(0, 1 << 44)


@st.composite
def stats(draw: st.DrawFn) -> ZramStat:
    """Any state of a device: what it takes may pass its limit a little."""
    return ZramStat(draw(SIZES), draw(SIZES), draw(st.just(0) | SIZES))


@st.composite
def areas(draw: st.DrawFn) -> Swap:
    """Any swap area."""
    size = draw(SIZES)
    path = draw(st.sampled_from(["/dev/zram0", "/dev/sda2"]))
    return Swap(path, size, draw(st.integers(0, size)), draw(st.integers(-2, 32767)))


@given(stats())
def test_room_ends_at_the_devices_limit(stat: ZramStat) -> None:
    room = host_capacity.zram_free(stat)
    assert (room is None) == (stat.limit_bytes == 0)
    if room is not None:
        assert room >= 0
        assert (room == 0) or stat.used_bytes < stat.limit_bytes


def test_room_is_what_fits_at_the_compression_so_far() -> None:
    assert host_capacity.zram_free(ZramStat(0, 0, 100 * MIB)) == 100 * MIB
    assert host_capacity.zram_free(ZramStat(90 * MIB, 30 * MIB, 100 * MIB)) == 210 * MIB
    # A device that has not paid off yet is not counted as less than one to one.
    assert host_capacity.zram_free(ZramStat(1 * MIB, 2 * MIB, 100 * MIB)) == 98 * MIB


@given(st.lists(areas()), st.none() | SIZES, st.data())
def test_free_swap_is_never_more_than_any_bound(
    found: list[Swap], room: int | None, data: st.DataObject
) -> None:
    of_zram = tuple(data.draw(stats()) for area in found if area.is_zram)
    free = host_capacity.swap_free(tuple(found), of_zram, room)
    assert 0 <= free <= sum(a.size_bytes - a.used_bytes for a in found)
    assert room is None or free <= room


@given(st.lists(stats()), SIZES)
def test_a_pools_share_is_part_of_what_all_take(found: list[ZramStat], swapped: int) -> None:
    share = host_capacity.zram_share(swapped, tuple(found))
    assert 0 <= share <= sum(s.used_bytes for s in found)


def test_half_of_what_is_held_takes_half_of_the_memory() -> None:
    assert host_capacity.zram_share(50 * MIB, (ZramStat(100 * MIB, 30 * MIB, 0),)) == 15 * MIB
    assert host_capacity.zram_share(50 * MIB, (ZramStat(0, 4096, 0),)) == 0


@pytest.fixture
def pool(tmp_path: Path) -> Cgroup:
    """The files of a pool that are looked at; no kernel has been asked."""
    (tmp_path / "cgroup.procs").touch()
    (tmp_path / "memory.reclaim").touch()
    (tmp_path / "memory.swap.current").write_text("104857600\n")
    (tmp_path / "memory.swap.max").write_text("max\n")
    return Cgroup.open(tmp_path)


def swap_to(monkeypatch: pytest.MonkeyPatch, *found: Swap, stat: ZramStat | None = None) -> None:
    """Let the host swap to these."""
    monkeypatch.setattr(zram, "swaps", lambda: found)
    monkeypatch.setattr(zram, "swap_stats", lambda areas: (stat,) if stat else ())


def test_without_swap_nothing_is_free(monkeypatch: pytest.MonkeyPatch, pool: Cgroup) -> None:
    swap_to(monkeypatch)
    assert host_capacity.read_host(Host(can_deny=True), pool) == Host(
        can_deny=True, can_reclaim=True
    )
    assert host_capacity.zram_used_bytes(pool) == 0
    (pool.path / "memory.reclaim").unlink()
    assert host_capacity.read_host(Host(), pool) == Host()


def test_the_pools_own_limit_on_swap_counts(monkeypatch: pytest.MonkeyPatch, pool: Cgroup) -> None:
    swap_to(monkeypatch, Swap("/dev/sda2", 1000 * MIB, 200 * MIB, -2))
    seen = host_capacity.read_host(Host(), pool)
    assert (seen.swap_free_bytes, seen.swap_is_zram) == (800 * MIB, False)
    (pool.path / "memory.swap.max").write_text(f"{300 * MIB}\n")
    assert host_capacity.read_host(Host(), pool).swap_free_bytes == 200 * MIB
    # A kernel that does not account swap (CONFIG_SWAP without memory.swap.*) has no such limit.
    (pool.path / "memory.swap.max").unlink()
    assert host_capacity.read_host(Host(), pool).swap_free_bytes == 800 * MIB


def test_the_first_to_be_used_says_whether_swap_is_zram(
    monkeypatch: pytest.MonkeyPatch, pool: Cgroup
) -> None:
    disk, device = Swap("/dev/sda2", MIB, 0, -2), Swap("/dev/zram0", MIB, 0, 100)
    full = ZramStat(200 * MIB, 50 * MIB, 0)
    swap_to(monkeypatch, disk, device, stat=full)
    assert host_capacity.read_host(Host(), pool).swap_is_zram
    assert host_capacity.zram_used_bytes(pool) == 25 * MIB
    swap_to(monkeypatch, Swap("/dev/sda2", MIB, 0, 200), device, stat=full)
    assert not host_capacity.read_host(Host(), pool).swap_is_zram
