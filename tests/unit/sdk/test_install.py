"""`agentcg install` and `uninstall`: the files, in a directory that stands for a system's root."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agentcgroup import errors
from agentcgroup.cli import install, install_files, main
from agentcgroup.cli.install_files import Entry, Installation
from agentcgroup.cli.install_pins import remove_pins
from tests.harness import ROOT

STANDARD = ("etc/systemd/system", "etc/tmpfiles.d", "usr/local/bin", "usr/local/share", "run")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the directories that every system has."""
    for name in STANDARD:
        (tmp_path / "root" / name).mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    """An installation as a wheel leaves it, with the units of this checkout."""
    prefix = tmp_path / "opt/agentcgroup"
    units = prefix / "share/agentcgroup/systemd"
    shutil.copytree(ROOT / "systemd", units)
    completion = prefix / "share/bash-completion/completions/agentcg"
    completion.parent.mkdir(parents=True)
    completion.write_text("complete -F _agentcg agentcg\n")
    (prefix / "bin").mkdir()
    for name in (*install_files.PROGRAMS, "agentcg-cli"):
        program = prefix / "bin" / name
        program.write_text("#!/bin/sh\nexit 0\n")
        program.chmod(0o755)
    found = Installation(prefix / "bin", prefix)
    monkeypatch.setattr(Installation, "this", classmethod(lambda cls: found))
    return found


def tree(root: Path) -> dict[str, str]:
    """Every file, link and directory below a root, with what it holds."""
    held = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            held[name] = f"-> {os.readlink(path)}"
        else:
            held[name] = path.read_text() if path.is_file() else "directory"
    return held


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_everything_is_put_in_place_and_nothing_is_left(
    root: Path, installation: Installation
) -> None:
    before = tree(root)
    assert run("install", "--root", root) == 0
    made = tree(root)
    unit = made["etc/systemd/system/agentcgroupd.service"]
    assert f"ExecStart={installation.programs}/agentcgroupd --config" in unit
    assert f"ExecStopPost=-{installation.programs}/agentcg-release" in unit
    assert "/usr/bin/env" not in unit
    wanted = made["etc/systemd/system/multi-user.target.wants/agentcgroupd.service"]
    assert wanted == "-> /etc/systemd/system/agentcgroupd.service"
    assert made["usr/local/bin/agentcg"] == f"-> {installation.programs}/agentcg"
    assert "complete" in made["usr/local/share/bash-completion/completions/agentcg"]
    assert "[pool]" in made["etc/agentcgroup/agentcgroupd.toml"]
    assert run("uninstall", "--root", root) == 0
    assert tree(root) == before


def test_a_second_time_changes_nothing(
    root: Path, installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    run("install", "--root", root)
    first = tree(root)
    config = root / "etc/agentcgroup/agentcgroupd.toml"
    config.write_text("[pool]\n")
    (root / "etc/systemd/system/agentcg.slice").write_text("")
    capsys.readouterr()
    assert run("install", "--root", root, "--json") == 0
    found = {Path(file["path"]).name: file["found"] for file in _json(capsys)["files"]}
    assert found.pop("agentcgroupd.toml") == "kept"
    assert found.pop("agentcg.slice") == "changed"
    assert set(found.values()) == {"same"}
    assert tree(root) == {**first, "etc/agentcgroup/agentcgroupd.toml": "[pool]\n"}
    assert run("uninstall", "--root", root, "--keep") == 0
    assert config.read_text() == "[pool]\n"
    assert run("uninstall", "--root", root) == 0
    assert run("uninstall", "--root", root) == 0
    assert not config.parent.exists()


def _json(capsys: pytest.CaptureFixture[str]) -> dict[str, list[dict[str, str]]]:
    value: dict[str, list[dict[str, str]]] = json.loads(capsys.readouterr().out)
    return value


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_a_dry_run_shows_each_file_and_touches_none(
    root: Path, installation: Installation, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    if command == "uninstall":
        run("install", "--root", root)
        capsys.readouterr()
    before = tree(root)
    assert run(command, "--root", root, "--dry-run") == 0
    assert tree(root) == before
    shown = capsys.readouterr().out
    for entry in installation.entries():
        assert f"{install_files.below(root, entry.path)}: would be" in shown


def test_what_is_not_ours_stays(root: Path, installation: Installation) -> None:
    mine = root / "usr/local/bin/agentcg"
    mine.write_text("mine")
    with pytest.raises(install_files.CannotInstall, match="no link of ours"):
        Entry(Path("/usr/local/bin/agentcg"), link="/x").found(root)
    assert run("install", "--root", root) == 1
    assert run("uninstall", "--root", root) == 0
    assert mine.read_text() == "mine"
    mine.unlink()
    mine.symlink_to("/bin/true")
    run("uninstall", "--root", root)
    assert mine.is_symlink()


def test_a_package_of_the_system_brings_its_own_units(
    root: Path, installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = root / "usr/lib/systemd/system/agentcgroupd.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    assert run("install", "--root", root) == 1
    assert "systemctl enable --now agentcgroupd" in capsys.readouterr().err
    assert run("uninstall", "--root", root) == 1
    assert "apt-get remove agentcgroup" in capsys.readouterr().err


def test_a_configuration_that_the_daemon_refuses_stops_it(
    root: Path, installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = installation.programs / "agentcg"
    reader.write_text("#!/bin/sh\necho 'pool.cgruop: no such key' >&2\nexit 78\n")
    before = tree(root)
    assert run("install", "--root", root) == 1
    assert capsys.readouterr().err == "agentcg: pool.cgruop: no such key\n"
    assert tree(root) == before


def test_half_an_installation_is_told(
    root: Path, installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(installation.data / "share/agentcgroup")
    assert run("install", "--root", root) == 1
    assert "no whole installation" in capsys.readouterr().err


def test_a_root_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("install", "--root", tmp_path / "none") == 1
    assert "is no directory" in capsys.readouterr().err


@pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="systemd is PID 1 here")
def test_without_systemd_one_sentence(
    installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Installation(Path("/opt/bin"), installation.data)
    assert found.programs
    assert run("install") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1


def test_who_could_change_the_programs_is_told(installation: Installation) -> None:
    installation.programs.chmod(0o777)
    notes = installation.writers()
    assert f"{installation.programs} can be written to by others than root" in notes
    os.chown(installation.programs, 1000, 1000)
    assert f"{installation.programs} belongs to uid 1000, not to root" in installation.writers()


def test_from_this_checkout(root: Path) -> None:
    """The whole program, with the installation that runs the tests."""
    agentcg = Path(sys.executable).parent / "agentcg"
    before = tree(root)
    for _ in range(2):
        done = subprocess.run([agentcg, "install", "--root", root], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    unit = (root / "etc/systemd/system/agentcgroupd.service").read_text()
    assert f"ExecStart={Path(sys.executable).parent}/agentcgroupd" in unit
    done = subprocess.run([agentcg, "uninstall", "--root", root], capture_output=True, text=True)
    assert done.returncode == 0
    assert tree(root) == before


def test_a_daemon_that_was_started_by_hand_is_not_pulled_from_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "RUN", tmp_path)
    install._refuse_running()
    lock = tmp_path / "private/lock"
    lock.parent.mkdir()
    lock.touch()
    install._refuse_running()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(errors.Refused, match="systemd did not start runs"):
            install._refuse_running()


def test_pins_of_pools_that_are_gone_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    cgroups, pins = tmp_path / "cgroups", tmp_path / "pins"
    living = cgroups / "a/pool"
    living.mkdir(parents=True)
    for name in (str(living.stat().st_ino), "1"):
        (pins / name).mkdir(parents=True)
        (pins / name / "map_events_0").touch()
    assert not remove_pins(pins, (cgroups, tmp_path / "none"))
    assert [pool.name for pool in pins.iterdir()] == [str(living.stat().st_ino)]
    living.rmdir()
    assert remove_pins(pins, (cgroups, tmp_path / "none"))
    assert not pins.exists()
    assert not remove_pins(pins, (cgroups,))
