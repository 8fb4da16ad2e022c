"""What this host can do when memory runs short, as far as decisions depend on it."""

from __future__ import annotations

from dataclasses import replace

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.disk_share import has_weight
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.enforce.disks import IO_MAX
from agentcgroupd.host import zram
from agentcgroupd.host.zram import Swap, ZramStat
from agentcgroupd.policy.snapshot import Host


def zram_free(stat: ZramStat) -> int | None:
    """How many bytes a device still takes in before its memory limit, at the compression that it
    has reached so far, or none where it holds nothing; None: no limit."""
    if stat.limit_bytes == 0:
        return None
    ratio = max(1.0, stat.held_bytes / stat.used_bytes) if stat.used_bytes else 1.0
    return max(0, int((stat.limit_bytes - stat.used_bytes) * ratio))


def swap_free(areas: tuple[Swap, ...], stats: tuple[ZramStat, ...], pool_free: int | None) -> int:
    """Bytes that the pool can still swap out. `stats`: of the zram devices in `areas`, in their
    order; `pool_free`: below the pool's own limit, None: it has none."""
    free, of_zram = 0, iter(stats)
    for area in areas:
        free_here = area.size_bytes - area.used_bytes
        if area.is_zram:
            most = zram_free(next(of_zram))
            free_here = free_here if most is None else min(free_here, most)
        free += max(0, free_here)
    return free if pool_free is None else max(0, min(free, pool_free))


def zram_share(swapped_bytes: int, stats: tuple[ZramStat, ...]) -> int:
    """Memory that the devices take for `swapped_bytes` of what they hold."""
    held = sum(stat.held_bytes for stat in stats)
    used = sum(stat.used_bytes for stat in stats)
    return int(used * min(1.0, swapped_bytes / held)) if held else 0


def read_host(programs: Host, pool: Cgroup) -> Host:
    """Four small files, some 50 microseconds, added to what the kernel's programs can do here.
    Raises KnobError or OSError."""
    areas = zram.swaps()
    files = pool.files()
    programs = replace(
        programs,
        can_reclaim=knobs.MEMORY_RECLAIM.file in files,
        has_io_weight=has_weight(files),
        has_io_max=IO_MAX.file in files,
    )
    if not areas:
        return programs
    most = pool.read_if(knobs.MEMORY_SWAP_MAX)
    free_here = None if most is None else most - pool.read(knobs.MEMORY_SWAP_CURRENT)
    return replace(
        programs,
        swap_free_bytes=swap_free(areas, zram.swap_stats(areas), free_here),
        # Where pages go first.
        swap_is_zram=max(areas, key=lambda area: area.priority).is_zram,
    )


def zram_used_bytes(pool: Cgroup) -> int:
    """Memory of the host that holds what the pool has swapped to zram: in no cgroup's account, so
    the pool's budget has to count it. Raises KnobError or OSError."""
    stats = zram.swap_stats(zram.swaps())
    if not stats:
        return 0
    swapped = pool.read_if(knobs.MEMORY_SWAP_CURRENT)
    return zram_share(sum(s.held_bytes for s in stats) if swapped is None else swapped, stats)
