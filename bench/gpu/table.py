"""Ways around a quota of 4 GiB, and which means hold against them; and what each means costs.

The daemon is compared with plain time slicing, MPS alone, and a library that is preloaded (our own,
of the kind of HAMi-core: interposer.c). A way has escaped when more than the quota is held and the
process lives on.
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

from agentcgroupd.gpu.mps import MpsControlDaemon, environment
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
TRIED_AT_ONCE = 5
HELD_STATUSES = (137, -9, 125)
"""Exit statuses of a way that did not get through: killed, as shells and as Popen tell it, or
refused by the daemon."""
OURS = ("ours, turns", "ours, MPS")
ALL = ("time slicing", "LD_PRELOAD", "MPS alone", *OURS)

Start = Callable[[list[str], bool], list[str]]
"""From the command line of a tool, and whether its environment is cleaned, to the one to run."""


def build() -> tuple[Path, Path]:
    """Compile the ways and the interposer. Raises OSError or CalledProcessError."""
    sources, out = ROOT / "bench/gpu", ROOT / "build/gpu"
    out.mkdir(parents=True, exist_ok=True)
    ways, interposer = out / "gpu_ways", out / "interposer.so"
    if not ways.exists():
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        source = str(sources / "ways.cu")
        command = [nvcc, "-O1", "-arch=sm_90", "-o", str(ways), source, "-ldl"]
        subprocess.run(command, check=True, timeout=120)
    if not interposer.exists():
        source = str(sources / "interposer.c")
        flags = ["-shared", "-fPIC", "-O2"]
        command = ["cc", *flags, "-o", str(interposer), source, "-ldl", "-pthread"]
        subprocess.run(command, check=True, timeout=60)
    return ways, interposer


def _clean(argv: list[str], clean: bool) -> list[str]:
    return ["env", "-i", f"PATH={os.environ['PATH']}", *argv] if clean else argv


def try_all(ways: Path, start: Start, env: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Try every way, several at a time; what each got, and whether it lived."""
    found: dict[str, dict[str, Any]] = {}
    names = list(WAYS)
    for first in range(0, len(names), TRIED_AT_ONCE):
        running = {}
        for name in names[first : first + TRIED_AT_ONCE]:
            mode, clean = WAYS[name]
            argv = start([str(ways), mode, str(ASKED_GIB), str(HOLD_S)], clean)
            process = subprocess.Popen(
                argv,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **env},
            )
            running[name] = (time.monotonic(), process)
        for name, (began, process) in running.items():
            found[name] = _outcome(process, began)
    return found


def _outcome(process: subprocess.Popen[str], began: float) -> dict[str, Any]:
    """Wait for a way to end; what it got, whether it lived, what it printed."""
    try:
        out = process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        out = process.communicate()[0] + "no end"
    words = out.split()
    return {
        "got_gib": int(words[words.index("got") + 1]) if "got" in words else None,
        "lived": "lived" in words,
        "out": out[-300:],
        "seconds": round(time.monotonic() - began, 1),
        "status": process.returncode,
    }


def escaped(row: dict[str, Any]) -> bool | None:
    """Whether a way got past the quota; None: it did not even begin."""
    if row["got_gib"] is None:
        held = not row["lived"] and row["status"] in HELD_STATUSES
        return False if held else None
    return bool(row["got_gib"] > QUOTA_GIB and row["lived"])


def _costs(ways: Path, start: Start, env: dict[str, str]) -> dict[str, float] | str:
    argv = start([str(ways), "costs"], False)
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **env}
    )
    try:
        answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return answer
    except (ValueError, IndexError):
        return (done.stdout + done.stderr)[-300:]


@contextmanager
def mps_alone() -> Iterator[dict[str, str]]:
    """Run MPS without the daemon; yields the environment of its clients."""
    directory = Path(tempfile.mkdtemp(prefix="mps-"))
    control = MpsControlDaemon(directory / "pipes", directory / "logs", ["0"])
    control.start()
    try:
        yield environment(directory / "pipes", 100, QUOTA_GIB << 30, 1)
    finally:
        control.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _in_call(daemon: DaemonProcess) -> Start:
    admin, agent = (f"{daemon.run_dir}/{role}/attach.sock" for role in ("admin", "agent"))
    enter_session = [EXEC, "--session", "bench", f"--socket={admin}", "--"]
    begin_call = [EXEC, f"--socket={agent}", "--gpu=15%", f"--gpu-memory={QUOTA_GIB}G"]
    begin_call += ["--gpu-priority=normal", "--on-unavailable=refuse", "--"]

    def start(argv: list[str], clean: bool) -> list[str]:
        return [*enter_session, *begin_call, *_clean(argv, clean)]

    return start


def measure(site: Site, who: tuple[str, ...] = ALL) -> dict[str, Any]:
    """Try each way against each of these means, and measure what they cost."""
    ways, interposer = build()
    quota = {"LD_PRELOAD": str(interposer), "QUOTA_BYTES": str(QUOTA_GIB << 30)}
    table: dict[str, Any] = {"rows": {}, "costs": {}}
    for name in who:
        if name in OURS:
            with site.daemon(f'share = "{"turns" if name == OURS[0] else "mps"}"') as daemon:
                _add(table, name, ways, _in_call(daemon), {})
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
    """Print the table for people: what each way got, and whether it was held or ESCAPED."""
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
    """Percent of the ways that were held by the daemon, of all that began."""
    states = [escaped(row) for name in OURS for row in table["rows"].get(name, {}).values()]
    known = [state for state in states if state is not None]
    return 100.0 * known.count(False) / len(known) if known else 0.0
