"""What was found out about a host: its features, each with a state, a reason and what to do."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from agentcgroup.tables import aligned

CALL_CGROUPS = "call cgroups"
"""The feature without which the daemon cannot work at all."""
AS_ROOT = "run `agentcg doctor` as root"
ONLY_ROOT = "only root can try"


class State(enum.Enum):
    """Whether a feature can be had."""

    WORKS = "works"
    MISSING = "missing"
    UNKNOWN = "unknown"


_MARKS = {State.WORKS: "ok", State.MISSING: "--", State.UNKNOWN: "??"}
_COLORS = {State.WORKS: "green", State.MISSING: "red", State.UNKNOWN: "yellow"}


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that the kernel may enforce or tell."""

    name: str
    state: State
    reason: str
    remedy: str = ""
    """What to do about it, where it does not work."""
    fallback: str = ""
    """What the daemon does without it."""

    def rows(self) -> list[tuple[str, str, str]]:
        """Rows of the table for people: the mark, the name and the reason; then what to do."""
        rows = [(_MARKS[self.state], self.name, self.reason)]
        if self.state is not State.WORKS:
            advice = (("instead", self.fallback), ("to do", self.remedy))
            rows += [("", "", f"{label}: {text}") for label, text in advice if text]
        return rows


@dataclass(frozen=True, slots=True)
class Check:
    """A question to which the kernel says yes or no, and what each answer means."""

    name: str
    yes: str
    no: str
    remedy: str
    fallback: str

    def answered(self, works: bool) -> Feature:
        """The feature, by the answer."""
        if works:
            return Feature(self.name, State.WORKS, self.yes)
        return self.missing()

    def missing(self, reason: str | None = None) -> Feature:
        """The feature where the answer is no; `reason` where more is known than that."""
        return Feature(self.name, State.MISSING, reason or self.no, self.remedy, self.fallback)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All features of one host."""

    kernel: str
    cgroup_mount: str
    features: tuple[Feature, ...]

    @property
    def ok(self) -> bool:
        """Whether the daemon can give calls their own cgroups at all."""
        return any(f.name == CALL_CGROUPS and f.state is State.WORKS for f in self.features)

    def to_dict(self) -> dict[str, Any]:
        """The content of `agentcg doctor --json`."""
        return {
            "kernel": self.kernel,
            "cgroup_mount": self.cgroup_mount,
            "ok": self.ok,
            "features": [{**asdict(f), "state": f.state.value} for f in self.features],
        }

    def render(self, paint: Callable[[str, str], str] | None = None) -> str:
        """Make the table for people. `paint`: gives a text a colour by its name."""
        rows = [row for feature in self.features for row in feature.rows()]
        lines = aligned(rows)
        if paint is not None:
            lines = [_painted(line, paint) for line in lines]
        head = f"kernel {self.kernel}, cgroup2 at {self.cgroup_mount or 'nowhere'}"
        return "\n".join([head, "", *lines])


def _painted(line: str, paint: Callable[[str, str], str]) -> str:
    for state, mark in _MARKS.items():
        if line.startswith(mark):
            return paint(mark, _COLORS[state]) + line.removeprefix(mark)
    return line
