"""The cgroup namespace of this process (cgroup_namespaces(7)).

In a container with a namespace of its own, the host's mount of cgroup2 and /proc/<pid>/cgroup name
cgroups by paths that do not fit: the mount begins above the namespace's root, and the paths begin
with `/..`. Seen from the host's own namespace both begin at the same root.
"""

from __future__ import annotations

import logging
import os

from agentcgroupd.host.mounts import mounts
from agentcgroupd.host.syscalls import CLONE_NEWCGROUP, setns

log = logging.getLogger(__name__)

HOST_NAMESPACE = "/proc/1/ns/cgroup"


def enter_host_cgroup_namespace() -> bool:
    """Enter the cgroup namespace of process 1 where every cgroup2 mount that is seen here begins
    above the one that this process is in. Returns whether it was entered.

    To be called before there are threads: the others would stay where they are. Where it cannot be
    entered, `cgroup2_mount` says why the daemon does not start.
    """
    try:
        roots = [mount.root for mount in mounts() if mount.kind == b"cgroup2"]
        if not roots or any(".." not in root.parts for root in roots):
            return False
        fd = os.open(HOST_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(fd, CLONE_NEWCGROUP)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        log.warning("the host's cgroup namespace cannot be entered: %s", error)
        return False
    log.info("entered the host's cgroup namespace, from where its cgroup2 mount can be used")
    return True
