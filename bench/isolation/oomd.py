"""The strategy `oomd`: plain sessions, watched by Meta's oomd as an operator would set it up.

Its targets are the sessions, as containers are in its own examples. Of what its configuration
allows the fastest is chosen, because a replay is shorter than the recording: it reads the pool
every second and acts the first time that a rule holds. The important session carries oomd's mark
for "last".

oomd's documentation asks for swap; without it memory is full before the pressure that oomd reads
has built up, so the kernel's own OOM killer is often first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from agentcgroup_lab.replay.backends import Place, PlainBackend, ReplayError
from agentcgroupd.cgroup.tree import cgroup2_mount
from bench.isolation.oomd_package import INTO

OOMD = "oomd"
INTERVAL_S = 1
FULL_SHARE = 0.9
"""Share of the pool above which the first rule holds."""
PRESSURE_PCT = 20
"""Memory pressure, in percent of the last 10 s, above which the second rule holds."""
DELAY_S = 2
"""After a kill, until the rule may kill again: by default 15 s, longer than most replays."""
_AVOID = "trusted.oomd_avoid"
_SOCKET = "oomd-stats.socket"
_START_S = 15.0
_STOP_S = 5.0


def find_oomd() -> str:
    """Absolute path of oomd: $AGENTCG_OOMD, what `oomd_package` unpacked, or in $PATH. Raises
    ReplayError."""
    places = [
        os.environ.get("AGENTCG_OOMD", ""),
        str(INTO / OOMD),
        shutil.which(OOMD) or "",
    ]
    for place in places:
        if place and os.access(place, os.X_OK):
            return os.path.abspath(place)
    raise ReplayError(
        "oomd is not here: run 'python -m bench.isolation.oomd_package' on a Debian machine with "
        "its mirror, install Debian's package oomd, or set AGENTCG_OOMD to where it is"
    )


def ruleset(pool: str, pool_bytes: int) -> dict[str, Any]:
    """oomd's configuration for the sessions below the cgroup `pool` (relative to the mount).

    Two rules in the style of those that come with oomd. The pool is almost full and gives memory
    back under pressure: the session that is largest or grows fastest goes. Pressure alone has
    built up: the session that causes most of it goes.
    """

    kill = {"cgroup": f"{pool}/*", "post_action_delay": DELAY_S}
    # A bare number would be megabytes.
    threshold = f"{int(pool_bytes * FULL_SHARE) // 1024}K"
    full = _plugin("memory_above", cgroup=pool, threshold=threshold, duration=0)
    pressure = _plugin(
        "pressure_above", cgroup=pool, resource="memory", threshold=PRESSURE_PCT, duration=0
    )
    reclaim = _plugin("memory_reclaim", cgroup=pool, duration=10)
    pool_almost_full = {
        "name": "pool almost full",
        "detectors": [["full", full]],
        "actions": [_plugin("kill_by_memory_size_or_growth", **kill)],
    }
    pool_under_pressure = {
        "name": "pool under pressure",
        "detectors": [["pressure", pressure, reclaim]],
        "actions": [_plugin("kill_by_pressure", resource="memory", **kill)],
    }
    return {"rulesets": [pool_almost_full, pool_under_pressure]}


def _plugin(name: str, **arguments: object) -> dict[str, Any]:
    return {"name": name, "args": {key: str(value) for key, value in arguments.items()}}


class OomdBackend(PlainBackend):
    """Plain cgroups below a pool, and oomd outside of it."""

    def __init__(
        self, pool_bytes: int, sessions: int, work: Path, memory_scale: float = 1.0
    ) -> None:
        """Make the pool and start oomd; its configuration holds no recorded sizes to scale. Raises
        ReplayError, KnobError, OSError."""
        del memory_scale
        program = find_oomd()
        super().__init__(OOMD, pool_bytes, sessions)
        mount = cgroup2_mount()
        config = work / "oomd.json"
        pool = str(self.pool.path.relative_to(mount))
        config.write_text(json.dumps(ruleset(pool, pool_bytes), indent=1), encoding="utf-8")
        self._log, self._kills = work / "oomd.log", work / "oomd.kills"
        runtime = work / "oomd"
        runtime.mkdir()
        # It tells its kills to the kernel's log unless told otherwise.
        self._kills.touch()
        command = {
            "config": config,
            "interval": INTERVAL_S,
            "cgroup-fs": mount,
            "runtime-dir": runtime,
            "kmsg-override": self._kills,
        }
        with self._log.open("wb") as log:
            self._oomd = subprocess.Popen(
                [program, *(f"--{name}={value}" for name, value in command.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + _START_S
        while not (runtime / _SOCKET).exists():
            if self._oomd.poll() is not None or time.monotonic() > deadline:
                words = " / ".join(_lines(self._log)[-5:]) or "it said nothing"
                self.stop()
                raise ReplayError(f"oomd did not start: {words}")
            time.sleep(0.05)

    def open(self, session_id: str, important: bool) -> Place:
        """Make a plain cgroup; the important one is oomd's last choice."""
        place = super().open(session_id, important)
        if important:
            os.setxattr(place.cgroup.path, _AVOID, b"1")
        return place

    def notes(self) -> tuple[str, ...]:
        """Lines in which oomd says what it killed."""
        return tuple(_lines(self._kills))

    def stop(self) -> tuple[str, ...]:
        """End oomd, then remove the pool."""
        if self._oomd.poll() is None:
            self._oomd.terminate()
        try:
            self._oomd.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._oomd.kill()
            self._oomd.wait()
        return super().stop()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()
