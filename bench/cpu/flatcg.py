"""scx_flatcg, the scheduler to be compared with: from Debian's kernel source, by that source's own
makefile and with its own program, built for the run into build/flatcg.

Needs the network once (the source package is 160 MB), clang, a C compiler and make; nothing is
installed. The kernel's types come from the test kernel's own image.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Self

from agentcgroupd.bpf.sched import running
from bench.report import ROOT
from tools.bpf_toolchain import MULTIARCH, find_clang
from tools.debian_suites import Apt, find_mirror, unpack

BUILD = ROOT / "build/flatcg"
SUITE = "trixie-backports"
"""The release that the test kernel comes from."""
ATTACH_S, END_S = 60, 30
ENDED = "unregistered from user space"
"""The scheduler's last words, after EXIT:, when it was told to end."""


class Ejected(Exception):
    """The kernel let go of it, or it did not start; the text has its own words for why."""


def program(release: str) -> Path:
    """Path of the scheduler's program for a kernel, built or not. `release`: as `uname -r` says
    it."""
    return BUILD / f"scx_flatcg-{release}"


def build(vmlinux: Path, release: str) -> Path:
    """The program for a kernel image; made once.
    Raises SuiteError, ToolchainError, CalledProcessError."""
    made = program(release)
    if made.exists():
        return made
    BUILD.mkdir(parents=True, exist_ok=True)
    version = ".".join(release.split(".")[:2])
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        work = Path(directory)
        tools = _fetch(work, version)
        (work / "out").mkdir()
        variables = {
            "O": work / "out",
            "CLANG": find_clang(),
            "BPFTOOL": work / "usr/sbin/bpftool",
            "VMLINUX_BTF": vmlinux,
        }
        argv = ["make", "-C", f"{tools}/sched_ext", "scx_flatcg"]
        argv += [f"{name}={value}" for name, value in variables.items()]
        # Not the whole environment: a make that called us would pass its own flags on.
        env = {
            "PATH": os.environ["PATH"],
            "C_INCLUDE_PATH": f"{work}/usr/include:{work}/usr/include/{MULTIARCH}",
            "LIBRARY_PATH": f"{work}/lib",
        }
        log = BUILD / "make.log"
        with log.open("wb") as file:
            subprocess.run(argv, stdout=file, stderr=file, env=env, check=True)
        (work / "out/build/bin/scx_flatcg").rename(made)
    return made


def _fetch(work: Path, version: str) -> Path:
    """Lay out below `work`: usr/ with headers and bpftool, lib/ to link with. Returns the tools/ of
    the kernel's source."""
    packages = work / "deb"
    packages.mkdir()
    # Of this machine's release, to fit its libraries; its own bpftool may be too old to know
    # struct_ops in skeletons.
    subprocess.run(
        ["apt-get", "-q", "download", "libelf-dev", "zlib1g-dev"],
        cwd=packages,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    for suite, name in ((f"{codename}-backports", "bpftool"), (SUITE, f"linux-source-{version}")):
        apt = Apt(BUILD / f"apt-{suite}", suite, find_mirror())
        apt.update()
        apt.download([name], packages)
    unpack(packages.glob("*.deb"), work)
    (work / "lib").mkdir()
    for name in ("libelf.so", "libz.so"):
        # The packages' links point to what is not unpacked beside them.
        (work / "lib" / name).symlink_to(f"/usr/lib/{MULTIARCH}/{name}.1")
    source = f"linux-source-{version}"
    archive = work / f"usr/src/{source}.tar.xz"
    wanted = [f"{source}/tools", f"{source}/scripts/bpf_doc.py"]
    subprocess.run(["tar", "-xJf", archive, "-C", work, *wanted], check=True)
    shutil.rmtree(packages)
    return work / source / "tools"


def last_words(text: str) -> str:
    """Why it ended, from what it printed."""
    found = re.findall(r"^EXIT: (.*)$", text, re.MULTILINE)
    return found[-1] if found else text.strip()[-300:] or "it said nothing"


class Flatcg:
    """The scheduler, attached for the length of a `with`; raises Ejected at the end of one that it
    did not last for."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [program(os.uname().release)], stdout=subprocess.DEVNULL, stderr=self._said
        )
        deadline = time.monotonic() + ATTACH_S
        while not running().startswith("flatcg"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise Ejected(self._end())
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        why = self._end()
        if why != ENDED and (error is None or isinstance(error, OSError)):
            # Once it has failed, the kernel lets nobody make cgroups until it is gone.
            raise Ejected(why) from error

    def _end(self) -> str:
        """Tell it to end; returns its last words."""
        assert self._process is not None and self._said is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.seek(0)
        with self._said:
            return last_words(self._said.read().decode(errors="replace"))
