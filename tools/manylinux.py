"""Make a wheel that runs on any Linux with a C library that is new enough: a manylinux wheel.

    python -m tools.manylinux [--out DIR] [WHEEL]

Without WHEEL the one of this checkout is built.

auditwheel puts the libelf that libbpf needs beside it, and finds out which tag is true. The
programs themselves are static, and those in bpf/ are for the kernel.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tools import check_wheel

OUT = Path(__file__).resolve().parents[1] / "build/dist"
GLIBC_MOST = (2, 35)
"""Of Ubuntu 22.04, the oldest C library among the distributions in the README."""


class ManylinuxError(Exception):
    """The wheel cannot be made portable; the text says why."""


def repair(wheel: Path, into: Path) -> Path:
    """Write the portable wheel into a directory; returns it. Raises ManylinuxError."""
    scripts = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory(prefix="manylinux-") as work:
        argv = [sys.executable, "-m", "auditwheel", "repair", "-w", work, str(wheel)]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        made = list(Path(work).glob("*.whl"))
        if done.returncode != 0 or len(made) != 1:
            raise ManylinuxError(f"auditwheel: {done.stderr.strip()}")
        version = glibc_of(made[0].name)
        if version > GLIBC_MOST:
            raise ManylinuxError(
                f"{made[0].name} needs a newer C library than {GLIBC_MOST[0]}.{GLIBC_MOST[1]}; "
                "build it on an older system"
            )
        into.mkdir(parents=True, exist_ok=True)
        target = into / made[0].name
        target.write_bytes(made[0].read_bytes())
    return target


def glibc_of(name: str) -> tuple[int, int]:
    """Read the version of the C library from a wheel's name. Raises ManylinuxError."""
    versions = re.findall(r"manylinux_(\d+)_(\d+)_", name)
    if not versions:
        raise ManylinuxError(f"{name} is for no C library in particular")
    return min((int(major), int(minor)) for major, minor in versions)


def build(out: Path) -> Path:
    """Build the wheel of this checkout and make it portable; returns it. Raises ManylinuxError."""
    with tempfile.TemporaryDirectory(prefix="agentcgroup-wheel-") as work:
        try:
            tree = check_wheel.copy_checkout(Path(work) / "tree")
            return repair(check_wheel.build(tree, "wheel"), out)
        except check_wheel.CheckError as error:
            raise ManylinuxError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.manylinux", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="(build/dist)")
    parser.add_argument("wheel", type=Path, nargs="?", metavar="WHEEL")
    arguments = parser.parse_args(argv)
    try:
        out: Path = arguments.out
        print(repair(arguments.wheel, out) if arguments.wheel else build(out))
    except ManylinuxError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
