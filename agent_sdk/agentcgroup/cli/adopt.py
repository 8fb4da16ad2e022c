"""Finding the cgroup that `session adopt` is to make a session of."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from agentcgroup.errors import AgentcgError, NotFound

RUNTIMES = ("docker", "podman")
ASK_S = 10.0
_SHORT_ID = 12
"""Characters of an id that runtimes show."""
_ESCAPE = re.compile(rb"\\([0-7]{3})")


def cgroup_to_adopt(path: str | None, pid: int | None, container: str | None) -> str:
    """Return a cgroup's path below the cgroup2 mount: of a path there or in the file system, of a
    process, or of a container.

    Raises:
        NotFound, InvalidIntent, AgentcgError: there is none, or it cannot be found out.
    """
    if container is not None:
        return _of_container(container)
    if pid is not None:
        return _of_process(pid, "--pid", str(pid))
    return below_the_mount(path or "")


def cgroup2_mount() -> Path:
    """Return where cgroup2 is mounted. Raises AgentcgError."""
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n"):
        mount, _, system = line.partition(b" - ")
        if system.startswith(b"cgroup2 "):
            # The kernel writes blanks of a path as octal escapes (fs/seq_file.c: mangle_path).
            point = _ESCAPE.sub(lambda code: bytes([int(code[1], 8)]), mount.split(b" ")[4])
            return Path(os.fsdecode(point))
    raise AgentcgError("no cgroup2 file system is mounted here (see 'agentcg doctor')")


def below_the_mount(path: str) -> str:
    """Return a path below the cgroup2 mount, whether or not the mount is part of it already."""
    mount = cgroup2_mount()
    try:
        return f"/{Path(os.path.normpath(path)).relative_to(mount)}"
    except ValueError:
        return path


def _of_process(pid: int, option: str, value: str) -> str:
    """Return the cgroup of a process. `option`, `value`: what is at fault where there is none."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_bytes().split(b"\n")
    except OSError:
        raise NotFound(
            f"{option}: {value!r} cannot be used: there is no process {pid}",
            field=option,
            value=value,
            allowed="the pid of a running process",
        ) from None
    for line in lines:
        if line.startswith(b"0::"):
            return os.fsdecode(line[len(b"0::") :])
    raise AgentcgError(f"process {pid} is in no cgroup of cgroup2")


def _of_container(name: str) -> str:
    """Return the cgroup of a container: that of its first process, by asking the runtime, else one
    that has the id in its name."""
    asked = []
    for runtime in RUNTIMES:
        program = shutil.which(runtime)
        if program is not None:
            asked.append(runtime)
            pid = _pid_of(program, name)
            if pid:
                return _of_process(pid, "--container", name)
    found = _by_id(name)
    if len(found) == 1:
        return found[0]
    why = f"neither {' nor '.join(RUNTIMES)} is installed"
    if asked:
        why = (
            f"{' and '.join(asked)} know{'s' * (len(asked) == 1)} no running container of that name"
        )
    why += ", and no cgroup has that id in its name"
    if len(found) > 1:
        why = f"{len(found)} cgroups have that in their names: {', '.join(sorted(found)[:5])}"
    raise NotFound(
        f"--container: {name!r} cannot be used: {why}",
        field="container",
        value=name,
        allowed="the name or id of a running container",
    )


def _pid_of(program: str, name: str) -> int:
    """Return the pid of a container's first process, as its runtime says; 0: it knows none."""
    command = [program, "inspect", "--type", "container", "--", name]
    try:
        done = subprocess.run(command, capture_output=True, timeout=ASK_S, check=False)
        (container,) = json.loads(done.stdout)
        return int(container["State"]["Pid"])
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        return 0


def _by_id(name: str) -> list[str]:
    """Return the cgroups whose name has the id of a container, or its beginning."""
    if len(name) < _SHORT_ID or not all(c in "0123456789abcdef" for c in name.lower()):
        return []
    mount = cgroup2_mount()
    found = []
    for directory, names, _ in os.walk(mount):
        for each in list(names):
            bare = each.removeprefix("docker-").removeprefix("libpod-").removeprefix("crio-")
            if bare.removeprefix("cri-containerd-").startswith(name.lower()):
                found.append(f"/{Path(directory, each).relative_to(mount)}")
                names.remove(each)  # what is below belongs to it
    return found
