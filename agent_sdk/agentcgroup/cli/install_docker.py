"""Docker's configuration: our runtime in it, and nothing else of it changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .install_files import CannotInstall, Found, below

CONFIG = Path("/etc/docker/daemon.json")
NAME = "agentcg"
PROGRAM = "agentcg-runtime"
BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of Docker's configuration."""

    place: Path
    """The file itself, where a link points to it."""
    found: Found
    content: bytes | None
    """What it will be; None: there will be no file."""


def adding(root: Path, program: Path) -> Change:
    """Have Docker know our runtime, `program`. Raises CannotInstall where that could break what is
    there."""
    if root == Path("/"):
        _refuse_flag()
    if not os.access(program, os.X_OK):
        raise CannotInstall(
            f"{program} is no program: this is no whole installation of agentcgroup"
        )
    place, text, config = _read(root)
    runtimes = config.setdefault("runtimes", {})
    if not isinstance(runtimes, dict):
        raise CannotInstall(f"{place}: runtimes is no object; it is left as it is")
    ours = runtimes.get(NAME)
    if ours is not None and not _is_ours(ours):
        raise CannotInstall(f"{place} has another runtime named {NAME}; it is left as it is")
    if isinstance(ours, dict) and ours.get("path") == str(program):
        return Change(place, "same", text)
    kept = ours if isinstance(ours, dict) else {}  # its arguments may be the operator's
    runtimes[NAME] = {**kept, "path": str(program)}
    return Change(place, "new" if text is None else "changed", _written(config, text))


def removing(root: Path) -> Change | None:
    """Have Docker forget our runtime; None: it does not know it. A file that cannot be read is left
    as it is."""
    try:
        place, text, config = _read(root)
    except CannotInstall:
        return None
    runtimes = config.get("runtimes")
    if not isinstance(runtimes, dict) or not _is_ours(runtimes.get(NAME)):
        return None
    del runtimes[NAME]
    if not runtimes:
        del config["runtimes"]
    if config.get("default-runtime") == NAME:  # Docker would not start without it
        del config["default-runtime"]
    return Change(place, "changed", _written(config, text) if config else None)


def apply(change: Change, *, check: bool) -> None:
    """Write the configuration, whole or not at all. `check`: have Docker read it first, if it is
    here. Raises CannotInstall, and nothing is changed then; OSError."""
    place = change.place
    if change.content is None:
        place.unlink(missing_ok=True)
        if place.parent.is_dir() and not any(place.parent.iterdir()):
            place.parent.rmdir()
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(f".{place.name}.new")
    new.unlink(missing_ok=True)
    try:
        new.write_bytes(change.content)
        if place.exists():
            before = place.stat()
            os.chown(new, before.st_uid, before.st_gid)
            new.chmod(before.st_mode & 0o7777)
        else:
            new.chmod(0o644)
        if check:
            _validate(new, place)
        new.replace(place)
    finally:
        new.unlink(missing_ok=True)


def reload() -> bool:
    """Have a Docker that runs read its configuration again; containers go on. Returns whether it
    runs."""
    for verb in ("is-active", "reload"):
        argv = ["systemctl", "--quiet", verb, "docker.service"]
        if subprocess.run(argv, capture_output=True, check=False).returncode:
            return False
    return True


def users() -> list[str]:
    """Names of the containers that Docker starts by our runtime, as far as it answers."""
    docker = shutil.which("docker")
    if docker is None:
        return []
    listed = _say([docker, "container", "ls", "--all", "--quiet", "--no-trunc"]).split()
    if not listed:
        return []
    form = "{{.HostConfig.Runtime}} {{.Name}}"
    lines = _say([docker, "container", "inspect", "--format", form, *listed]).split("\n")
    found = [line.partition(" ") for line in lines]
    return sorted(name.lstrip("/") for runtime, _, name in found if runtime == NAME)


def _say(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _read(root: Path) -> tuple[Path, bytes | None, dict[str, Any]]:
    """The file, its text (None: there is none) and its objects. Raises CannotInstall."""
    place = below(root, CONFIG)
    if root == Path("/"):
        place = place.resolve()  # a link stays one
    try:
        text = place.read_bytes()
    except FileNotFoundError:
        return place, None, {}
    except OSError as error:
        raise CannotInstall(f"{place}: {error.strerror}") from error
    if len(text) > BYTES_MAX:
        raise CannotInstall(f"{place} has more than {BYTES_MAX:,} bytes; it is left as it is")
    if not text.strip():
        return place, text, {}
    try:
        config = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise CannotInstall(f"{place} cannot be read, and is left as it is: {error}") from error
    if not isinstance(config, dict):
        raise CannotInstall(f"{place} is no JSON object; it is left as it is")
    return place, text, config


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are different; of two, one would be lost."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def _written(config: dict[str, Any], before: bytes | None) -> bytes:
    """The text of a configuration, indented as it was."""
    found = re.search(rb"^\{\s*\n([ \t]+)", before or b"")
    indent = found[1].decode() if found else "  "
    return (json.dumps(config, indent=indent, ensure_ascii=False) + "\n").encode()


def _is_ours(runtime: object) -> bool:
    return isinstance(runtime, dict) and Path(str(runtime.get("path"))).name == PROGRAM


def _validate(new: Path, place: Path) -> None:
    """Have Docker check a configuration. Raises CannotInstall where it refuses it."""
    dockerd = shutil.which("dockerd")
    if dockerd is None:
        return
    argv = [dockerd, "--validate", f"--config-file={new}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise CannotInstall(f"{place} is left as it is: Docker refuses what it would be: {said}")


def _refuse_flag() -> None:
    """Raise CannotInstall where Docker is given runtimes on its command line: with some in the
    file as well it does not start."""
    if any("--add-runtime" in line for read in _SOURCES for line in read()):
        raise CannotInstall(
            f"Docker is given --add-runtime on its command line, and refuses to have runtimes in "
            f"{CONFIG} as well; add one there: --add-runtime={NAME}=PATH/{PROGRAM}"
        )


def _of_processes() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_bytes() == b"dockerd\n":
                yield (
                    (process / "cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode("utf-8", "replace")
                )
        except OSError:
            continue


def _of_unit() -> Iterator[str]:
    if shutil.which("systemctl") is not None:
        yield _say(["systemctl", "show", "--property=ExecStart", "docker.service"])


_SOURCES: tuple[Callable[[], Iterator[str]], ...] = (_of_processes, _of_unit)
