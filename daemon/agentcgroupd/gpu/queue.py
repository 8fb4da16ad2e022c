"""Calls that wait for their part of a GPU. Who may start is decided by gpu.room; this keeps the
queue, tells agents their place, and wakes them.

Unlike a call that waits for memory, one whose time is over is refused: a share that is not there
cannot be given, and nobody is paused for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import FailedPrecondition, ResourceExhausted
from agentcgroupd.gpu.allocation import Asking, Holding, admit, free_of, in_order
from agentcgroupd.intents.gpu import Device
from agentcgroupd.intents.grant import Grant
from agentcgroupd.intents.parse import cut_argv
from agentcgroupd.state.session import Call, Session, boottime_usec, unix_usec
from agentcgroupd.telemetry.wire import grant_to_proto
from agentcgroupd.units import show_bytes, show_usec

WAITING_MOST = 1024


@dataclass(slots=True, eq=False)
class GpuAsked:
    """A call that waits."""

    session: Session
    name: str
    argv: tuple[str, ...]
    grant: Grant
    asking: Asking
    asked_unix_usec: int
    turn: asyncio.Future[None] = field(repr=False)

    @property
    def id(self) -> str:
        """Of the call that it will be."""
        return self.asking.id

    @property
    def waits_usec(self) -> int:
        """At most, from when it was asked for."""
        return self.asking.deadline_usec - self.asking.since_usec


def describe(percent: int | None, memory_bytes: int | None) -> str:
    """`10 % and 4 GiB`"""
    return f"{percent or 0} % and {show_bytes(memory_bytes or 0)} of a GPU"


class GpuQueue:
    """All that wait, and the parts of those who may start but have no cgroup yet."""

    def __init__(
        self,
        devices: Callable[[], Sequence[Device]],
        holdings: Callable[[], Iterable[Holding]],
        wait_usec: int,
        actions: Callable[[], Actions],
    ) -> None:
        """`holdings`: of open calls and sessions. `wait_usec`: where an intent says nothing."""
        self._devices, self._open, self._wait_usec = devices, holdings, wait_usec
        self._actions = actions
        self._asked: dict[str, GpuAsked] = {}
        self._placed: dict[str, Holding] = {}

    def __len__(self) -> int:
        return len(self._asked)

    def of(self, session: Session) -> list[GpuAsked]:
        """Those of one session."""
        return [a for a in self._asked.values() if a.session is session]

    def holdings(self) -> list[Holding]:
        """All that is granted."""
        return [*self._open(), *self._placed.values()]

    def ask(
        self, call_id: str, session: Session, name: str, argv: list[str], grant: Grant
    ) -> GpuAsked | None:
        """A place in the queue, or None: its part is kept for `call_id` until it is taken or left.
        Raises ResourceExhausted when it may not wait."""
        now = boottime_usec()
        wait = self._wait_usec if grant.wait_usec is None else grant.wait_usec
        asking = Asking(call_id, grant.gpu_priority or 0, now, now + wait, grant.gpu_wanted,
                        grant.gpu_percent or 0, grant.gpu_memory_bytes or 0)  # fmt: skip
        asked = GpuAsked(session, name, cut_argv(argv), grant, asking, unix_usec(),
                         asyncio.get_running_loop().create_future())  # fmt: skip
        self._asked[call_id] = asked
        self.look()
        if asked.turn.done():
            return None
        if wait == 0 or len(self._asked) > WAITING_MOST:
            del self._asked[call_id]
            raise self._refusal(asked)
        return asked

    def look(self) -> None:
        """Something was given back: whoever fits now starts."""
        if not self._asked:
            return
        waiting = [a.asking for a in self._asked.values() if not a.turn.done()]
        found = admit(boottime_usec(), waiting, self._devices(), self.holdings())
        for call_id, devices in found.items():
            asked = self._asked.pop(call_id)
            self._placed[call_id] = Holding(devices, asked.asking.percent,
                                            asked.asking.memory_bytes)  # fmt: skip
            asked.turn.set_result(None)

    def placed(self, call_id: str) -> tuple[str, ...]:
        """Devices that are kept for a call, which takes them with this; empty: none."""
        holding = self._placed.pop(call_id, None)
        return holding.devices if holding else ()

    def leave(self, call_id: str, look: bool = True) -> None:
        """What is kept for it is not wanted."""
        if self._placed.pop(call_id, None) is not None and look:
            self.look()

    def _refusal(self, asked: GpuAsked, why: str = "") -> ResourceExhausted:
        part = describe(asked.asking.percent, asked.asking.memory_bytes)
        there = self.allowed()
        return ResourceExhausted(
            f"gpu: {part} for {asked.name!r} is not there ({there}){why}; try again later, say how "
            "long it may wait, or ask for less", "gpu", f"{asked.asking.percent}%", there,
        )  # fmt: skip

    def allowed(self) -> str:
        """What of each device could be had now."""
        holdings = self.holdings()
        parts = []
        for device in self._devices():
            free = free_of(device, holdings)
            state = "lost" if device.lost else f"{free.percent} %, {show_bytes(free.memory_bytes)}"
            parts.append(f"device {device.index}: {state}")
        return "at this moment " + "; ".join(parts)

    async def wait(self, asked: GpuAsked) -> None:
        """Until it is its turn. Raises ResourceExhausted when its time is over, FailedPrecondition
        when it is not wanted any more."""
        self._tell(asked)
        left = asked.asking.deadline_usec - boottime_usec()
        try:
            await asyncio.wait_for(asyncio.shield(asked.turn), max(0, left) / 1e6)
        except TimeoutError:
            raise self._refusal(asked, f" after {show_usec(asked.waits_usec)} of waiting") from None
        except asyncio.CancelledError:
            self.leave(asked.id)
            raise
        finally:
            self._asked.pop(asked.id, None)
            if not asked.turn.done():
                asked.turn.cancel()

    def began(self, call: Call, asked: GpuAsked) -> None:
        """Its cgroup is there: said, and counted."""
        call.waited_usec = boottime_usec() - asked.asking.since_usec
        actions = self._actions()
        actions.metrics.calls_waited.labels("started").observe(call.waited_usec / 1e6)
        actions.tell(call.session, call.id, pb.Feedback(
            code=pb.FEEDBACK_CODE_STARTED,
            sentence=f"{call.name!r} begins after {show_usec(call.waited_usec)} of waiting for a "
            "GPU.", numbers={"waited_usec": float(call.waited_usec)},
        ))  # fmt: skip

    def cancel(self, asked: GpuAsked, why: str) -> None:
        """It is not wanted any more."""
        if not asked.turn.done():
            asked.turn.set_exception(FailedPrecondition(why))
            asked.turn.exception()  # whoever waits sees it; where nobody does, it is no mistake

    def cancel_id(self, call_id: str, why: str, session: Session | None) -> pb.Report | None:
        """Take a call out that has not begun; its report, or None where it does not wait here."""
        asked = self._asked.get(call_id)
        if asked is None or session not in (None, asked.session):
            return None
        sentence = f"It had not begun: {why} while it waited for a GPU."
        self.cancel(asked, sentence)
        return pb.Report(call_id=call_id, session_id=asked.session.id, name=asked.name,
                         verdict=pb.VERDICT_CANCELLED, sentence=sentence)  # fmt: skip

    def to_proto(self, asked: GpuAsked) -> pb.Call:
        """As ListCalls shows it."""
        return pb.Call(
            id=asked.id, session_id=asked.session.id, name=asked.name, argv=asked.argv,
            state=pb.CALL_STATE_WAITING, grant=grant_to_proto(asked.grant),
            began_unix_usec=asked.asked_unix_usec, place=self._place(asked),
        )  # fmt: skip

    def _place(self, asked: GpuAsked) -> pb.Place:
        now = boottime_usec()
        order = in_order(now, (a.asking for a in self._asked.values()))
        index = next((i for i, a in enumerate(order) if a.id == asked.id), 0)
        return pb.Place(
            position=index + 1, waiting=len(order), waited_usec=now - asked.asking.since_usec,
            deadline_usec=max(0, asked.asking.deadline_usec - now),
        )  # fmt: skip

    def _tell(self, asked: GpuAsked) -> None:
        place = self._place(asked)
        sentence = (
            f"{asked.name!r} waits for {describe(asked.asking.percent, asked.asking.memory_bytes)} "
            f"({self.allowed()}). Number {place.position} of {place.waiting}; after "
            f"{show_usec(asked.waits_usec)} it is refused."
        )
        actions = self._actions()
        actions.audit.write("call_waiting", session=asked.session.id, call=asked.id,
                            name=asked.name, gpu_percent=asked.asking.percent,
                            position=place.position)  # fmt: skip
        actions.tell(asked.session, asked.id, pb.Feedback(
            code=pb.FEEDBACK_CODE_WAITING, sentence=sentence,
            numbers={"position": float(place.position), "waiting": float(place.waiting)},
        ))  # fmt: skip


def with_devices(grant: Grant, devices: tuple[str, ...], environment: Iterable[str]) -> Grant:
    """A grant that has been placed."""
    return replace(grant, gpu_devices=devices, environment=tuple(environment))
