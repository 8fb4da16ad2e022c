"""`agentcg install --docker`: one runtime in Docker's configuration, and all else as it was."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.cli import install_docker, main
from agentcgroup.cli.install_files import PACKAGED, CannotInstall, Installation

HAS = '{\n\t"log-driver": "journald",\n\t"runtimes": {"kata": {"path": "/usr/bin/kata"}}\n}\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root where a package has brought the service, so that Docker is all there is to do."""
    there = tmp_path / "root" / PACKAGED[0]
    there.parent.mkdir(parents=True)
    there.write_text("")
    return tmp_path / "root"


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with the program."""
    made = tmp_path / "opt/bin/agentcg-runtime"
    made.parent.mkdir(parents=True)
    made.write_text("#!/bin/sh\n")
    made.chmod(0o755)
    found = Installation(made.parent, made.parents[1])
    monkeypatch.setattr(Installation, "this", classmethod(lambda cls: found))
    return made


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def config(root: Path, text: str | None = None) -> Path:
    """Docker's file, with a text if one is given."""
    place = root / "etc/docker/daemon.json"
    if text is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return place


def read(root: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(config(root).read_text())
    return value


def test_it_is_made_where_there_is_none_and_gone_again(root: Path, program: Path) -> None:
    (root / "etc").mkdir()
    assert run("install", "--docker", "--root", root) == 0
    assert read(root) == {"runtimes": {"agentcg": {"path": str(program)}}}
    assert stat.S_IMODE(config(root).stat().st_mode) == 0o644
    assert run("uninstall", "--docker", "--root", root) == 0
    assert not config(root).parent.exists()


def test_the_page_shows_what_is_written(root: Path, program: Path) -> None:
    page = Path(__file__).parents[3].joinpath("docs/containers.md").read_text()
    blocks = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (shown,) = (block for block in blocks if '"runtimes"' in block)
    assert run("install", "--docker", "--root", root) == 0
    assert read(root) == json.loads(shown.replace("/opt/agentcgroup/bin", str(program.parent)))


def test_all_else_stays(root: Path, program: Path) -> None:
    place = config(root, HAS)
    place.chmod(0o600)
    assert run("install", "--docker", "--root", root) == 0
    assert read(root) == {
        "log-driver": "journald",
        "runtimes": {"kata": {"path": "/usr/bin/kata"}, "agentcg": {"path": str(program)}},
    }
    assert place.read_text().startswith('{\n\t"log-driver"')
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert run("uninstall", "--docker", "--root", root) == 0
    assert read(root) == json.loads(HAS)


def test_a_second_time_changes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("install", "--docker", "--root", root)
    before = config(root).stat().st_ino
    capsys.readouterr()
    assert run("install", "--docker", "--root", root, "--json") == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file == {"path": str(config(root)), "found": "same"}
    assert config(root).stat().st_ino == before
    assert run("uninstall", "--docker", "--root", root) == 0
    assert run("uninstall", "--docker", "--root", root) == 0


def test_a_program_that_has_moved_is_found_and_its_arguments_stay(
    root: Path, program: Path
) -> None:
    old = {"path": "/old/agentcg-runtime", "runtimeArgs": ["--agentcg-real=/usr/bin/crun"]}
    config(root, json.dumps({"runtimes": {"agentcg": old}}))
    assert run("install", "--docker", "--root", root) == 0
    assert read(root)["runtimes"]["agentcg"] == {**old, "path": str(program)}


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_a_dry_run_touches_nothing(
    root: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config(root, HAS)
    if command == "uninstall":
        run("install", "--docker", "--root", root)
    before = config(root).read_text()
    capsys.readouterr()
    assert run(command, "--docker", "--root", root, "--dry-run") == 0
    assert config(root).read_text() == before
    assert "would be" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "cannot be read"),
        ('{"a": 1, "a": 2}', "there twice"),
        ("[]", "no JSON object"),
        ('{"runtimes": []}', "runtimes is no object"),
        ('{"runtimes": {"agentcg": {"path": "/usr/bin/other"}}}', "another runtime named"),
        ('{"x": "' + "y" * (1 << 20) + '"}', "more than"),
    ],
)
def test_what_is_not_understood_is_left_as_it_is(
    root: Path, text: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config(root, text)
    assert run("install", "--docker", "--root", root) != 0
    assert why in capsys.readouterr().err
    assert config(root).read_text() == text
    assert run("uninstall", "--docker", "--root", root) == 0
    assert config(root).read_text() == text


def test_a_default_that_would_be_missing_goes_as_well(root: Path) -> None:
    run("install", "--docker", "--root", root)
    config(root, json.dumps({**read(root), "default-runtime": "agentcg", "debug": True}))
    assert run("uninstall", "--docker", "--root", root) == 0
    assert read(root) == {"debug": True}


def test_an_installation_without_the_program_is_refused(
    root: Path, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.unlink()
    assert run("install", "--docker", "--root", root) != 0
    assert "agentcg-runtime" in capsys.readouterr().err
    assert not config(root).exists()


def test_what_docker_refuses_is_not_written(
    root: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dockerd = tmp_path / "dockerd"
    dockerd.write_text("#!/bin/sh\necho 'unable to configure: no' >&2\nexit 1\n")
    dockerd.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    place = config(root, HAS)
    change = install_docker.adding(root, program)
    with pytest.raises(CannotInstall, match=r"left as it is: Docker refuses .* no"):
        install_docker.apply(change, check=True)
    assert place.read_text() == HAS and len(list(place.parent.iterdir())) == 1
    dockerd.write_text("#!/bin/sh\nexit 0\n")
    install_docker.apply(change, check=True)
    assert "agentcg" in read(root)["runtimes"]


def test_runtimes_on_the_command_line_and_in_the_file_would_stop_docker(
    monkeypatch: pytest.MonkeyPatch, program: Path
) -> None:
    line = "dockerd --add-runtime=kata=/usr/bin/kata"
    monkeypatch.setattr(install_docker, "_SOURCES", (lambda: iter([line]),))
    with pytest.raises(CannotInstall, match="command line"):
        install_docker.adding(Path("/"), program)


def test_containers_that_have_it_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker = tmp_path / "docker"
    asked = "ls) echo aa; echo bb;; *) echo 'agentcg /web'; echo 'runc /db';;"
    docker.write_text(f"#!/bin/sh\ncase $2 in {asked} esac\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert install_docker.users() == ["web"]
