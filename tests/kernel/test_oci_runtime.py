"""The wrapper around an OCI runtime, and the hook, on real cgroups; the test is the runtime."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.harness import EXEC

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PROGRAM = Path(EXEC).with_name("agentcg-runtime")
REAL = """#!/bin/sh
# A runtime: says what it was asked, and on `create` makes a container with a process in it.
echo "$0 $*" >>{log}
case " $* " in *" create "*) ;; *) exit {status} ;; esac
[ {status} = 0 ] || exit {status}
sleep 1000 </dev/null >/dev/null 2>&1 &
echo $! >{cgroup}/cgroup.procs
for each in {more}; do echo $each >{cgroup}/cgroup.procs; done
echo $! >{pid_file}
"""


@dataclass
class Place:
    """A container's cgroup, and the runtime that puts a process into it."""

    cgroup: Cgroup
    directory: Path

    @property
    def pid_file(self) -> Path:
        return self.directory / "pid"

    def real(self, status: int = 0, more: str = "") -> Path:
        path = self.directory / "real"
        path.write_text(
            REAL.format(
                log=self.directory / "log",
                cgroup=self.cgroup.path,
                pid_file=self.pid_file,
                status=status,
                more=more,
            )
        )
        path.chmod(0o755)
        return path

    def run(self, *arguments: str, status: int = 0, more: str = "") -> int:
        option = f"--agentcg-real={self.real(status, more)}"
        return subprocess.run([str(PROGRAM), option, *arguments], check=False).returncode

    def create(self, status: int = 0, more: str = "") -> int:
        options = ("--root", "/r", "create", "--bundle", "/b", "--pid-file", str(self.pid_file))
        return self.run(*options, "name", status=status, more=more)

    def placed(self) -> str:
        pid = int(self.pid_file.read_text())
        path = Path(f"/proc/{pid}/cgroup").read_text().rpartition("0::")[2].strip()
        return path.removeprefix(f"/{self.cgroup.path.name}")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    cgroup = Cgroup.open(made.path)
    yield Place(cgroup, tmp_path)
    cgroup.kill_and_remove()
    cgroup.close()
    root.close()


def test_a_container_that_was_made_is_split(place: Place) -> None:
    assert place.create() == 0
    assert place.placed() == "/agent" and place.cgroup.procs() == ()
    (line,) = (place.directory / "log").read_text().splitlines()
    assert line.endswith(f"--root /r create --bundle /b --pid-file {place.pid_file} name")


def test_other_commands_are_the_runtimes_own(place: Place) -> None:
    assert place.run("--root", "/r", "start", "create", status=3) == 3
    assert place.run("state", "name") == 0
    assert list(place.cgroup.children()) == []
    assert len((place.directory / "log").read_text().splitlines()) == 2


def test_a_runtime_that_fails_fails(place: Place) -> None:
    assert place.create(status=7) == 7
    assert list(place.cgroup.children()) == []
    missing = subprocess.run([str(PROGRAM), "--agentcg-real=/no/such", "state"], check=False)
    assert missing.returncode == 127


def test_a_cgroup_with_others_in_it_is_let_alone(place: Place) -> None:
    """A container without a cgroup of its own is in that of whoever started it."""
    other = subprocess.Popen(["sleep", "1000"])
    try:
        assert place.create(more=str(other.pid)) == 0
        assert place.placed() == "" and list(place.cgroup.children()) == []
    finally:
        other.kill()
        other.wait()


def test_a_cgroup_that_is_split_already_is_let_alone(place: Place) -> None:
    place.cgroup.make_child("agent")
    assert place.create() == 0
    assert place.placed() == ""


@pytest.mark.parametrize(
    "more",
    [{}, {"annotations": {"pid": "1", "a": '"pid":1', "b": "\\"}}, {"bundle": "/" + "x" * 5000}],
)
def test_the_hook_splits_the_container_that_it_is_told_of(
    place: Place, more: dict[str, object]
) -> None:
    process = subprocess.Popen(["sleep", "1000"])
    place.cgroup.attach(process.pid)
    place.pid_file.write_text(str(process.pid))
    state = json.dumps({"ociVersion": "1.2.0", **more, "id": "x", "pid": process.pid})
    subprocess.run([str(PROGRAM), "--hook"], input=state.encode(), check=True)
    assert place.placed() == "/agent"
    process.kill()
    process.wait()


@pytest.mark.parametrize("state", [b"", b"{}", b'{"pid": "7"}', b'{"pid": 4194304}', b"\0" * 70000])
def test_a_state_without_a_container_is_no_failure(place: Place, state: bytes) -> None:
    done = subprocess.run([str(PROGRAM), "--hook"], input=state, check=False)
    assert done.returncode == 0
