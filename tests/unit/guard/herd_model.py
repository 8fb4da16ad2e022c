"""Calls that grow as fast as a machine lets them, on a made-up clock, under the real guard: the
engine, the credit, and the actions on cgroups that are modelled here.

What is modelled of the kernel: memory.high holds a task that has passed it asleep until it is
raised and the task is woken (a thaw does that); meanwhile a batch of pages is taken for each sleep.
The freezer stops a task that touches memory at once, and one inside a system call never. Each
process that grows has a core as long as there are cores, and the machine fills memory only so fast.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.knobs import Knob
from agentcgroupd.config import GuardConfig
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.guard.credit import CreditKeeper
from agentcgroupd.guard.loop import GuardLoop
from agentcgroupd.guard.sampler import Sampler
from agentcgroupd.intents.grant import Grant
from agentcgroupd.policy.learning import Peaks
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.snapshot import Host, Signal, SignalKind
from agentcgroupd.state.ending import Asker
from agentcgroupd.state.session import Call
from agentcgroupd.telemetry.audit import Audit
from agentcgroupd.telemetry.feed import Feed
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.notices import Notices

MIB, GIB = 1 << 20, 1 << 30
STEP_S = 0.002
CORES = 16
CORE_BYTES_PER_S = 2 * GIB
MACHINE_BYTES_PER_S = 14 * GIB
BASE_BYTES = 6 * MIB
"""What a program holds before it grows."""
BATCH_BYTES = 256 << 10


def stopped_by_policy(call: Call) -> bool:
    """Whether the policy has ended a call."""
    return any(asked.by is Asker.POLICY for asked in call.account.asked)


@dataclass(slots=True, eq=False)
class ModelCgroup:
    """A call's cgroup with one process in it."""

    path: Path
    goal_bytes: int
    hold_s: float
    in_kernel: bool
    used: float = BASE_BYTES
    high: int | None = None
    frozen: bool = False
    asleep_until_s: float = 0.0
    began_s: float | None = None
    full_s: float | None = None
    on_high: Callable[[], None] | None = None
    now_s: float = 0.0
    id: int = 0
    bytes_per_s: float = CORE_BYTES_PER_S
    """How fast it grows where nothing holds it back."""

    def read(self, knob: Knob[Any]) -> Any:
        values: dict[str, Any] = {
            knobs.MEMORY_CURRENT.file: int(self.used),
            knobs.MEMORY_STAT.file: {"inactive_file": 0},
            knobs.CPU_STAT.file: {"usage_usec": 1000},
            knobs.CGROUP_EVENTS.file: {"frozen": int(self.frozen and not self.in_kernel)},
        }
        return values[knob.file]

    def read_if(self, knob: Knob[Any]) -> Any:
        return 1 if knob is knobs.PIDS_CURRENT else None

    def write(self, knob: Knob[Any], value: Any, wait: bool = True) -> None:
        if knob is knobs.MEMORY_HIGH:
            self.high = value
        elif knob is knobs.CGROUP_FREEZE:
            if self.frozen and not value:
                self.asleep_until_s = 0.0  # a thaw wakes every task
            self.frozen = value
        else:
            raise AssertionError(knob.file)

    def set_xattr(self, value: bytes) -> None:
        """Keep no record."""

    def exists(self) -> bool:
        return True

    def all_procs(self) -> list[int]:
        """Tell of no process by its number."""
        return []

    def kill(self) -> None:
        """Leave it to the machine to end the call."""

    def signal(self, number: int) -> None:
        """Leave it to the machine to end the call."""

    def signal_parts(self, number: int) -> Iterator[int]:
        """Leave it to the machine to end the call."""
        return iter(())

    @property
    def grows(self) -> bool:
        stopped = self.frozen and not self.in_kernel
        return self.began_s is not None and self.full_s is None and not stopped

    def step(self, now_s: float, room: float) -> None:
        """Take `room` bytes, unless it sleeps or is held."""
        if not self.grows or now_s < self.asleep_until_s:
            return
        room = min(room, self.bytes_per_s * STEP_S)
        before, self.used = self.used, min(self.used + room, float(self.goal_bytes))
        if self.used >= self.goal_bytes:
            self.full_s = now_s
        if self.high is None or self.used <= self.high:
            return
        part = (self.used - self.high) / max(self.high, 1)
        if part > 0.0125:
            sleep_s = min(2.0, 64 * part * part)
            self.used = max(before, min(self.used, self.high * 1.0125)) + BATCH_BYTES
            self.asleep_until_s = now_s + sleep_s
        if self.on_high is not None and (before <= self.high or part > 0.0125):
            self.on_high()


@dataclass(eq=False)
class Machine:
    """A pool with calls."""

    policy: Policy
    limit_bytes: int
    directory: Path
    has_credit: bool = True
    calls: dict[str, Call] = field(default_factory=dict)
    peaks: Peaks = field(default_factory=Peaks)
    peak_bytes: float = 0.0
    limit_hit: int = 0
    killed: int = 0
    ended: list[float] = field(default_factory=list)
    stopped: bool = False
    """Whether the daemon is stopped: it hears nothing and does nothing."""
    heard_late: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        audit = Audit(self.directory / "audit.jsonl", 1 << 40)
        notices = Notices(audit, Metrics(), Feed())
        pool: Any = SimpleNamespace(read=self._read_pool, read_if=lambda knob: None)
        self.actions = Actions(notices, lambda: None, hurry=lambda call: None)
        known: Any = SimpleNamespace(open=self.calls, actions=self.actions)
        of_pool: Any = SimpleNamespace(cgroup=pool, memory_max_bytes=self.limit_bytes)
        host: Any = HostModel(self.has_credit)
        self.sampler = Sampler(
            of_pool, known, lambda now: (), host, lambda: self.seen_peaks(), lambda: ()
        )
        events: Any = SimpleNamespace(
            watch=self._watch, unwatch=lambda watch: None, forget=lambda watch: None
        )
        self.credit: CreditKeeper | None = None
        if self.has_credit:
            keeper = self.credit = ModelKeeper(
                lambda: self.policy,
                self.sampler,
                known,
                events,
                lambda: self.peaks.sorted_bytes,
                lambda: False,
            )
            self.sampler.credit_bytes = lambda: keeper.unused_bytes
            keeper.start()
        self.guard = GuardLoop(
            GuardConfig(), self.policy, self.sampler, known, {}, lambda: False, lambda now: None, ()
        )
        self.guard.start()

    def seen_peaks(self) -> tuple[int, ...]:
        return self.peaks.sorted_bytes if self.credit is None else self.credit.peaks()

    def _read_pool(self, knob: Knob[Any]) -> Any:
        if knob is knobs.MEMORY_STAT:
            return {"inactive_file": 0}
        return int(self.used())

    def used(self) -> float:
        return sum(self.of(call).used for call in self.calls.values())

    @staticmethod
    def of(call: Call) -> ModelCgroup:
        cgroup: Any = call.cgroup
        assert isinstance(cgroup, ModelCgroup)
        return cgroup

    def _watch(
        self, cgroup: ModelCgroup, knob: Knob[Any], callback: Callable[[], None], key: str
    ) -> int:
        def tell() -> None:
            if self.stopped:
                self.heard_late.append(callback)
            else:
                self.loop.call_soon(callback)

        cgroup.on_high = tell
        return 1

    def begin(
        self,
        name: str,
        goal_bytes: int,
        hold_s: float,
        *,
        in_kernel: bool = False,
        priority: int = 50,
        cgroup_type: type[ModelCgroup] = ModelCgroup,
    ) -> Call:
        """Begin a call that does not grow yet."""
        grant = Grant(
            memory_expected_bytes=0,
            memory_high_bytes=None,
            memory_max_bytes=None,
            cpu_weight=100,
            cpu_max_millicores=None,
            pids_max=None,
            timeout_usec=None,
            priority=priority,
            on_pressure="freeze",
        )
        cgroup: Any = cgroup_type(Path(name), goal_bytes, hold_s, in_kernel)
        session: Any = SimpleNamespace(
            turns_key="session x",
            id="s",
            offered=frozenset({knobs.MEMORY_HIGH.file}),
            calls=self.calls,
        )
        now = int(self.loop.time() * 1e6)
        call = Call(
            id=name,
            session=session,
            name=name,
            argv=(),
            grant=grant,
            cgroup=cgroup,
            began_unix_usec=now,
            began_boot_usec=now,
            held=False,
            entered=True,
            state=pb.CALL_STATE_RUNNING,
        )
        self.calls[name] = call
        if self.credit is not None:
            self.credit.call_opened(call)
        self.guard.call_began()
        return call

    async def run(self, until_s: float) -> None:
        """Let time pass until that time, or until no call is left."""
        while self.calls and self.loop.time() < until_s:
            self.step()
            await asyncio.sleep(STEP_S)

    def step(self) -> None:
        """Let all that grow take what a core fills in a step, or their share of the machine."""
        now = self.loop.time()
        found = [self.of(c) for c in self.calls.values()]
        growing = sum(c.grows and now >= c.asleep_until_s for c in found)
        if growing:
            rate = min(CORE_BYTES_PER_S * min(1.0, CORES / growing), MACHINE_BYTES_PER_S / growing)
            for cgroup in found:
                cgroup.step(now, rate * STEP_S)
        used = self.used()
        self.peak_bytes = max(self.peak_bytes, used)
        self.limit_hit += used > self.limit_bytes
        for call in list(self.calls.values()):
            cgroup = self.of(call)
            done = cgroup.full_s is not None and now >= cgroup.full_s + cgroup.hold_s
            if stopped_by_policy(call) or (done and not cgroup.frozen):
                self.end(call)

    def end(self, call: Call) -> None:
        self.killed += stopped_by_policy(call)
        self.ended.append(self.loop.time())
        del self.calls[call.id]
        self.peaks.add(int(self.of(call).used))
        if self.credit is not None:
            self.credit.call_closed(call)
        if not self.stopped:
            self.loop.call_later(0.005, self.guard.decide_now, Signal(SignalKind.ENDED, call.id))

    def stop_daemon(self) -> None:
        """Have the daemon do nothing, as SIGSTOP does."""
        self.stopped = True
        self.guard.stop()
        if self.credit is not None:
            self.credit._running = False

    def continue_daemon(self) -> None:
        """Have the daemon hear what happened meanwhile, and go on."""
        self.stopped = False
        if self.credit is not None:
            self.credit._running = True
        heard, self.heard_late = self.heard_late, []
        for callback in heard:
            callback()
        self.guard.start()


class ModelKeeper(CreditKeeper):
    """Reads what calls hold from the model, where the daemon keeps a file open."""

    def _read(self, ledger: Any, now: int) -> None:
        self._saw(ledger, ledger.call.cgroup.read(knobs.MEMORY_CURRENT), now)


class HostModel:
    """A host without swap."""

    zram_bytes = 0

    def __init__(self, can_hold: bool) -> None:
        self._host = Host(can_hold=can_hold)

    def __call__(self, now_usec: int) -> Host:
        return self._host
