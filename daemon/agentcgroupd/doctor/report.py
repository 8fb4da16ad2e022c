"""`agentcg doctor`: what this host can enforce, with reasons, and what to do where it cannot."""

from __future__ import annotations

import os

from agentcgroup.tables import aligned
from agentcgroupd.bpf import features, memcg_ops, sched
from agentcgroupd.bpf.features import FeatureState
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import XATTR_NAME, Cgroup, cgroup2_mount
from agentcgroupd.doctor import gpu
from agentcgroupd.errors import KnobError
from agentcgroupd.host import zram
from agentcgroupd.host.syscalls import has_peer_pidfd, pidfd_exit_status
from agentcgroupd.units import show_bytes


class State(enum.Enum):
    """Of one feature."""

    WORKS = "works"
    MISSING = "missing"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that the kernel may enforce or tell."""

    name: str
    state: State
    reason: str
    remedy: str = ""
    fallback: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All features of one host."""

    kernel: str
    cgroup_mount: str
    features: tuple[Feature, ...]

    @property
    def ok(self) -> bool:
        """Whether the daemon can give calls their own cgroups at all."""
        return any(f.name == "call cgroups" and f.state is State.WORKS for f in self.features)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        rows = [{**asdict(f), "state": f.state.value} for f in self.features]
        return {"kernel": self.kernel, "cgroup_mount": self.cgroup_mount, "ok": self.ok,
                "features": rows}  # fmt: skip

    def render(self, color: bool = False) -> str:
        """A table for people."""
        marks = {
            State.WORKS: ("ok", "32"),
            State.MISSING: ("--", "31"),
            State.UNKNOWN: ("??", "33"),
        }
        rows: list[tuple[str, str, str]] = []
        codes: list[str | None] = []
        for feature in self.features:
            mark, code = marks[feature.state]
            rows.append((mark, feature.name, feature.reason))
            codes.append(code)
            for label, text in (("instead", feature.fallback), ("to do", feature.remedy)):
                if text and feature.state is not State.WORKS:
                    rows.append(("", "", f"{label}: {text}"))
                    codes.append(None)
        lines = aligned(rows)
        if color:
            lines = [
                line if code is None else f"\x1b[{code}m{line[:2]}\x1b[0m{line[2:]}"
                for line, code in zip(lines, codes, strict=True)
            ]
        head = f"kernel {self.kernel}, cgroup2 at {self.cgroup_mount or 'nowhere'}"
        return "\n".join([head, "", *lines])


def run() -> Diagnosis:
    """Probe this host. Needs root for most answers; without it they are unknown, not missing."""
    try:
        mount = cgroup2_mount()
    except OSError as error:
        shown_mount, cgroups = "", [kernel.no_cgroups(error)]
    else:
        shown_mount, cgroups = str(mount), list(kernel.cgroup_features(mount))
    features = (
        *cgroups,
        *kernel.process_features(),
        *kernel.memory_features(),
        *kernel.bpf_features(),
        *gpu_features(),
    )
    return Diagnosis(os.uname().release, shown_mount, features)


def main() -> int:
    """Print the table; returns 0 where the daemon can work here, else 1."""
    diagnosis = run()
    print(diagnosis.render())
    return 0 if diagnosis.ok else 1
