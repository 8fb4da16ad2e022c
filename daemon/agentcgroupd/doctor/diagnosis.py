"""What was found out about a host: its features, each with a state, a reason and what to do."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from agentcgroup.tables import aligned

CALL_CGROUPS = "call cgroups"
"""The feature without which the daemon cannot work at all."""
MEMORY_LIMITS = "memory limits"
NEEDED = (CALL_CGROUPS, MEMORY_LIMITS)
"""Features without which the daemon does not do what it is for."""
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
        """Whether the daemon can do what it is for: calls have cgroups, and memory is limited."""
        return not self._lacking()

    def _lacking(self) -> list[Feature]:
        """What is needed and does not work, or is not known to work."""
        by_name = {feature.name: feature for feature in self.features}
        unknown = (Feature(name, State.UNKNOWN, "it was not tried") for name in NEEDED)
        needed = (by_name.get(feature.name, feature) for feature in unknown)
        return [feature for feature in needed if feature.state is not State.WORKS]

    @property
    def summary(self) -> str:
        """What comes of it, in one line."""
        count = {state: 0 for state in State}
        for feature in self.features:
            count[feature.state] += 1
        numbers = f"{count[State.WORKS]} of {len(self.features)} features work"
        if count[State.UNKNOWN]:
            numbers += f", {count[State.UNKNOWN]} are not known"
        lacking = self._lacking()
        if not lacking:
            return f"agentcgroup can do its work here: {numbers}"
        what = "cannot do its work here"
        if all(feature.state is State.UNKNOWN for feature in lacking):
            what = f"may not be able to do its work here ({AS_ROOT} to know)"
        names = " and ".join(feature.name for feature in lacking)
        return f"agentcgroup {what}, for want of {names}: {numbers}"

    def to_dict(self) -> dict[str, Any]:
        """The content of `agentcg doctor --json`."""
        return {
            "kernel": self.kernel,
            "cgroup_mount": self.cgroup_mount,
            "ok": self.ok,
            "summary": self.summary,
            "features": [{**asdict(f), "state": f.state.value} for f in self.features],
        }

    def render(self, paint: Callable[[str, str], str] | None = None) -> str:
        """Make the table for people. `paint`: gives a text a colour by its name."""
        rows = [row for feature in self.features for row in feature.rows()]
        lines = aligned(rows)
        if paint is not None:
            lines = [_painted(line, paint) for line in lines]
        head = f"kernel {self.kernel}, cgroup2 at {self.cgroup_mount or 'nowhere'}"
        last = self.summary
        if paint is not None:
            last = paint(last, "green" if self.ok else "red")
        return "\n".join([head, "", *lines, "", last])


def _painted(line: str, paint: Callable[[str, str], str]) -> str:
    for state, mark in _MARKS.items():
        if line.startswith(mark):
            return paint(mark, _COLORS[state]) + line.removeprefix(mark)
    return line
