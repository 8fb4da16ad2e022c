"""The run directory: what is refused because others could change it, and what is made."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from agentcgroupd.errors import ConfigError
from agentcgroupd.host.run_dir import PARTS, RunDir

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def owned_by_another(run: Path) -> str:
    run.mkdir()
    os.chown(run, 65534, 65534)
    return "belongs to uid 65534"


def below_another(run: Path) -> str:
    run.parent.mkdir(exist_ok=True)
    os.chown(run.parent, 65534, 65534)
    return "belongs to uid 65534"


def writable_by_all(run: Path) -> str:
    run.mkdir()
    run.chmod(0o777)
    return "has mode 0777"


def writable_by_a_group(run: Path) -> str:
    run.mkdir()
    run.chmod(0o775)
    return "has mode 0775"


def sticky_itself(run: Path) -> str:
    run.mkdir()
    run.chmod(0o1777)
    return "has mode 1777"


def part_of_another(run: Path) -> str:
    (run / "admin").mkdir(parents=True)
    os.chown(run / "admin", 65534, 65534)
    return "admin belongs to uid 65534"


def a_link(run: Path) -> str:
    (run.parent / "real").mkdir()
    run.symlink_to("real")
    return "is a symbolic link; name the directory itself, such as"


def behind_a_link(run: Path) -> str:
    (run.parent.parent / "real").mkdir()
    run.parent.rmdir()
    run.parent.symlink_to("real")
    return "is a symbolic link"


def a_part_that_is_a_link(run: Path) -> str:
    (run.parent / "real").mkdir()
    run.mkdir()
    (run / "private").symlink_to("../real")
    return "private is a symbolic link"


def no_directory(run: Path) -> str:
    run.write_text("")
    return "is no directory"


@pytest.mark.parametrize(
    "arrange",
    [
        owned_by_another,
        below_another,
        writable_by_all,
        writable_by_a_group,
        sticky_itself,
        part_of_another,
        a_link,
        behind_a_link,
        a_part_that_is_a_link,
        no_directory,
    ],
)
def test_what_others_could_change_is_refused(
    tmp_path: Path, arrange: Callable[[Path], str]
) -> None:
    run = tmp_path / "parent/run"
    run.parent.mkdir()
    why = arrange(run)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as refused:
        RunDir(run)
    assert f"server.run_dir: '{run}' cannot be used: " in str(refused.value)
    assert why in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", ["run", "/tmp/../run"])
def test_only_a_plain_path_can_be_checked(path: str) -> None:
    with pytest.raises(ConfigError, match="allowed is an absolute path"):
        RunDir(Path(path))


def test_what_is_missing_is_made_and_can_be_undone(tmp_path: Path) -> None:
    run = tmp_path / "new/run"
    made = RunDir(run)
    os.close(made.lock())
    for name, mode in PARTS:
        assert stat.S_IMODE((run / name).stat().st_mode) == mode
    made.undo()
    assert not (tmp_path / "new").exists()


def test_what_was_there_or_is_in_use_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    kept = RunDir(run)
    kept.keep()
    kept.undo()
    again = RunDir(run)
    (run / "agent/grpc.sock").touch()
    again.undo()
    assert (run / "agent/grpc.sock").exists()


def test_one_daemon_at_a_time(tmp_path: Path) -> None:
    first = RunDir(tmp_path / "run")
    held = first.lock()
    with pytest.raises(
        ConfigError, match=f"another daemon is running in it, with pid {os.getpid()}"
    ):
        RunDir(tmp_path / "run").lock()
    os.close(held)
    os.close(first.lock())
