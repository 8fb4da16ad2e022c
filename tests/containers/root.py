"""A Debian root with container runtimes in it, for the QEMU guest.

    python -m tests.containers.root [SUITE]

prints the directory, which is made once below build/ (100 s, 0.8 GB). It has Docker, containerd,
podman, runc, crun and systemd of the suite, and this machine's Python at the same path, so that the
checkout's virtual environment works in it. Root only.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.guest.vm import CHECKOUT
from tools.debian_suites import find_mirror

SUITES = ("forky", "trixie")
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "kmod", "iproute2", "busybox-static", "procps"),
    *("docker.io", "docker-cli", "docker-buildx", "containerd", "runc", "podman", "crun"),
    "ca-certificates",
    "libelf1t64",
)
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")
PYTHON = Path(sys.base_prefix).resolve()


class RootError(Exception):
    """The root cannot be made; the text says why."""


def ensure(suite: str = SUITES[0]) -> Path:
    """Return the directory of the root of a suite, made if it is not there. Raises RootError."""
    directory = CHECKOUT / "build/containers" / suite
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(f"{suite}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.is_dir():
            new = directory.with_name(f"{suite}.new")
            if new.exists():
                subprocess.run(["rm", "-rf", "--one-file-system", str(new)], check=True)
            _make(suite, new)
            new.rename(directory)
    return directory


def bootstrap(suite: str, directory: Path, packages: Sequence[str]) -> None:
    """Make a root of a suite with these packages. Raises RootError."""
    if shutil.which("mmdebstrap") is None:
        raise RootError("mmdebstrap is not here; try: apt-get install mmdebstrap")
    mirror = find_mirror()
    options = [f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT]
    # A suite that is not released yet is read also when its index is a few weeks old here; the
    # signature is checked all the same.
    for line in (
        'Acquire::Languages "none"',
        'Acquire::Check-Valid-Until "false"',
        'APT::Install-Recommends "false"',
    ):
        options.append(f"--aptopt={line}")
    if mirror.signed_by:
        options.append(f"--keyring={mirror.signed_by}")
    argv = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", *options]
    argv += [f"--include={','.join(packages)}", suite, str(directory), mirror.uris.split()[0]]
    if subprocess.run(argv, check=False).returncode:
        raise RootError(f"mmdebstrap could not make a root of {suite}")


def _make(suite: str, directory: Path) -> None:
    bootstrap(suite, directory, PACKAGES)
    inside = directory / PYTHON.relative_to("/")
    if not inside.exists():
        skip = shutil.ignore_patterns("test", "__pycache__", "site-packages")
        shutil.copytree(PYTHON, inside, symlinks=True, ignore=skip)
        (inside / "lib").mkdir(exist_ok=True)


if __name__ == "__main__":
    try:
        print(ensure(*sys.argv[1:2]))
    except RootError as error:
        sys.exit(f"containers: {error}")
