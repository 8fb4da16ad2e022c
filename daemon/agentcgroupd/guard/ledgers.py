"""What is known of the credit of each open call, and of all of them together."""

from __future__ import annotations

import bisect
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from agentcgroupd.cgroup import knobs
from agentcgroupd.enforce import memory_high
from agentcgroupd.errors import KnobError
from agentcgroupd.guard.look import file_cache
from agentcgroupd.policy.snapshot import CallView
from agentcgroupd.state.session import Call, frozen_usec

GREW_BYTES = 1 << 20
STEADY_LOOKS_USEC = 100_000
"""Most time between two looks in a row. Those further apart do not tell how fast a call grows: it
may have been stopped."""
KNOWN_USEC = 200_000
"""A call is taken to grow at any speed before it has been seen to run freely for this long."""
SLOWER = 0.5
"""A call that does not grow any more is taken to be able to grow at this part of its speed after a
second, and so on: most calls grow in bursts."""
CACHE_USEC = 200_000
"""What a call has in file cache is known for this long."""
CACHE_PART = 4
"""With this part of what it holds in clean file cache a call is slow at its bound, no more: the
kernel takes cache of it (mm/memcontrol.c: reclaim_high) for each page that it is charged for."""


@dataclass(slots=True, eq=False)
class Ledger:
    """What is known of one call."""

    call: Call
    bound: int
    priority: int
    """The call's own when the ledger was opened: what others lend it is lent for a moment."""
    seen: int = 0
    """Bytes that it was last seen to hold."""
    grew_usec: int = 0
    grew_to: int = 0
    """Bytes that it held when it was last seen to grow."""
    started: bool = False
    """Whether it got more since it is looked at."""
    since_usec: int | None = None
    """Since when it has asked for more than it got; None: it has not."""
    tried_at: int | None = None
    """Bytes that it held when it was last let run without more; None: it is not, or got more."""
    tries: int = 0
    """How often it was let run without more since it last got more."""
    try_usec: int = 0
    """When it may be let run without more again."""
    cache_usec: int | None = None
    """When it was last found out how much of what it holds is file cache; None: not yet."""
    lives_on_cache: bool = False
    """Whether that was enough to grow into: at its bound the kernel takes its cache for it."""
    rested_at: int | None = None
    """Bytes that it held when it began to rest after it had grown; None: it has not, or grows."""
    growth_bytes_per_s: float = 0.0
    """How fast it lately grew while nothing held it back."""
    ran_usec: int = 0
    """Time for which nothing held it back between looks in a row."""
    looked: tuple[int, int] = (0, 0)
    """(usec, bytes): when it was last looked at while it ran, and what it held."""
    file: int | None = None
    """Descriptor of memory.current while it is looked at."""
    watch: int | None = None

    @property
    def unused(self) -> int:
        """Bytes that it may still take without asking."""
        return max(0, self.bound - self.seen)

    def read(self) -> int:
        """Read what the call holds, of a file that stays open until `close`. Raises KnobError."""
        if self.file is None:
            self.file = self.call.cgroup.open_file(knobs.MEMORY_CURRENT, os.O_RDONLY)
        try:
            return int(os.pread(self.file, 32, 0))
        except OSError as error:
            path, file = str(self.call.cgroup.path), knobs.MEMORY_CURRENT.file
            raise KnobError(error, path, file, None) from None

    def close(self) -> None:
        """Close the file; no error if it is not open."""
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def grew(self, seen: int, now_usec: int) -> None:
        """Note whether it has grown and how fast, now that it is seen to hold so much."""
        if self.call.frozen_since_usec is None:
            self._grew_at_speed(seen, now_usec)
        if seen > self.grew_to + GREW_BYTES:
            self.grew_usec, self.grew_to = now_usec, seen
        self.grew_to = min(self.grew_to, seen + GREW_BYTES)

    def _grew_at_speed(self, seen: int, now_usec: int) -> None:
        then_usec, before = self.looked
        self.looked = now_usec, seen
        took_usec = now_usec - then_usec
        if not 0 < took_usec < STEADY_LOOKS_USEC:
            return
        if self.unused:  # else it may sleep at its bound, which says nothing of its speed
            self.ran_usec += took_usec
            self.growth_bytes_per_s *= SLOWER ** (took_usec / 1e6)
        self.growth_bytes_per_s = max(self.growth_bytes_per_s, (seen - before) * 1e6 / took_usec)

    def find_cache(self, now_usec: int) -> None:
        """Find out whether it has file cache to grow into, if that was some time ago. Raises
        KnobError."""
        if self.cache_usec is not None and now_usec - self.cache_usec < CACHE_USEC:
            return
        clean = file_cache(self.call.cgroup).clean_bytes
        self.cache_usec, self.lives_on_cache = now_usec, clean >= self.seen // CACHE_PART

    def view(self, now_usec: int) -> CallView:
        """Show the call as the policy of credit sees it."""
        call, speed_known = self.call, self.ran_usec > KNOWN_USEC
        return CallView(
            id=call.id,
            name=call.name,
            session_id=call.session.id,
            priority=call.priority,
            began_usec=call.began_boot_usec,
            memory_bytes=self.seen,
            growth_bytes_per_s=self.growth_bytes_per_s if speed_known else math.inf,
            cpu_usec=0,
            paused_usec=frozen_usec(call, now_usec),
            expected_bytes=call.likely_bytes or call.grant.memory_expected_bytes,
            memory_max_bytes=call.grant.memory_max_bytes,
        )


class Ledgers:
    """The ledgers of all open calls, and sums over them."""

    def __init__(self, ended: Callable[[], tuple[int, ...]]) -> None:
        """`ended`: peaks of calls that have ended, ascending."""
        self._ended = ended
        self._of: dict[str, Ledger] = {}
        self._rested: list[int] = []
        """What calls hold that grew and do so no more, ascending: as good as their peaks."""
        self._peaks: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        """Peaks of ended calls, and the same with what is in `_rested`, ascending."""
        self._priorities: Counter[int] = Counter()
        self.unused_bytes = 0
        """What all calls may take without asking."""

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[Ledger]:
        return iter(list(self._of.values()))

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._of

    def get(self, call_id: str) -> Ledger | None:
        """Find the ledger of a call."""
        return self._of.get(call_id)

    def add(self, call: Call) -> Ledger:
        """Open a ledger for a call that may take nothing yet."""
        ledger = self._of[call.id] = Ledger(call, 0, call.grant.priority)
        self._priorities[ledger.priority] += 1
        return ledger

    def remove(self, ledger: Ledger) -> None:
        """Close the ledger of a call that has ended."""
        self.unused_bytes -= ledger.unused
        ledger.close()
        self.grows(ledger)
        del self._of[ledger.call.id]
        self._priorities[ledger.priority] -= 1
        if not self._priorities[ledger.priority]:
            del self._priorities[ledger.priority]

    def ranks_first(self, call: Call) -> bool:
        """Tell whether no open call is more important."""
        return call.priority >= max(self._priorities, default=call.priority)

    def see(self, ledger: Ledger, seen: int) -> None:
        """Note what a call is seen to hold."""
        self.unused_bytes -= ledger.unused
        ledger.seen = seen
        self.unused_bytes += ledger.unused

    def bind(self, ledger: Ledger, bound: int) -> None:
        """Set what a call may reach. Raises KnobError."""
        self.unused_bytes -= ledger.unused
        ledger.bound = ledger.call.bounds.credit_bytes = bound
        self.unused_bytes += ledger.unused
        memory_high.write(ledger.call)

    def rests(self, ledger: Ledger) -> None:
        """Take what a call holds that grew and does so no more for its peak."""
        self.grows(ledger)
        ledger.rested_at = ledger.seen
        bisect.insort(self._rested, ledger.seen)
        self._peaks = None

    def grows(self, ledger: Ledger) -> None:
        """Take what a call held when it rested for its peak no longer."""
        if ledger.rested_at is not None:
            del self._rested[bisect.bisect_left(self._rested, ledger.rested_at)]
            ledger.rested_at = None
            self._peaks = None

    def peaks(self) -> tuple[int, ...]:
        """Peaks of ended calls, and what those hold that grew and do so no more, ascending."""
        ended = self._ended()
        if self._peaks is None or self._peaks[0] is not ended:
            self._peaks = ended, tuple(sorted((*ended, *self._rested)))
        return self._peaks[1]
