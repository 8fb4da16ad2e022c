"""`agentcg doctor`: what this host can enforce, with reasons, and what to do where it cannot."""

from __future__ import annotations

import os

from agentcgroupd.cgroup.tree import cgroup2_mount
from agentcgroupd.doctor import kernel
from agentcgroupd.doctor.diagnosis import Diagnosis
from agentcgroupd.doctor.disks import disk_features
from agentcgroupd.doctor.gpu import gpu_features
from agentcgroupd.doctor.limits import limit_features


def run() -> Diagnosis:
    """Probe this host. Needs root for most answers; without it they are unknown, not missing."""
    try:
        mount = cgroup2_mount()
    except OSError as error:
        shown_mount, cgroups = "", [kernel.no_cgroups(error)]
    else:
        shown_mount, cgroups = str(mount), [*kernel.cgroup_features(mount), *disk_features(mount)]
    features = (
        *cgroups,
        *kernel.process_features(),
        *limit_features(),
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
