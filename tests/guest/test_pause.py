"""Pauses on a real kernel: a call that takes memory inside one system call stops as well, goes on
as if nothing had been, and what was set before is put back. Counts of bytes, and no times."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from agentcgroupd.cgroup import knobs
from agentcgroupd.enforce import memory_high, pause
from agentcgroupd.state.session import Call
from tests.guest.place import Place, answer
from tests.harness import wait_until

pytestmark = pytest.mark.controllers

MIB = 1 << 20
ALL_MIB = 300
AT_MIB = 40
"""What a call holds when it is paused."""
MOST_PAST = 16 * MIB
"""Promised: what a call may still take after it was paused, whatever it is in the middle of."""
HOW = {
    "touching": "m = mmap.mmap(-1, n)\nfor i in range(0, n, 4096): m[i] = 1",
    "populate": "m = mmap.mmap(-1, n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x8000)",
    "mlock": "m = mmap.mmap(-1, n)\nassert not c.mlock(address(m), n)",
    "tmpfs": "m = os.memfd_create('m')\nos.posix_fallocate(m, 0, n)",
}
"""Ways to take n bytes; all but the first do it inside one system call."""
BEGIN = """
import ctypes, mmap, os, sys
c = ctypes.CDLL(None, use_errno=True)
c.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
address = lambda m: ctypes.addressof(ctypes.c_char.from_buffer(m))
n = int(sys.argv[1]) << 20
"""
END = """
print("done", flush=True)
sys.stdin.readline()
"""


def used(call: Call) -> int:
    return call.cgroup.read(knobs.MEMORY_CURRENT)


def growing(place: Place, how: str, high_bytes: int | None = None) -> Call:
    """A call that has just begun to grow."""
    call = place.call(high_bytes)
    place.start(call.cgroup, f"{BEGIN}{HOW[how]}{END}", ALL_MIB)
    wait_until("it grows", lambda: used(call) > AT_MIB * MIB, every_s=0.001)
    return call


def settled(read: Callable[[], int], for_s: float = 0.5) -> int:
    """What `read` gives once it has been the same for a while."""
    value, since = read(), time.monotonic()
    while time.monotonic() - since < for_s:
        time.sleep(0.02)
        if (now := read()) > value + MIB:
            value, since = now, time.monotonic()
    return read()


@pytest.mark.parametrize("how", HOW)
def test_a_paused_call_takes_next_to_nothing_more_and_ends_well_later(
    place: Place, how: str
) -> None:
    call = growing(place, how)
    at = used(call)
    place.actions.freeze(call, "the pool is short")
    past = settled(lambda: used(call)) - at
    frozen = call.cgroup.read(knobs.CGROUP_EVENTS)["frozen"]
    print(f"{how}: {past / MIB:.1f} MiB past, frozen {frozen}")
    assert past <= MOST_PAST
    assert used(call) < (ALL_MIB - 50) * MIB
    assert call.cgroup.read(knobs.CGROUP_FREEZE)
    place.actions.thaw(call, "there is room")
    assert call.cgroup.read(knobs.MEMORY_HIGH) is None
    assert not call.cgroup.read(knobs.CGROUP_FREEZE)
    assert answer(place.processes[-1]) == "done"


def test_without_the_brake_a_pause_does_not_stop_a_system_call(place: Place) -> None:
    """What the brake is for."""
    call = growing(place, "populate")
    pause.stop(call, None)
    wait_until("it has taken all", lambda: used(call) > (ALL_MIB - 50) * MIB)
    assert call.cgroup.read(knobs.CGROUP_FREEZE)


@pytest.mark.parametrize("how", ["touching", "populate"])
def test_a_pause_that_does_not_stop_all_tasks_is_counted_once(place: Place, how: str) -> None:
    call = growing(place, how)
    place.actions.freeze(call, "the pool is short")
    wait_until("the pause is old enough", lambda: looked(place, call) or call.counted_late)
    for _ in range(3):
        place.actions.check_pause(call)
    late = 1 if how == "populate" else 0
    assert (call.late_pauses, call.stopped) == (late, not late)
    assert len(place.events("pause_late")) == late
    if late:
        assert place.events("pause_late")[0]["braked"] is True


def looked(place: Place, call: Call) -> bool:
    place.actions.check_pause(call)
    return call.stopped


@pytest.mark.parametrize("high_mib", [None, 200])
def test_grant_throttle_and_brake_are_put_back_in_any_order(
    place: Place, high_mib: int | None
) -> None:
    high = None if high_mib is None else high_mib * MIB
    call = growing(place, "touching", high)
    memory_high.take_up(call)
    assert call.cgroup.read(knobs.MEMORY_HIGH) == high
    place.actions.throttle(call, 16 * MIB, "it grows")
    throttled = call.cgroup.read(knobs.MEMORY_HIGH)
    place.actions.freeze(call, "the pool is short")
    braked = call.cgroup.read(knobs.MEMORY_HIGH)
    assert throttled is not None and braked is not None and braked < throttled
    place.actions.unthrottle(call, "there is swap again")
    assert call.cgroup.read(knobs.MEMORY_HIGH) == braked  # it is paused all the same
    place.actions.throttle(call, 64 * MIB, "it grows")
    assert call.cgroup.read(knobs.MEMORY_HIGH) == braked
    place.actions.thaw(call, "there is room")
    assert call.cgroup.read(knobs.MEMORY_HIGH) == call.bounds.throttle_bytes
    by_cpu_before = call.throttled_by_cpu
    place.actions.unthrottle(call, "there is room")
    assert call.cgroup.read(knobs.MEMORY_HIGH) == high
    place.actions.throttle(call, 16 * MIB, "it grows", by_cpu=True)
    assert call.throttled_by_cpu and not by_cpu_before
    assert call.cgroup.read(knobs.MEMORY_HIGH) == high


def test_another_daemon_lifts_the_brake_before_it_thaws(place: Place) -> None:
    call = growing(place, "populate", 250 * MIB)
    place.actions.freeze(call, "the pool is short")
    other = Call.from_record(place.session, call.cgroup, record_of(call))
    assert other.bounds.brake_bytes is None
    place.actions.take_up(other)
    assert other.cgroup.read(knobs.MEMORY_HIGH) == 250 * MIB
    assert not other.cgroup.read(knobs.CGROUP_FREEZE)


def record_of(call: Call) -> dict[str, object]:
    data: dict[str, object] = json.loads(call.record())
    return data


def test_time_frozen_with_its_session_counts_and_a_freeze_of_its_own_does_not(
    place: Place,
) -> None:
    call = growing(place, "touching")
    if not call.cgroup.has(knobs.CGROUP_STAT_LOCAL):
        pytest.skip("this kernel has no cgroup.stat.local")
    for cgroup, counts in ((call.cgroup, False), (place.session.cgroup, True)):
        cgroup.write(knobs.CGROUP_FREEZE, True)
        time.sleep(0.2)
        cgroup.write(knobs.CGROUP_FREEZE, False)
        assert (pause.paused_usec(call) >= 200_000) is counts
    assert pause.frozen_by_others_usec(call) >= 400_000


def test_a_pause_that_a_killed_daemon_left_counts_until_its_release(place: Place) -> None:
    call = growing(place, "touching")
    if not call.cgroup.has(knobs.CGROUP_STAT_LOCAL):
        pytest.skip("this kernel has no cgroup.stat.local")
    place.actions.freeze(call, "the pool is short")
    other = Call.from_record(place.session, call.cgroup, record_of(call))
    time.sleep(0.2)
    call.cgroup.write(knobs.CGROUP_FREEZE, False)
    time.sleep(0.2)
    place.actions.take_up(other)
    assert other.frozen_since_usec is None
    assert 200_000 <= pause.paused_usec(other) < 400_000
