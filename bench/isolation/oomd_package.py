"""Fetch Meta's oomd for the benchmark `isolation`: python -m bench.isolation.oomd_package

Debian's package and the libraries it needs are downloaded by apt, which checks them against the
signed index, and unpacked into build/bench-oomd; nothing is installed. Its own loader and libc come
along, so that the folder also runs on a machine with other versions, or without a network.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report import ROOT
from tools.debian_suites import Apt, Log, SuiteError, find_mirror, locked, twice, unpack

INTO = ROOT / "build/bench-oomd"
SUITE = "bookworm"
PACKAGES = tuple(
    "oomd libjsoncpp25 libsystemd0 libcap2 libgcrypt20 libgpg-error0 liblzma5 libzstd1 liblz4-1"
    " libstdc++6 libgcc-s1 libc6".split()
)
"""Packages of SUITE: oomd and all that it is linked with, directly or not."""
_LAUNCHER = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
exec "$here"/lib/ld-linux-*.so.* --library-path "$here/lib" "$here/bin/oomd" "$@"
"""


def say(line: str) -> None:
    """Print progress as it happens."""
    print(f"oomd: {line}", file=sys.stderr, flush=True)


def ensure(into: Path = INTO, log: Log = say) -> Path:
    """Return the program's path, after fetching it if need be. Raises SuiteError with what to
    do."""
    program = into / "oomd"
    into.parent.mkdir(parents=True, exist_ok=True)
    if program.exists():
        return program
    with locked(into.with_name(f"{into.name}.lock"), log):
        if not program.exists():
            _fetch(into, log)
    return program


def _fetch(into: Path, log: Log) -> None:
    with tempfile.TemporaryDirectory(prefix="agentcg-oomd-") as directory:
        work = Path(directory)
        apt = Apt(work / "apt", SUITE, find_mirror())
        log(f"reading the index of {SUITE}")
        twice(apt.update, log)
        log(f"fetching {len(PACKAGES)} packages")
        packages = twice(lambda: apt.download(list(PACKAGES), work), log)
        unpack(packages, work / "files")
        ready = into.with_name(f".{into.name}.new")
        shutil.rmtree(ready, ignore_errors=True)
        _arrange(work / "files", ready)
        version = subprocess.run([ready / "oomd", "--version"], capture_output=True, text=True)
        if version.returncode:
            raise SuiteError(f"the unpacked oomd does not run: {version.stderr.strip()}")
        (ready / "packages").write_text("".join(f"{path.name}\n" for path in packages))
        ready.rename(into)
        log(f"{version.stdout.strip()} in {into}")


def _arrange(files: Path, into: Path) -> None:
    """Keep only what runs: the program, and each library under the name that it is looked for
    by."""
    (into / "bin").mkdir(parents=True)
    (into / "lib").mkdir()
    shutil.copy2(files / "usr/bin/oomd", into / "bin/oomd")
    for pattern in ("lib/*-linux-gnu/*.so*", "usr/lib/*-linux-gnu/*.so*"):
        for library in files.glob(pattern):
            shutil.copy2(library, into / "lib" / library.name)
    launcher = into / "oomd"
    launcher.write_text(_LAUNCHER)
    launcher.chmod(0o755)


def main() -> int:
    """Fetch it; returns the exit status."""
    try:
        print(ensure())
    except SuiteError as error:
        say(f"cannot be fetched from {SUITE}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
