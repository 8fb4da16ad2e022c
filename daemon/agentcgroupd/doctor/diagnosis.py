"""What was found out about a host: its features, each with a state, a reason and what to do."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any

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
_COLORS = {State.WORKS: 32, State.MISSING: 31, State.UNKNOWN: 33}
"""SGR codes of ECMA-48: green, red, yellow."""


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

    def lines(self, name_width: int, color: bool) -> list[str]:
        """Rows of the table for people."""
        mark = _MARKS[self.state]
        if color:
            mark = f"\x1b[{_COLORS[self.state]}m{mark}\x1b[0m"
        lines = [f"{mark}  {self.name:<{name_width}}  {self.reason}"]
        if self.state is not State.WORKS:
            indent = " " * (name_width + len("ok    "))
            if self.fallback:
                lines.append(f"{indent}instead: {self.fallback}")
            if self.remedy:
                lines.append(f"{indent}to do: {self.remedy}")
        return lines


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

    def render(self, color: bool = False) -> str:
        """The table for people."""
        width = max(len(f.name) for f in self.features)
        head = f"kernel {self.kernel}, cgroup2 at {self.cgroup_mount or 'nowhere'}"
        rows = [line for f in self.features for line in f.lines(width, color)]
        return "\n".join([head, "", *rows])
