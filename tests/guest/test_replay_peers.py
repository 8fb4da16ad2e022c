"""The strategies that a benchmark compares with, on a real kernel: what they set, and that nothing
stays. oomd itself is played by a script: which sessions it kills is its own affair."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from agentcgroup_lab.replay.backends import ReplayError, make_backend
from agentcgroupd.cgroup.knobs import MEMORY_HIGH, MEMORY_MAX
from agentcgroupd.cgroup.tree import cgroup2_mount
from bench.isolation.oomd import OomdBackend

pytestmark = pytest.mark.controllers

POOL_BYTES = 64 << 20
OOMD = """#!/bin/sh
for argument; do
	case $argument in
	--runtime-dir=*) directory=${argument#*=} ;;
	--kmsg-override=*) kills=${argument#*=} ;;
	esac
done
echo "oomd kill: s1" > "$kills"
touch "$directory/oomd-stats.socket"
exec sleep 3600
"""


def nothing_stays() -> bool:
    return not list(cgroup2_mount().glob(f"agentcg-replay-{os.getpid()}-*"))


def test_high_sets_each_sessions_part_and_no_limit_but_the_pools(tmp_path: Path) -> None:
    backend = make_backend("high", POOL_BYTES, 4, tmp_path)
    try:
        place = backend.open("s1", important=True)
        assert place.cgroup.read(MEMORY_HIGH) == POOL_BYTES // 4
        assert place.cgroup.read(MEMORY_MAX) is None
        assert backend.pool.read(MEMORY_MAX) == POOL_BYTES
        backend.close("s1")
    finally:
        assert backend.stop() == ()
    assert nothing_stays()


def test_oomd_watches_the_pool_spares_the_important_session_and_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "fake"
    program.write_text(OOMD)
    program.chmod(0o755)
    monkeypatch.setenv("AGENTCG_OOMD", str(program))
    backend = OomdBackend(POOL_BYTES, 2, tmp_path)
    try:
        marks = {
            name: os.listxattr(backend.open(name, important=name == "s1").cgroup.path)
            for name in ("s1", "s2")
        }
        assert "trusted.oomd_avoid" in marks["s1"]
        assert "trusted.oomd_avoid" not in marks["s2"]
        assert backend.pool.path.name in (tmp_path / "oomd.json").read_text()
        for name in marks:
            backend.close(name)
    finally:
        left = backend.stop()
    assert left == ()
    assert backend.notes() == ("oomd kill: s1",)
    assert nothing_stays()


def test_an_oomd_that_does_not_start_is_told_and_leaves_no_pool(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "fake"
    program.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("AGENTCG_OOMD", str(program))
    started = time.monotonic()
    with pytest.raises(ReplayError, match="no such option"):
        OomdBackend(POOL_BYTES, 2, tmp_path)
    assert time.monotonic() - started < 10
    assert nothing_stays()
