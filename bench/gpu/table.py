"""What holds a quota of 4 GiB, against ways around it; and what each costs.

Against plain time slicing, MPS alone, and a library that is preloaded (our own, of the kind of
HAMi-core: interposer.c). A way has escaped when more than the quota is held and the process
lives on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentcgroupd.gpu.mps import ControlDaemon, environment
from bench.gpu.site import Site
from bench.report import ROOT
from tests.harness import EXEC, DaemonProcess

QUOTA_GIB, ASKED_GIB, HOLD_S = 4, 8, 6
MODES = ("runtime", "driver", "managed", "pool", "mapping", "graph")
WAYS: dict[str, tuple[str, bool]] = {
    **{mode: (mode, False) for mode in MODES},
    "runtime, clean environment": ("runtime", True),
    "pool, clean environment": ("pool", True),
    "mapping, clean environment": ("mapping", True),
}
"""Name -> (mode of ways.cu, re-executed with an empty environment)."""
OURS = ("ours, turns", "ours, MPS")
ALL = ("time slicing", "LD_PRELOAD", "MPS alone", *OURS)

Start = Callable[[list[str], bool], list[str]]
"""Command line of a tool, whether its environment is cleaned -> the one to run."""


def build() -> tuple[Path, Path]:
    """Compile the ways and the interposer. Raises OSError or CalledProcessError."""
    out = ROOT / "build/gpu"
    out.mkdir(parents=True, exist_ok=True)
    ways, interposer = out / "gpu_ways", out / "interposer.so"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not ways.exists():
        source = str(ROOT / "bench/gpu/ways.cu")
        subprocess.run([nvcc, "-O1", "-arch=sm_90", "-o", str(ways), source, "-ldl"],
                       check=True, timeout=120)  # fmt: skip
    if not interposer.exists():
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(interposer),
                        str(ROOT / "bench/gpu/interposer.c"), "-ldl", "-pthread"],
                       check=True, timeout=60)  # fmt: skip
    return ways, interposer


def _clean(argv: list[str], clean: bool) -> list[str]:
    return ["env", "-i", f"PATH={os.environ['PATH']}", *argv] if clean else argv


def try_all(ways: Path, start: Start, env: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Every way, several at a time; what each got, and whether it lived."""
    found: dict[str, dict[str, Any]] = {}
    names = list(WAYS)
    for part in (names[:5], names[5:]):
        running = {}
        for name in part:
            mode, clean = WAYS[name]
            argv = start([str(ways), mode, str(ASKED_GIB), str(HOLD_S)], clean)
            running[name] = (time.monotonic(), subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, **env}))  # fmt: skip
        for name, (began, process) in running.items():
            try:
                out = process.communicate(timeout=60)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                out = process.communicate()[0] + "no end"
            words = out.split()
            got = int(words[words.index("got") + 1]) if "got" in words else None
            found[name] = {"got_gib": got, "lived": "lived" in words, "out": out[-300:],
                           "seconds": round(time.monotonic() - began, 1),
                           "status": process.returncode}  # fmt: skip
    return found


def escaped(row: dict[str, Any]) -> bool | None:
    """Whether a way got past; None: it did not even begin."""
    if row["got_gib"] is None:
        return None if row["lived"] or row["status"] not in (137, -9, 125) else False
    return bool(row["got_gib"] > QUOTA_GIB and row["lived"])


def _costs(ways: Path, start: Start, env: dict[str, str]) -> dict[str, float] | str:
    argv = start([str(ways), "costs"], False)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False,
                          env={**os.environ, **env})  # fmt: skip
    try:
        answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return answer
    except (ValueError, IndexError):
        return (done.stdout + done.stderr)[-300:]


@contextmanager
def mps_alone() -> Iterator[dict[str, str]]:
    """A control daemon of our own, by hand; the environment of a client."""
    directory = Path(tempfile.mkdtemp(prefix="mps-"))
    control = ControlDaemon(directory / "pipes", directory / "logs", ["0"])
    control.start()
    try:
        yield environment(directory / "pipes", 100, QUOTA_GIB << 30, 1)
    finally:
        control.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _in_call(daemon: DaemonProcess, priority: str) -> Start:
    def start(argv: list[str], clean: bool) -> list[str]:
        return [EXEC, "--session", "bench", f"--socket={daemon.run_dir}/admin/attach.sock", "--",
                EXEC, f"--socket={daemon.run_dir}/agent/attach.sock", "--gpu=15%",
                f"--gpu-memory={QUOTA_GIB}G", f"--gpu-priority={priority}",
                "--on-unavailable=refuse", "--", *_clean(argv, clean)]  # fmt: skip

    return start


def measure(site: Site, who: tuple[str, ...] = ALL) -> dict[str, Any]:
    """Each way under each of these, and the costs."""
    ways, interposer = build()
    quota = {"LD_PRELOAD": str(interposer), "QUOTA_BYTES": str(QUOTA_GIB << 30)}
    table: dict[str, Any] = {"rows": {}, "costs": {}}
    for name in who:
        if name in OURS:
            with site.daemon(f'share = "{"turns" if name == OURS[0] else "mps"}"') as daemon:
                _add(table, name, ways, _in_call(daemon, "normal"), {})
            continue
        if name == "MPS alone":
            with mps_alone() as env:
                _add(table, name, ways, _clean, env)
        else:
            _add(table, name, ways, _clean, quota if name == "LD_PRELOAD" else {})
    return table


def _add(table: dict[str, Any], name: str, ways: Path, start: Start, env: dict[str, str]) -> None:
    table["rows"][name] = try_all(ways, start, env)
    table["costs"][name] = _costs(ways, start, env)


def show(table: dict[str, Any]) -> None:
    """For people: held (with what was got), or ESCAPED."""
    rows = table["rows"]
    print(f"\ngpu: {ASKED_GIB} GiB asked for, {QUOTA_GIB} allowed: GiB got, and what became of it")
    print("  " + " | ".join(["way".ljust(27), *(name.ljust(13) for name in rows)]))
    for way in WAYS:
        cells = []
        for row in rows.values():
            state = escaped(row[way])
            got = row[way]["got_gib"]
            word = "held" if row[way]["lived"] else f"ended {row[way]['seconds']:.0f}s"
            if state is not False:
                word = "no start" if state is None else "ESCAPED"
            cells.append(f"{'-' if got is None else got} {word}".ljust(13))
        print("  " + " | ".join([way.ljust(27), *cells]))
    for name, cost in table["costs"].items():
        print(f"  cost, {name}: {cost}")


def held_percent(table: dict[str, Any]) -> float:
    """Of all ways that began, under the daemon."""
    states = [escaped(row) for name in OURS for row in table["rows"].get(name, {}).values()]
    known = [state for state in states if state is not None]
    return 100.0 * known.count(False) / len(known) if known else 0.0
