"""Right-sized calls: programs that ask the machine how much there is are told how much they get.

A build that counts CPUs starts a compiler for each, and a runtime takes a part of the host's memory
for its heap; in a call of two cores and 2 GiB that is eight times too much. What a user has set
stays: a variable is for the launcher to set where there is none.
"""

from __future__ import annotations

import logging
import math
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Literal

from agentcgroupd.host.memory import host_memory_bytes
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Call

log = logging.getLogger(__name__)

Kind = Literal["caps", "jobs", "affinity"]

_MIB = 1 << 20
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "GOMAXPROCS",
    "PYTHON_CPU_COUNT",
    "CARGO_BUILD_JOBS",
    "CMAKE_BUILD_PARALLEL_LEVEL",
    "PYTEST_XDIST_AUTO_NUM_WORKERS",
    "UV_CONCURRENT_BUILDS",
    "UV_CONCURRENT_INSTALLS",
    "npm_config_jobs",
)
"""Variables whose programs take all CPUs where they are not set: with them they take fewer. The
first one is read by nproc as well."""
JOB_VARIABLES = {"MAKEFLAGS": "-j{}", "JAVA_TOOL_OPTIONS": "-XX:ActiveProcessorCount={}"}
"""Variables that change more than a number: make would take one job without, and a JVM says on
stderr that it has read them."""
NODE_SHARE, NODE_LEAST_MIB, NODE_DEFAULT_MIB = 0.75, 64, 2048
"""V8's old generation may have this part of a call's memory. Its own default is a quarter of the
host's memory, on hosts below 16 GiB at most 2 GiB, and no variable is to raise it."""
NODE_HOST_SHARE = 4
GO_SHARE = 0.9
"""Part of a call's memory at which Go's runtime collects harder (GOMEMLIMIT)."""
RESIDENT_SHARE = 0.75
"""Part of a call's memory that a program may take for itself that asks how much may be resident."""


def cpus_of_grant(call: Call) -> int | None:
    """CPUs that a call's programs should start workers for; None: as many as they count."""
    limits = [call.session.limits.cpu_max_millicores]
    above: Call | None = call
    while above is not None:
        limits.append(above.grant.cpu_max_millicores)
        above = above.parent
    least = min((limit for limit in limits if limit), default=None)
    if least is None:
        return None
    count = max(1, math.ceil(least / 1000))
    if count >= (os.cpu_count() or 1):
        return None
    return count if call.cpus_seen is None else min(count, call.cpus_seen)


def caps(call: Call, kinds: Sequence[Kind]) -> Iterator[tuple[str, str]]:
    """Variables for the launcher to set where the user has set none, by name."""
    count = cpus_of_grant(call)
    if count is not None and "caps" in kinds:
        for name in THREAD_VARIABLES:
            yield name, str(count)
    if count is not None and "jobs" in kinds:
        for name, form in JOB_VARIABLES.items():
            yield name, form.format(count)
    most = call.grant.memory_max_bytes
    if most is not None and "caps" in kinds:
        heap_mib = int(most * NODE_SHARE) // _MIB
        if NODE_LEAST_MIB <= heap_mib < _node_default_mib():
            yield "NODE_OPTIONS", f"--max-old-space-size={heap_mib}"
        yield "GOMEMLIMIT", f"{int(most * GO_SHARE) // _MIB}MiB"


def tell_resident(call: Call, process: Process, kinds: Sequence[Kind]) -> None:
    """Lower RLIMIT_RSS of a process that has entered a call, where nobody has: the kernel enforces
    nothing by it, but sort(1) takes its buffer by it, else a part of the host's memory."""
    most = call.grant.memory_max_bytes
    if most is None or "caps" not in kinds:
        return
    try:
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_RSS)
        share = int(most * RESIDENT_SHARE)
        if soft == resource.RLIM_INFINITY:
            resource.prlimit(process.pid, resource.RLIMIT_RSS, (share, hard))
    except (OSError, ValueError) as error:
        # It has ended, or its hard limit is lower already.
        log.debug("call %s is not told its memory: %s", call.id, error)


@cache
def _node_default_mib() -> int:
    return min(NODE_DEFAULT_MIB, host_memory_bytes() // NODE_HOST_SHARE // _MIB)


class Affinity:
    """Pins calls to as many CPUs as they are granted, those that the fewest calls are pinned to."""

    def __init__(self, kinds: Sequence[Kind], is_open: Callable[[str], object]) -> None:
        """`is_open`: whether the call of an id is there; those that have ended are forgotten."""
        self._enabled, self._is_open = "affinity" in kinds, is_open
        self._pinned: dict[str, frozenset[int]] = {}
        """CPUs of each open call that is pinned, by its id."""

    def pin(self, call: Call, process: Process) -> None:
        """Let a process that has entered a call run on the call's CPUs alone; what it starts from
        now on runs there too."""
        count = cpus_of_grant(call) if self._enabled else None
        if count is None:
            return
        try:
            allowed = os.sched_getaffinity(process.pid)
            chosen = self._pinned.get(call.id, frozenset()) & allowed
            if len(chosen) != count:
                chosen = self._choose(allowed, count)
            os.sched_setaffinity(process.pid, chosen)
        except OSError as error:
            # It has ended, or its cpuset is another by now: it runs where it may.
            log.debug("call %s is not pinned: %s", call.id, error)
            return
        self._pinned[call.id] = chosen
        call.cpus_seen = len(chosen)

    def _choose(self, allowed: set[int], count: int) -> frozenset[int]:
        self._pinned = {i: cpus for i, cpus in self._pinned.items() if self._is_open(i)}
        load = dict.fromkeys(allowed, 0)
        for cpus in self._pinned.values():
            for cpu in cpus & allowed:
                load[cpu] += 1
        return frozenset(sorted(allowed, key=lambda cpu: (load[cpu], cpu))[:count])
