"""memory.high of a call: one place that composes it and writes it.

Several parts of the daemon hold a call's growth back by the same file: its grant, a throttle, its
credit, and the brake of a pause. Each sets its own bound in `Call.bounds`; what is written is the
least of them, so none can undo another's. The grant is in the call's record, which therefore always
says what the file has to hold once no daemon holds the call back.
"""

from __future__ import annotations

from agentcgroupd.cgroup import knobs
from agentcgroupd.state.session import Call

PAGE_BYTES = 4096
"""The kernel keeps whole pages of at least this size."""


def can_hold(call: Call) -> bool:
    """Tell whether this kernel gives the call a memory.high."""
    return knobs.MEMORY_HIGH.file in call.session.offered


def composed(call: Call) -> int | None:
    """Return the least bound in bytes of all that hold a call back; None: there is none."""
    bounds = call.bounds
    wanted = (
        call.grant.memory_high_bytes,
        bounds.throttle_bytes,
        bounds.credit_bytes,
        bounds.brake_bytes,
    )
    return min((b for b in wanted if b is not None), default=None)


def write(call: Call) -> None:
    """Set memory.high of a call to the least of its bounds, unless that is what was written last.
    The writer does not reclaim where the kernel can leave that to the call (Linux 6.16). Raises
    KnobError, or CgroupGone."""
    wanted = composed(call)
    if not can_hold(call) or call.bounds.written == (wanted,):
        return
    rounded = None if wanted is None else max(wanted, 0) // PAGE_BYTES * PAGE_BYTES
    call.cgroup.write(knobs.MEMORY_HIGH, rounded, wait=False)
    call.bounds.written = (wanted,)


def take_up(call: Call) -> None:
    """Put memory.high of a call that was found again back to its grant: the daemon before may have
    been killed while it held the call back. Raises KnobError, or CgroupGone."""
    call.bounds.written = None
    write(call)
