"""`make bench BENCH=gpu`: two to four tenants on one GPU.

Measures shares against what was granted, the time to take the GPU back for an important call,
throughput against one tenant alone, and quotas; and which ways around a quota other means leave
open (table.py). Without a GPU the same daemon shares a stand-in: real processes that spin, frozen
and thawed in turn.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from bench.gpu import table
from bench.gpu.site import Site, Tenant, attempt, report_of
from bench.report import BenchReport, Target, quantile, spread
from tests.harness import DaemonProcess

WINDOWS = 5
SHARES = ((70, 30), (60, 30, 10), (40, 30, 20, 10))
TIME_SLICES = 'share = "turns"\nquota = "probes"'
MPS = 'share = "mps"'
BURST_PAUSE_S, BURST_PAUSE_MORE_S = 0.8, 0.2
"""Pauses between bursts are longer than it takes the daemon to see that a call does not use the
GPU, and by a random time longer still, so that bursts begin anywhere in the others' slices."""


def part(percent: int, priority: str) -> dict[str, str]:
    """The intent of a tenant that asks for this share of the first device."""
    return {
        "gpu": f"{percent}%",
        "gpu_memory": "4G",
        "gpu_device": "0",
        "gpu_priority": priority,
    }


def shares_of(tenants: list[Tenant], begin: int, end: int, whole: float) -> dict[str, Any]:
    """Each tenant's part of the work that all did, in all and by window; and how much less that
    was than what one alone does (`whole`)."""
    settled = begin + (end - begin) // 6
    edges = [settled + (end - settled) * i // WINDOWS for i in range(WINDOWS + 1)]
    rows = []
    for start, stop in itertools.pairwise(edges):
        rates = [t.rate(start, stop) for t in tenants]
        rows.append([*(100 * r / max(1e-9, sum(rates)) for r in rates), sum(rates)])
    columns = list(zip(*rows, strict=True))
    overall = [t.rate(settled, end) for t in tenants]
    return {
        "got_percent": [100 * r / max(1e-9, sum(overall)) for r in overall],
        "window_percent": [spread(c) for c in columns[:-1]],
        "total_per_s": spread(columns[-1]),
        "lost_percent": 100 * (1 - sum(overall) / whole) if whole else None,
    }


def alone(site: Site, seconds: float) -> float:
    """Measure the operations a second of one tenant without any control."""
    tenant = site.spawn("steady")
    begin, end = site.run([tenant], seconds)
    return tenant.rate(begin + (end - begin) // 6, end)


def sliced(site: Site, seconds: float, whole: float) -> dict[str, Any]:
    """Measure the driver's own time slices, which are alike for all."""
    found = {}
    for count in (2, 4):
        tenants = [site.spawn("steady") for _ in range(count)]
        begin, end = site.run(tenants, seconds)
        found[str(count)] = shares_of(tenants, begin, end, whole)
    return found


def shared(
    site: Site, daemon: DaemonProcess, seconds: float, whole: float, sets: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """Measure shares under the daemon."""
    found = {}
    for wanted in sets:
        tenants = [site.spawn("steady", daemon, part(p, "normal")) for p in wanted]
        begin, end = site.run(tenants, seconds)
        row = shares_of(tenants, begin, end, whole)
        row["wanted"] = list(wanted)
        row["reports"] = [reported(report_of(daemon, t.call).gpu) for t in tenants]
        found["/".join(map(str, wanted))] = row
        got, lost = [round(g, 1) for g in row["got_percent"]], row["lost_percent"] or 0
        print(f"gpu: wanted {wanted}: got {got}, lost {lost:.1f} % against one alone", flush=True)
    return found


def reported(usage: pb.GpuUsage) -> dict[str, Any]:
    """What a call's report says of its use; None: the driver did not tell."""
    told = {field.name for field, _ in usage.ListFields()}
    return {
        "held_back_ms": usage.held_back_usec // 1000,
        "sm_percent": round(usage.sm_percent, 1) if "sm_percent" in told else None,
        "energy_j": round(usage.energy_mj / 1e3, 1) if "energy_mj" in told else None,
        "peak_mib": usage.memory_peak_bytes >> 20 if "memory_peak_bytes" in told else None,
        "by": f"{usage.share_held_by}/{usage.memory_held_by}",
    }


class FreezeWatch:
    """Reads cgroup.events of some calls in a tight loop, to see when each is frozen and thawed."""

    def __init__(self, daemon: DaemonProcess, calls: list[str]) -> None:
        leaves = {call: next(daemon.cgroup_dir.glob(f"*/call-{call}")) for call in calls}
        self._files = {call: leaf / "cgroup.events" for call, leaf in leaves.items()}
        self.changes: dict[str, list[tuple[int, bool]]] = {c: [] for c in calls}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def __enter__(self) -> FreezeWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        before = dict.fromkeys(self._files, False)
        while not self._stop.is_set():
            for call, path in self._files.items():
                try:
                    frozen = "frozen 1" in path.read_text()
                except OSError:
                    continue
                if frozen != before[call]:
                    before[call] = frozen
                    self.changes[call].append((time.monotonic_ns(), frozen))

    def frozen_at(self, call: str, at_ns: int) -> int | None:
        """When a call was frozen that was to be from `at_ns` on: `at_ns` where it was already, None
        where it was not within 100 ms."""
        state, since = False, 0
        for when, frozen in self.changes[call]:
            if when <= at_ns:
                state, since = frozen, when
            elif frozen and not state and when <= at_ns + 100_000_000:
                return when
        return at_ns if state and since <= at_ns else None


def taken_back(site: Site, daemon: DaemonProcess, seconds: float) -> dict[str, Any]:
    """Measure how soon an important call that works now and then gets the GPU from two that always
    work."""
    batch = [site.spawn("steady", daemon, part(40, "batch")) for _ in range(2)]
    important = site.spawn(
        "bursts",
        daemon,
        part(20, "important"),
        pause_s=BURST_PAUSE_S,
        pause_more_s=BURST_PAUSE_MORE_S,
        each=20,
    )
    tenants = [*batch, important]
    site.ready(tenants, busy=batch)
    with FreezeWatch(daemon, [t.call for t in batch]) as watch:
        _, end = site.go(tenants, seconds)
        site.collect(tenants, end)
    times, missed, already, first = [], 0, 0, []
    # The first burst may have begun before the others worked, the last after they had ended.
    bursts = [b for b in important.result["bursts"][1:] if b["began_ns"] < end - 200_000_000]
    for burst in bursts:
        at = burst["began_ns"]
        found = [watch.frozen_at(t.call, at) for t in batch]
        if None in found:
            missed += 1
        elif found == [at] * len(batch):
            already += 1  # the daemon took the important call for one that still worked
        else:
            times.append((max(f for f in found if f is not None) - at) / 1e6)
        first.append(burst["took_ns"][0] / 1e6)
    later = [t / 1e6 for b in bursts for t in b["took_ns"][1:]]
    batch_rate = [t.rate(end - int(seconds * 0.8e9), end) for t in batch]
    return {
        "bursts": len(times),
        "missed": missed,
        "held_already": already,
        "ms": spread(times) if times else None,
        "first_operation_ms": spread(first),
        "later_operations_ms": spread(later),
        "batch_per_s": batch_rate,
        "all_ms": times,
    }


def began(site: Site, daemon: DaemonProcess) -> dict[str, Any]:
    """Measure the part of all work that an important call does which begins while two others
    work."""
    batch = [site.spawn("steady", daemon, part(40, "batch")) for _ in range(2)]
    important = site.spawn("steady", daemon, part(20, "important"))
    begin, end = site.run([*batch, important], 3.0)
    rates = [t.rate(begin + 500_000_000, end) for t in (*batch, important)]
    return {"per_s": rates, "important_percent": 100 * rates[-1] / sum(rates)}


def quotas(site: Site, gpu: str) -> dict[str, Any]:
    """Find out what becomes of a tool that takes 8 GiB with a quota of 4."""
    with site.daemon(gpu) as daemon:
        intent = {"gpu_memory": "4G", "gpu": "20%"}
        tenant = site.spawn("grab", daemon, intent, chunks=8, hold_s=6.0)
        site.ready([tenant])
        report = report_of(daemon, tenant.call)
        grabbed = Path(tenant.spec["result"]).with_suffix(".grabbed")
        return {
            "verdict": int(report.verdict),
            "sentence": report.sentence,
            "tool": grabbed.read_text() if grabbed.exists() else "",
            "peak_mib": report.gpu.memory_peak_bytes >> 20,
            "held_by": report.gpu.memory_held_by,
            "refused": report.gpu.refused,
            "feedback": [f.sentence for f in report.feedback],
        }


def share_targets(name: str, found: dict[str, Any] | None) -> list[Target]:
    """Targets for accuracy and loss, of the worst tenant in the worst case."""
    if not found:
        return []
    off = [
        abs(got - wanted)
        for row in found.values()
        for got, wanted in zip(row["got_percent"], row["wanted"], strict=True)
    ]
    lost = [row["lost_percent"] for row in found.values() if row["lost_percent"] is not None]
    title = f"share, worst distance from granted, {name}"
    targets = [Target(title, max(off), "points", "<= 3", max(off) <= 3)]
    if lost:
        title = f"throughput lost against one alone, {name}"
        targets.append(Target(title, max(lost), "%", "<= 5", max(lost) <= 5))
    return targets


class Measured:
    """Parts of the benchmark, each on its own: one that fails leaves the others."""

    def __init__(self, site: Site, arguments: argparse.Namespace) -> None:
        self.site, self.seconds, self.bursts_s = site, arguments.seconds, arguments.bursts_s
        self.mps_sets = SHARES[: arguments.mps_sets]
        self.failures: dict[str, str] = {}
        self.targets: list[Target] = []
        self.details: dict[str, Any] = {"failures": self.failures}
        self.whole = 0.0

    def part(self, name: str, what: Callable[[], Any]) -> Any:
        """Run one part and keep what it returns; None where it fails."""
        self.details[name] = found = attempt(name, what, self.failures)
        return found

    def alone(self) -> None:
        """Measure one tenant, with which all others are compared."""
        self.whole = self.part("alone_per_s", lambda: alone(self.site, self.seconds)) or 0.0
        print(f"gpu: alone: {self.whole:.1f} operations a second")

    def sliced(self) -> None:
        """The driver's own time slices."""
        self.part("sliced", lambda: sliced(self.site, self.seconds / 2, self.whole))

    def turns(self) -> None:
        """Shares by time slices, and the GPU taken back."""
        with self.site.daemon(TIME_SLICES) as daemon:
            found = self.part("turns", self._shared(daemon, SHARES))
            back = self.part("taken_back", lambda: taken_back(self.site, daemon, self.bursts_s))
        self.targets += share_targets("turns", found)
        if back and back["ms"]:
            late = quantile(back["all_ms"], 0.9)
            name = f"GPU taken back, p90 of {back['bursts']} ({back['missed']} missed)"
            self.targets.append(Target(name, late, "ms", "<= 2", late <= 2 and not back["missed"]))
            print(
                f"gpu: taken back: {back['ms']}, held already {back['held_already']}, "
                f"first operation {back['first_operation_ms']}, "
                f"later {back['later_operations_ms']}"
            )

    def _shared(
        self, daemon: DaemonProcess, sets: Sequence[tuple[int, ...]]
    ) -> Callable[[], dict[str, Any]]:
        return partial(shared, self.site, daemon, self.seconds, self.whole, sets)

    def began(self) -> None:
        """An important call that goes on working."""
        with self.site.daemon(TIME_SLICES) as daemon:
            self.part("began", lambda: began(self.site, daemon))

    def mps(self) -> None:
        """Shares by MPS."""
        with self.site.daemon(MPS) as daemon:
            found = self.part("mps", self._shared(daemon, self.mps_sets))
        self.targets += share_targets("MPS", found)

    def quota(self) -> None:
        """PyTorch against its quota, by each rung that can be had."""
        rungs = {
            "counting": 'share = "turns"\nquota = "counting"',
            "mps": MPS,
            "strongest": 'share = "turns"',
        }
        for name, gpu in rungs.items():
            found = self.part(f"quota_{name}", partial(quotas, self.site, gpu))
            if found:
                said = found["tool"] or "nothing"
                print(f"gpu: quota: {name}: {found['held_by']}; tool: {said}; {found['sentence']}")

    def ours(self) -> None:
        """The table of ways around a quota, ours only."""
        self._table(table.OURS)

    def table(self) -> None:
        """The table of ways around a quota, ours and others."""
        self._table(table.ALL)

    def _table(self, who: tuple[str, ...]) -> None:
        found = self.part("table", lambda: table.measure(self.site, who))
        if found:
            table.show(found)
            held = table.held_percent(found)
            self.targets.append(
                Target("quota held, of all ways tried", held, "%", "100", held == 100)
            )


REAL_ONLY = ("mps", "quota", "ours", "table")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each group of tenants")
    parser.add_argument("--bursts-s", type=float, default=20.0)
    parser.add_argument("--parts", default="sliced,turns,began,mps,quota,table")
    parser.add_argument("--mps-sets", type=int, default=len(SHARES), help="of tenants, with MPS")
    arguments = parser.parse_args()
    site = Site()
    if not site.real:
        print("gpu: no GPU with PyTorch here: stand-ins; MPS, quotas and the table are not run")
    try:
        measured = Measured(site, arguments)
        targets = measured.targets
        report = BenchReport("gpu", site.where, WINDOWS, targets, measured.details)
        measured.alone()
        for name in arguments.parts.split(","):
            if site.real or name not in REAL_ONLY:
                attempt(f"{name} (all)", getattr(measured, name), measured.failures)
                # Written after each part, in case a limit of time ends the run.
                report.write()
    finally:
        site.close()
    if targets:
        report.show()
    print(f"  written: {report.write()}")
    return 0 if targets and all(t.met for t in targets) and not measured.failures else 1


if __name__ == "__main__":
    sys.exit(main())
