"""Parts of GPUs, as a resource that calls wait for; gpu.allocation decides who starts.

Unlike a call that waits for memory, one whose time is over is refused: a share that is not there
cannot be given, and nobody is paused for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from agentcgroupd.errors import ResourceExhausted
from agentcgroupd.gpu.allocation import Asking, Holding, admit, free_of, in_order
from agentcgroupd.intents.gpu import Device, DeviceSelection
from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.candidate import Candidate, Wait
from agentcgroupd.state.session import boottime_usec
from agentcgroupd.units import show_bytes, show_usec

WAITING_MOST = 1024
WAITING_SHARE = 0.25


class Environment(Protocol):
    """Makes the environment of a tool that has a part of these devices."""

    def __call__(self, percent: int, memory: int, devices: tuple[str, ...]) -> list[str]:
        """`NAME=value` for each variable. `memory`: bytes of each device; `devices`: UUIDs."""


def describe(percent: int | None, memory_bytes: int | None) -> str:
    """Say a part in words: `10 % and 4 GiB of a GPU`."""
    return f"{percent or 0} % and {show_bytes(memory_bytes or 0)} of a GPU"


@dataclass(frozen=True, slots=True, eq=False)
class GpuReservation:
    """Devices that are kept for a call which may start. Implements calls.queue.Reservation."""

    resource: GpuResource
    call_id: str
    devices: tuple[str, ...]

    def apply(self, grant: Grant) -> Grant:
        """Put the devices, and the environment that follows from them, into a grant."""
        return self.resource.with_devices(grant, self.devices)

    def release(self) -> None:
        """Keep the devices no longer."""
        self.resource.release(self.call_id)


class GpuResource:
    """What of the devices is granted to nobody. Implements calls.queue.Resource."""

    name = "a GPU"

    def __init__(
        self,
        devices: Callable[[], Sequence[Device]],
        holdings: Callable[[], Iterable[Holding]],
        wait_usec: int,
        environment: Environment,
    ) -> None:
        """`holdings`: of open calls and sessions. `wait_usec`: where an intent says nothing."""
        self._devices, self._granted, self._wait_usec = devices, holdings, wait_usec
        self._environment = environment
        self._reserved: dict[str, Holding] = {}
        self._retry: Callable[[], None] = lambda: None

    def on_freed(self, retry: Callable[[], None]) -> None:
        """Take what is to be called whenever a part is given back."""
        self._retry = retry

    def freed(self) -> None:
        """Say that a part was given back: whoever fits now starts."""
        self._retry()

    def holdings(self) -> list[Holding]:
        """List all parts that are granted, and those that are kept for calls about to begin."""
        return [*self._granted(), *self._reserved.values()]

    def release(self, call_id: str) -> None:
        """Give back what is kept for a call, if anything is."""
        if self._reserved.pop(call_id, None) is not None:
            self.freed()

    def with_devices(self, grant: Grant, devices: tuple[str, ...]) -> Grant:
        """Put devices, by UUID, and the environment that follows from them into a grant."""
        percent, memory = grant.gpu_percent or 0, grant.gpu_memory_bytes or 0
        environment = self._environment(percent, memory, devices)
        return replace(grant, gpu_devices=devices, environment=tuple(environment))

    def allowed(self) -> str:
        """Say what of each device could be had now."""
        holdings = self.holdings()
        parts = []
        for device in self._devices():
            free = free_of(device, holdings)
            state = "lost" if device.lost else f"{free.percent} %, {show_bytes(free.memory_bytes)}"
            parts.append(f"device {device.index}: {state}")
        return "at this moment " + "; ".join(parts)

    # Resource

    def needed_by(self, candidate: Candidate) -> bool:
        """Tell whether a call asks for a part."""
        return candidate.grant.gpu_percent is not None

    def wait_of(self, candidate: Candidate, now_usec: int) -> Wait:
        """Let a call wait as long as its intent says, or else the configuration; then it is
        refused."""
        patience = candidate.grant.wait_usec
        if patience is None:
            patience = self._wait_usec
        return Wait(candidate, now_usec, now_usec + patience, refused_late=True)

    def waiting_max(self) -> int:
        """How many calls may wait at a time."""
        return WAITING_MOST

    def waiting_share(self) -> float:
        """What part of the places that others leave one session may have."""
        return WAITING_SHARE

    def let_in(self, waiting: Sequence[Wait]) -> dict[str, GpuReservation]:
        """Choose the calls that may start now, and keep their parts for them."""
        by_id = {wait.id: _as_asking(wait) for wait in waiting}
        found = admit(boottime_usec(), by_id.values(), self._devices(), self.holdings())
        for call_id, devices in found.items():
            asking = by_id[call_id]
            self._reserved[call_id] = Holding(devices, asking.percent, asking.memory_bytes)
        return {
            call_id: GpuReservation(self, call_id, devices) for call_id, devices in found.items()
        }

    def in_order(self, waiting: Iterable[Wait]) -> list[Wait]:
        """Sort calls by their priority on the GPU and age, the next to start first."""
        by_id = {wait.id: wait for wait in waiting}
        order = in_order(boottime_usec(), map(_as_asking, by_id.values()))
        return [by_id[asking.id] for asking in order]

    def outlook(self, ahead: Sequence[Wait]) -> dict[str, int]:
        """Say nothing more of a place: when parts come back is not known."""
        return {}

    def asked(self, candidate: Candidate) -> dict[str, int]:
        """Say what a call asks for, for the audit log."""
        return {"gpu_percent": candidate.grant.gpu_percent or 0}

    def shortage(self, candidate: Candidate) -> str:
        """Say what a call asks for and what is there, in words."""
        return f"{_describe_grant(candidate.grant)} ({self.allowed()})"

    def refusal(self, candidate: Candidate, waited_usec: int = 0) -> ResourceExhausted:
        """Make the error for a call that is not let in, or no longer waits."""
        grant, there = candidate.grant, self.allowed()
        why = f" after {show_usec(waited_usec)} of waiting" if waited_usec else ""
        return ResourceExhausted(
            f"gpu: {_describe_grant(grant)} for {candidate.request.name!r} is not there "
            f"({there}){why}; try again later, say how long it may wait, or ask for less",
            "gpu",
            f"{grant.gpu_percent or 0}%",
            there,
        )


def _describe_grant(grant: Grant) -> str:
    return describe(grant.gpu_percent, grant.gpu_memory_bytes)


def _as_asking(wait: Wait) -> Asking:
    grant = wait.candidate.grant
    return Asking(
        wait.id,
        grant.gpu_priority or 0,
        wait.since_usec,
        wait.deadline_usec,
        wait.candidate.request.intent.gpu_device or DeviceSelection(),
        grant.gpu_percent or 0,
        grant.gpu_memory_bytes or 0,
    )
