"""Credit of calls: how far each may grow before it has to ask (policy/credit.py says how far).

A call that passes its memory.high changes its memory.events, which wakes the daemon. From then on
it is looked at until it has not grown for a while, and gets more before it has used up what it has.
Calls that stay below their first credit, as most do, never wake anybody, and calls that rest are
not looked at. What a call may still take without asking is known without looking: its bound less
what it was last seen to hold, which is never too little.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import ParamSpec

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.enforce import memory_high, pause
from agentcgroupd.errors import BpfError, CgroupGone, KnobError
from agentcgroupd.guard.ledgers import GREW_BYTES, Ledger, Ledgers
from agentcgroupd.guard.sampler import Sampler
from agentcgroupd.policy import credit
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import Snapshot
from agentcgroupd.state.session import Call, boottime_usec, frozen_usec
from agentcgroupd.units import IMPORTANT_PRIORITY, show_bytes

P = ParamSpec("P")
log = logging.getLogger(__name__)

LOOK_S = 0.01
"""Between two looks at the calls that grow. One core takes 20 MiB in it, a third of the credit."""
REST_USEC = 200_000
"""A call that has not grown for this long is not looked at any more."""
FIRST_USEC = 1_000_000
"""After this time a call that has not asked rests, and keeps a small credit."""
YOUNG_PAUSE_S, YOUNG_SLICE_S = 0.02, 0.002
"""Calls that have begun are put to rest in slices of YOUNG_SLICE_S, so that others have their turn.
YOUNG_PAUSE_S: least pause between slices while no call is looked at; else LOOK_S."""
HOLD_USEC = 100_000
"""A call that has waited this long for credit is paused; until then its tasks
sleep in the kernel at memory.high."""
TRY_BYTES = 512 << 10
"""A paused call that is let run to see whether it needs more does so if it grows by this: little
enough to try many, and two batches of pages for a thread."""
BATCH_BYTES = 256 << 10
"""What a thread may be charged for before it sleeps at memory.high (mm/memcontrol.c: 64 pages)."""
TRY_USEC = 200_000
"""Another one is not tried before this time has passed."""
TRY_AGAIN_USEC = 1_000_000
"""A paused call is tried after this time, then after twice as long, and so on."""
TRY_DOUBLED_MOST = 6
NO_SLEEP_SHARE = 1.0125
"""Below this part of memory.high nobody sleeps (mm/memcontrol.c leaves waits under 10 ms out)."""
CACHE_MATTERS_SHARE = 0.5
"""While more of the pool than this is free, nobody asks how much of its use is file cache."""
TAKE_BACK_MOST = 100
"""Calls that credit is taken back from at a time."""


class CreditKeeper:
    """Keeps the credit of all open calls. `start` and `stop` on a running loop."""

    def __init__(
        self,
        policy: Callable[[], Policy],
        sampler: Sampler,
        calls: Calls,
        events: FileEvents,
        peaks: Callable[[], tuple[int, ...]],
        can_deny: Callable[[], bool],
    ) -> None:
        self._policy, self._sampler, self._calls = policy, sampler, calls
        self._events, self._can_deny = events, can_deny
        self._loop = asyncio.get_running_loop()
        self._ledgers = Ledgers(peaks)
        self._looked_at: dict[str, Ledger] = {}
        """Those that grow or ask, by id."""
        self._young: deque[tuple[int, str]] = deque()
        """Calls that began lately, with the time at which they are taken to rest."""
        self._tried_usec = 0
        """When a call was last let run without more."""
        self._first = ""
        """Id of the call that was last the first in order."""
        self._free: tuple[int, int] | None = None
        """(usec, bytes): what was free of the pool when it was last read."""
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        self._running = False

    @property
    def unused_bytes(self) -> int:
        """What all calls may take without asking."""
        return self._ledgers.unused_bytes

    def start(self) -> None:
        """Give every open call its credit, and each that begins from now on."""
        self._running = True
        for call in list(self._calls.open.values()):
            self.call_opened(call)

    def stop(self) -> None:
        """Hold no call at its credit any more."""
        self._running = False
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        for ledger in self._ledgers:
            call = ledger.call
            self.call_closed(call)
            call.asks = call.awaits_credit = False
            self._sampler.touch(call)
            call.bounds.credit_bytes = None
            self._attempt(call, self._write_and_wake, call)

    def peaks(self) -> tuple[int, ...]:
        """Peaks of ended calls, and what those hold that grew and do so no more, ascending."""
        return self._ledgers.peaks()

    # Calls that come and go

    def call_opened(self, call: Call) -> None:
        """Give a call its first credit, before anything runs in it or, found again, while it
        does."""
        if call.parent is not None:
            return  # it takes from the credit of the call that it is in
        if not self._running or not memory_high.can_hold(call) or call.id in self._ledgers:
            return
        ledger = self._ledgers.add(call)
        if not self._attempt(call, self._begin, ledger):
            self._forget(ledger)

    def _begin(self, ledger: Ledger) -> None:
        call = ledger.call
        if call.entered:
            ledger.seen = call.cgroup.read(knobs.MEMORY_CURRENT)
        first = credit.first_bytes(self._policy(), self._budget(), self._sampler.limit_bytes)
        self._ledgers.bind(ledger, ledger.seen + first)
        try:
            ledger.watch = self._events.watch(
                call.cgroup,
                knobs.MEMORY_EVENTS_LOCAL,
                lambda: self._passed(ledger),
                call.session.turns_key,
            )
        except OSError as error:
            log.warning("call %s is looked at all the time: %s", call.id, error)
            self._look_at(ledger)
        self._young.append((boottime_usec() + FIRST_USEC, call.id))
        self._look_later()

    def call_closed(self, call: Call) -> None:
        """Forget a call, whose cgroup is gone or given up."""
        ledger = self._ledgers.get(call.id)
        if ledger is not None:
            self._forget(ledger)
            self.look_soon()

    def _forget(self, ledger: Ledger) -> None:
        self._leave(ledger)
        self._ledgers.remove(ledger)
        if ledger.watch is not None:
            # A watch on what was removed has ended; to end it again would take a grace period.
            gone = not ledger.call.cgroup.exists()
            (self._events.forget if gone else self._events.unwatch)(ledger.watch)

    # Looking

    def look_soon(self) -> None:
        """Serve those that ask as soon as what is being done now is done."""
        if self._running and self._looked_at and self._soon is None:
            self._soon = self._loop.call_soon(self._look)

    def _look_later(self) -> None:
        if self._timer is None and self._running and (self._looked_at or self._young):
            pause_s = LOOK_S
            if not self._looked_at:
                due_s = (self._young[0][0] - boottime_usec()) / 1e6
                pause_s = max(YOUNG_PAUSE_S, due_s)
            self._timer = self._loop.call_later(pause_s, self._timed)
        elif self._timer is not None and self._looked_at:
            due = self._loop.time() + LOOK_S
            if self._timer.when() > due + LOOK_S:
                self._timer.cancel()
                self._timer = self._loop.call_at(due, self._timed)

    def _timed(self) -> None:
        self._timer = None
        self._look()

    def _passed(self, ledger: Ledger) -> None:
        """Look at a call that may have passed its memory.high."""
        if ledger.call.id in self._ledgers:
            self._look_at(ledger)
            self.look_soon()

    def _look_at(self, ledger: Ledger) -> None:
        ledger.grew_usec, ledger.grew_to = boottime_usec(), ledger.seen
        self._ledgers.grows(ledger)
        self._looked_at[ledger.call.id] = ledger
        self._sampler.touch(ledger.call)
        self._look_later()

    def _leave(self, ledger: Ledger) -> None:
        self._looked_at.pop(ledger.call.id, None)
        ledger.close()

    def _look(self) -> None:
        self._soon = None
        now = boottime_usec()
        try:
            if self._looked_at:
                for ledger in list(self._looked_at.values()):
                    if not ledger.call.awaits_credit:
                        self._attempt(ledger.call, self._read, ledger, now)
                self._serve(now)
            self._settle_young(now)
        except KnobError as error:
            log.error("the pool cannot be read: %s", error)
        self._look_later()

    def _read(self, ledger: Ledger, now: int) -> None:
        """Read what a call holds. Raises KnobError."""
        self._saw(ledger, ledger.read(), now)

    def _saw(self, ledger: Ledger, seen: int, now: int) -> None:
        ledger.grew(seen, now)
        self._ledgers.see(ledger, seen)

    @staticmethod
    def _write_and_wake(call: Call) -> None:
        memory_high.write(call)
        pause.wake(call)

    # Giving

    def _budget(self) -> credit.Budget:
        """What there is to give. What is free is read after what calls hold, never before: growth
        in between then counts twice, and not for nothing. Raises KnobError."""
        now = boottime_usec()
        if self._free is None or now - self._free[0] > LOOK_S * 1e6:
            self._free = now, self._sampler.free_bytes(CACHE_MATTERS_SHARE)
        return credit.Budget(self._free[1], self._ledgers.unused_bytes, len(self._ledgers))

    def _serve(self, now: int) -> None:
        """Give those that ask what there is for them, and let those rest that do not grow."""
        policy, limit = self._policy(), self._sampler.limit_bytes
        accounts, ledgers = [], {}
        for ledger in list(self._looked_at.values()):
            if self._takes_no_part(ledger):
                continue
            step = credit.step_bytes(policy, ledger.seen, limit)
            asks = ledger.unused < step // 2
            waits = ledger.call.asks or ledger.call.awaits_credit
            if not waits and now - ledger.grew_usec > self._rest_usec(policy, ledger):
                self._attempt(ledger.call, self._rest, ledger)
                continue
            ledgers[ledger.call.id] = ledger
            awaits_credit = ledger.call.awaits_credit
            may_go_on = not awaits_credit or self._may_go_on(ledger.call, now)
            view = ledger.view(now)
            accounts.append(
                credit.Account(view, ledger.bound, asks, ledger.started, awaits_credit, may_go_on)
            )
        if not accounts:
            return
        self._free = None
        budget = self._budget()
        seen = Snapshot(
            now_usec=now,
            limit_bytes=limit,
            usage_bytes=limit - budget.free_bytes,
            growth_bytes_per_s=0.0,
            calls=(),
            peaks_bytes=self.peaks(),
        )
        first = credit.in_order(accounts)[0].view.id
        self._first = first
        leads = self._leads(ledgers[first].call, policy, now)
        given = credit.serve(policy, seen, budget, accounts, first_leads=leads)
        for account in accounts:
            ledger = ledgers[account.view.id]
            bound = given.get(account.view.id)
            is_first = leads and ledger.call.id == first
            self._attempt(ledger.call, self._answer, ledger, bound, account.asks, is_first, now)
        if any(a.asks and given.get(a.view.id, 0) <= a.bound_bytes for a in accounts):
            self._take_back(policy, budget, limit)
            self._try_one(policy, budget, ledgers.values(), now)

    def _try_one(
        self, policy: Policy, budget: credit.Budget, ledgers: Iterable[Ledger], now: int
    ) -> None:
        """Let a paused call run without more credit. If it needs no more, it runs to its end, and
        gives back what it holds; else it is soon paused again."""
        if now - self._tried_usec < TRY_USEC:
            return
        paused = (x for x in ledgers if x.call.frozen_since_usec is not None)
        # One that is still inside a system call there takes memory, and so needs more.
        due = [x for x in paused if x.call.stopped and now >= x.try_usec]
        due = [x for x in due if self._may_go_on(x.call, now)]
        if due:
            self._tried_usec = now
            last = credit.last_bytes(policy, self._sampler.limit_bytes)
            ledger = max(due, key=lambda x: x.seen)
            self._attempt(ledger.call, self._try, ledger, budget.free_bytes - last // 2, now)

    def _try(self, ledger: Ledger, room_bytes: int, now: int) -> None:
        """Let a call go on, unless that might cost more than there is room. Raises KnobError or
        BpfError."""
        threads = ledger.call.cgroup.read_if(knobs.PIDS_CURRENT) or 1
        if TRY_BYTES + threads * BATCH_BYTES > room_bytes:
            ledger.try_usec = now + TRY_AGAIN_USEC
            return
        ledger.tried_at, ledger.since_usec = ledger.seen, None
        ledger.tries += 1
        self._ledgers.bind(ledger, ledger.seen + TRY_BYTES)
        self._let_go_on(ledger.call, "Going on: it may need no more than it has.")

    def _rest_usec(self, policy: Policy, ledger: Ledger) -> int:
        """Return the time after which a call that does not grow rests. An important one keeps what
        it was given between its bursts, so that it asks once, and not for each of them. The first
        one keeps its place: were others to fill the pool meanwhile, it would be stuck with all that
        it holds. If that is little, it may lose it."""
        large = policy.headroom.typical.of(self._sampler.limit_bytes)
        leads = ledger.call.id == self._first and ledger.seen >= large
        keeps = leads or ledger.call.priority >= IMPORTANT_PRIORITY
        return policy.headroom.steady if keeps else REST_USEC

    def _leads(self, call: Call, policy: Policy, now: int) -> bool:
        """Tell whether the first of those that grow or ask leads: no call is more important, or the
        call has been paused for a whole lease, as in `Headroom.leader`."""
        return self._ledgers.ranks_first(call) or frozen_usec(call, now) >= policy.headroom.lease

    def _takes_no_part(self, ledger: Ledger) -> bool:
        """Tell whether a call is ending, or paused by the policy: it may have nothing in hand."""
        call = ledger.call
        if call.state == pb.CALL_STATE_ENDING:
            return True
        if call.frozen_since_usec is None or call.awaits_credit:
            return False
        call.asks = call.starved = False
        if ledger.unused:
            self._attempt(call, self._ledgers.bind, ledger, ledger.seen)
        return True

    def _rest(self, ledger: Ledger) -> None:
        """Look at a call no more, and leave it a small credit. Raises KnobError."""
        ledger.call.asks = ledger.call.starved = False
        ledger.since_usec, ledger.started = None, False
        if ledger.call.id in self._looked_at:
            self._ledgers.rests(ledger)
        if ledger.watch is not None:
            self._leave(ledger)
        policy, limit = self._policy(), self._sampler.limit_bytes
        resting = credit.resting_bytes(policy, self._budget(), limit)
        if ledger.unused > resting:
            self._ledgers.bind(ledger, ledger.seen + resting)

    def _answer(
        self, ledger: Ledger, bound: int | None, asks: bool, is_first: bool, now: int
    ) -> None:
        """Give a call its new bound, or have it wait. Raises KnobError or BpfError."""
        call = ledger.call
        if bound is None and not (is_first and call.awaits_credit):
            self._have_wait(ledger, asks, is_first, now)
            return
        if bound is not None and bound < ledger.bound:
            self._ledgers.bind(ledger, bound)
            return
        if call.awaits_credit and not self._may_go_on(call, now):
            return
        slept = ledger.seen > ledger.bound * NO_SLEEP_SHARE
        call.asks = call.starved = False
        ledger.since_usec, ledger.grew_usec = None, now
        if bound is not None:
            ledger.started, ledger.tried_at, ledger.tries = True, None, 0
            self._ledgers.bind(ledger, bound)
        if call.awaits_credit:
            self._let_go_on(call, self._has_its_turn())
        elif slept:
            pause.wake(call)

    def _have_wait(self, ledger: Ledger, asks: bool, is_first: bool, now: int) -> None:
        """Leave a call its bound, and pause it once it has waited long enough. Raises KnobError or
        BpfError."""
        call = ledger.call
        if call.frozen_since_usec is not None and not credit.pauses(self._policy()):
            self._let_go_on(call, "Going on: the policy in force pauses nobody.")
        call.asks = asks and ledger.seen >= ledger.bound - GREW_BYTES
        if ledger.tried_at is not None and ledger.seen < ledger.tried_at + TRY_BYTES:
            call.asks = False
        if call.asks and not call.awaits_credit:
            ledger.find_cache(now)
            # To the policy such a call does not ask: it goes on, and takes nothing of others.
            call.asks = not ledger.lives_on_cache
        call.starved = call.asks and is_first
        self._sampler.touch(call)
        if not call.asks:
            ledger.since_usec = None
        elif ledger.since_usec is None:
            ledger.since_usec = now
        elif not is_first and now - ledger.since_usec > HOLD_USEC:
            self._hold(ledger, now)

    def _hold(self, ledger: Ledger, now: int) -> None:
        """Pause a call that waits for credit, or refuse it more where it would rather have that.
        Raises KnobError or BpfError."""
        call = ledger.call
        if call.awaits_credit:
            return
        kept = "what is free is kept for calls that go first"
        if call.grant.on_pressure == "deny" and self._can_deny():
            self._calls.actions.deny(call, f"No more memory for now: {kept}.")
            call.awaits_credit = call.denied_at_bytes is not None
            return
        if not credit.pauses(self._policy()):
            return
        settle = self._policy().headroom.settle
        if call.paused_at_usec is not None and now - call.paused_at_usec < settle:
            return
        self._calls.actions.freeze(call, f"Paused: {kept}. It goes on by itself; nothing is lost.")
        call.awaits_credit = call.frozen_since_usec is not None
        if call.awaits_credit:
            ledger.tried_at = None
            ledger.try_usec = now + (TRY_AGAIN_USEC << min(ledger.tries, TRY_DOUBLED_MOST))

    def _may_go_on(self, call: Call, now: int) -> bool:
        settle, resumed = self._policy().headroom.settle, call.resumed_at_usec
        return resumed is None or now - resumed >= settle

    def _has_its_turn(self) -> str:
        free = show_bytes(max(0, self._budget().free_bytes))
        return f"Going on: {free} of the pool are free, and it is its turn."

    def _let_go_on(self, call: Call, why: str) -> None:
        """Let a call go on that waited for credit. Raises KnobError or BpfError."""
        call.awaits_credit = False
        self._calls.actions.thaw(call, why)
        self._calls.actions.allow(call, why)

    # Taking back

    def _settle_young(self, now: int) -> None:
        """Leave calls that began a while ago, and have not asked, a small credit."""
        end = time.monotonic() + YOUNG_SLICE_S
        while self._young and self._young[0][0] <= now and time.monotonic() < end:
            ledger = self._ledgers.get(self._young.popleft()[1])
            if ledger is not None and ledger.call.id not in self._looked_at:
                self._attempt(ledger.call, self._reread_and_rest, ledger)

    def _reread_and_rest(self, ledger: Ledger) -> None:
        self._ledgers.see(ledger, ledger.call.cgroup.read(knobs.MEMORY_CURRENT))
        self._rest(ledger)

    def _take_back(self, policy: Policy, budget: credit.Budget, limit: int) -> None:
        """Take credit that is not used from calls that rest, those with most of it first."""
        resting = credit.resting_bytes(policy, budget, limit)
        found = [x for x in self._ledgers if x.call.id not in self._looked_at]
        found = [x for x in found if x.unused > 2 * resting]
        for ledger in sorted(found, key=lambda x: -x.unused)[:TAKE_BACK_MOST]:
            self._attempt(ledger.call, self._reread_and_rest, ledger)

    def _attempt(self, call: Call, step: Callable[P, None], *args: P.args, **kw: P.kwargs) -> bool:
        """Do something for one call; what goes wrong is logged, and ends no look."""
        try:
            step(*args, **kw)
        except CgroupGone as error:
            log.debug("credit of call %s: %s", call.id, error)
            return False
        except (KnobError, BpfError) as error:
            log.warning("credit of call %s: %s", call.id, error)
            return False
        return True
