"""Benchmark `containers`: what it costs a runtime that a container is a session.

Containers that are sessions and containers that are none are made in turns, by each runtime and in
each way that it has; then commands are executed in both. Real runtimes in user-mode Linux: the
times say nothing of another machine, how they compare does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.report import BenchReport, Target, spread
from tests.containers import __main__ as guest
from tests.containers.host import MARK, SLEEP, TRUE, Host, Made, all_runtimes, is_session, sessions
from tests.containers.root import SUITES
from tests.containers.runtimes import IMAGE, prepare_guest

STARTS, EXECUTIONS = 8, 20
START_MOST, EXEC_MOST = 1.25, 1.25
PLAIN = "no session"
Timed = Callable[[str], float]


class Ways:
    """Ways to start a container, each told with the seconds that its runtime took."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def all(self) -> dict[str, dict[str, Timed]]:
        """By runtime, and by way."""
        return {
            "docker": {
                PLAIN: lambda name: self._docker(name, {}),
                "events": lambda name: self._docker(name, TRUE),
                "agentcg-runtime": lambda name: self._docker(name, TRUE, runtime="agentcg"),
            },
            "podman": {
                PLAIN: lambda name: self._podman(name),
                "events": lambda name: self._podman(name, f"--label={MARK}"),
                "hook": lambda name: self._podman(name, f"--label={MARK}", f"--annotation={MARK}"),
            },
            "containerd": {
                PLAIN: lambda name: self._pod("nri", name, {}),
                "CRI": lambda name: self._pod("cri", name, TRUE),
                "NRI": lambda name: self._pod("nri", name, TRUE),
            },
        }

    def _docker(self, name: str, labels: dict[str, str], **more: Any) -> float:
        service = self._host.services["docker"]
        client = service.client
        began = time.perf_counter()
        made = client.containers.create(
            IMAGE, list(SLEEP), name=name, labels=labels, network_mode="none", **more
        )
        made.start()
        took = time.perf_counter() - began
        service.made.append(name)
        return took

    def _podman(self, name: str, *marks: str) -> float:
        service = self._host.services["podman"]
        options = ("--detach", f"--name={name}", "--network=none", "--stop-signal=SIGKILL")
        argv = [*service.argv[:4], "run", *options, *marks, IMAGE, *SLEEP]
        began = time.perf_counter()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        took = time.perf_counter() - began
        service.made.append(name)
        return took

    def _pod(self, which: str, name: str, annotations: dict[str, str]) -> float:
        """A container in a pod that is there already; how long the pod takes is not ours."""
        containerd = self._host.nri if which == "nri" else self._host.cri
        return containerd.timed(name, SLEEP, annotations)

    def remove(self, runtime: str, way: str, name: str) -> None:
        """Remove what was started."""
        if runtime != "containerd":
            self._host.services[runtime].remove(name)
            return
        containerd = self._host.nri if way != "CRI" else self._host.cri
        (pod,) = (one for one in containerd.pods.values() if one.config.metadata.name == name)
        containerd.remove(pod.id)


def starts(host: Host, count: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Milliseconds of each start, and until the container was a session, by runtime and way."""
    ways = Ways(host)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for runtime, by_way in ways.all().items():
        times: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in by_way}
        for number in range(count):
            for at in range(len(by_way)):
                way = list(by_way)[(at + number) % len(by_way)]
                name = f"b{number}-{at}-{runtime}"
                times[way]["start"].append(1e3 * by_way[way](name))
                began = time.perf_counter()
                if way != PLAIN:
                    is_session(
                        host.daemon, f"team-{name}-main" if runtime == "containerd" else name
                    )
                    times[way]["session"].append(1e3 * (time.perf_counter() - began))
                ways.remove(runtime, way, name)
        found[runtime] = {way: dict(each) for way, each in times.items()}
    return found


def session_of(runtime: str, name: str) -> str:
    """The id that a container's session gets."""
    return f"team-{name}-main" if runtime == "containerd" else name


def executions(host: Host, count: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of `true`, executed in a container that is none, in a session, and as a call of
    it."""
    found: dict[str, dict[str, list[float]]] = {}
    for runtime in ("docker", "podman", "nri"):
        session = host.run(runtime, f"exec-{runtime}", TRUE)
        plain = _plain(host, runtime)
        cases: dict[str, tuple[Made, tuple[str, ...]]] = {
            PLAIN: (plain, ("true",)),
            "in the agent": (session, ("true",)),
            "as a call": (session, ("agentcg-exec", "--", "true")),
        }
        times: dict[str, list[float]] = {case: [] for case in cases}
        for number in range(count):
            for at in range(len(cases)):
                case = list(cases)[(at + number) % len(cases)]
                made, command = cases[case]
                began = time.perf_counter()
                code, text = host.execute(made, *command)
                times[case].append(1e3 * (time.perf_counter() - began))
                assert code == 0, text
        assert sessions(host.daemon)[session.session].calls_ended == count
        for made in (session, plain):
            host.remove(made)
        found[runtime] = times
    return found


def _plain(host: Host, runtime: str) -> Made:
    """A container that is no session."""
    name = f"plain-{runtime}"
    made = Made(runtime, name, name)
    if runtime in host.services:
        host.services[runtime].run(name, SLEEP, {})
    else:
        made.id, _ = host.nri.run(name, SLEEP, {})
    return made


def report(host: Host, count: int, execs: int) -> BenchReport:
    """Measure all, and compare."""
    targets, cases = [], {}
    for runtime, by_way in starts(host, count).items():
        told = {
            way: {what: spread(values) for what, values in times.items()}
            for way, times in by_way.items()
        }
        cases[f"{runtime}, start"] = told
        bare = told[PLAIN]["start"]["p50"]
        for way in by_way:
            if way != PLAIN:
                ratio = told[way]["start"]["p50"] / bare
                row = f"{runtime}, {way}: a start over one of no session ({bare:.0f} ms)"
                met = ratio <= START_MOST
                targets.append(Target(row, ratio, "x", f"<= {START_MOST}", met))
    for runtime, times in executions(host, execs).items():
        medians = {case: spread(values) for case, values in times.items()}
        cases[f"{runtime}, exec"] = {case: {"exec": told} for case, told in medians.items()}
        bare = medians[PLAIN]["p50"]
        ratio = medians["in the agent"]["p50"] / bare
        row = f"{runtime}: an execution in a session over one elsewhere ({bare:.0f} ms)"
        targets.append(Target(row, ratio, "x", f"<= {EXEC_MOST}", ratio <= EXEC_MOST))
    return BenchReport("containers", "user-mode Linux", count, targets, {"cases": cases})


def measure(count: int, execs: int) -> int:
    """Measure in this guest."""
    prepare_guest()
    # Its mounts end with the guest.
    directory = tempfile.mkdtemp(prefix="c", dir="/run")
    with all_runtimes(Path(directory)) as host:
        made = report(host, count, execs)
        made.show()
        for case, ways in made.details["cases"].items():
            for way, told in ways.items():
                numbers = ", ".join(
                    f"{what} {each['p50']:.0f} ms (to {each['max']:.0f})"
                    for what, each in told.items()
                )
                print(f"  {case}, {way}: {numbers}")
        print(f"  written: {made.write()}", flush=True)
    return 0 if all(target.met for target in made.targets) else 1


def main() -> int:
    """Start the guest with the runtimes, unless this is it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=STARTS, help="of each runtime and way")
    parser.add_argument("--executions", type=int, default=EXECUTIONS)
    parser.add_argument("--suite", choices=SUITES, default=SUITES[0])
    parser.add_argument("--systemd", action="store_true", help="systemd makes the cgroups")
    given = parser.parse_args()
    if "AGENTCG_GUEST" in os.environ:
        return measure(given.starts, given.executions)
    command = [sys.executable, "-m", "bench.containers.benchmark"]
    command += [f"--starts={given.starts}", f"--executions={given.executions}"]
    return guest.run(command, given.suite, with_systemd=given.systemd, qemu=False)


if __name__ == "__main__":
    sys.exit(main())
