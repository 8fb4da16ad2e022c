"""Recorded agents as a cluster runs them: what each holds, second by second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from agentcgroup_lab.simulate.plans import CallProfile, Profile

Bytes = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Kinds:
    """All recordings side by side: one row each, padded to the longest."""

    held: Bytes
    """What agent and calls hold together in each second."""
    begins: Indices
    """The second in which the largest call of that second has begun; -1: there is none."""
    peaks: Bytes
    """The most that each holds."""
    means: Bytes
    lengths: Indices
    """Seconds that each takes when nothing holds it up."""


def kinds_of(profiles: Sequence[Profile]) -> Kinds:
    """Make rows of profiles."""
    rows = [_row(profile) for profile in profiles]
    longest = max(len(held) for held, _ in rows)
    held = np.zeros((len(rows), longest))
    begins = np.full((len(rows), longest), -1, dtype=np.int64)
    for number, (bytes_, calls) in enumerate(rows):
        held[number, : len(bytes_)] = bytes_
        begins[number, : len(calls)] = calls
    return Kinds(
        held,
        begins,
        peaks=np.array([bytes_.max() for bytes_, _ in rows]),
        means=np.array([bytes_.mean() for bytes_, _ in rows]),
        lengths=np.array([len(bytes_) for bytes_, _ in rows]),
    )


def _row(profile: Profile) -> tuple[Bytes, Indices]:
    """What one session holds in each second, and the second in which its largest call began."""
    seconds = max(1, math.ceil(profile.duration_s))
    held, largest = np.zeros(seconds), np.zeros(seconds)
    begins = np.full(seconds, -1, dtype=np.int64)
    steps = list(profile.agent)
    for number, step in enumerate(steps):
        until = steps[number + 1].at_s if number + 1 < len(steps) else float(seconds)
        held[int(step.at_s) : max(int(step.at_s) + 1, math.ceil(until))] = step.memory_bytes
    for call in profile.calls:
        first = min(int(call.start_s), seconds - 1)
        for at, bytes_ in _by_second(call, seconds):
            held[at] += bytes_
            if bytes_ > largest[at]:
                largest[at], begins[at] = bytes_, first
    return held, begins


def _by_second(call: CallProfile, seconds: int) -> list[tuple[int, float]]:
    """The most that a call holds in each second that it touches."""
    found: dict[int, float] = {}
    at = call.start_s
    for segment in call.segments:
        end = at + segment.duration_s
        most = segment.start_bytes + segment.rate * segment.duration_s
        for second in range(int(at), min(seconds, max(int(at) + 1, math.ceil(end)))):
            found[second] = max(found.get(second, 0.0), most)
        at = end
    return list(found.items())
