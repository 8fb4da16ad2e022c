"""Find what bpf/ is built with: clang, and libbpf's headers and library.

    python -m tools.bpf_toolchain missing   Debian packages that the build lacks, one a line
    python -m tools.bpf_toolchain libbpf    find libbpf or fetch it into build/libbpf; prints where

Clang is the system's. So is libbpf where it is new enough; else it comes from the backports of
this Debian, and nothing is installed. Needs only the standard library, because setup asks first.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.debian_suites import Apt, Log, SuiteError, find_mirror, locked, twice, unpack

CLANG_LEAST = 16
CLANG_TESTED = 19
"""Preferred to any other: whether the verifier accepts a program depends on its compiler."""
LIBBPF_LEAST = (1, 4)
"""The daemon's own minimum, LEAST_VERSION in agentcgroupd/bpf/libbpf.py."""
LIBBPF_CACHE = Path(__file__).parents[1] / "build/libbpf"
MULTIARCH = f"{os.uname().machine}-linux-gnu"


class ToolchainError(Exception):
    """A tool of the build is missing; the text says what to install."""


# --- clang ---------------------------------------------------------------------------------------


def find_clang(environ: Mapping[str, str] = os.environ) -> str:
    """Return the clang to use: $CLANG, or one in PATH that is new enough. Raises ToolchainError."""
    if chosen := environ.get("CLANG"):
        version = clang_version(chosen)
        if version is None:
            raise ToolchainError(f"CLANG={chosen}: there is no clang of this name")
        if version < CLANG_LEAST:
            raise ToolchainError(
                f"CLANG={chosen} is clang {version}; bpf/ needs {CLANG_LEAST} or later"
            )
        return chosen
    numbers = {
        int(path.name.removeprefix("clang-"))
        for directory in environ.get("PATH", os.defpath).split(os.pathsep)
        for path in Path(directory).glob("clang-*")
        if re.fullmatch(r"clang-\d+", path.name)
    }
    others = [f"clang-{number}" for number in sorted(numbers, reverse=True)]
    for name in (f"clang-{CLANG_TESTED}", "clang", *others):
        path = shutil.which(name, path=environ.get("PATH"))
        if path and (clang_version(path) or 0) >= CLANG_LEAST:
            return path
    raise ToolchainError(
        f"bpf/ is compiled by clang {CLANG_LEAST} or later, and there is none: please install one "
        f"(Debian: clang-{CLANG_TESTED}), or set CLANG to its path"
    )


def clang_version(clang: str) -> int | None:
    """Return the major version of a clang; None for what is not clang, or not there."""
    match = re.search(r"clang version (\d+)", _output(clang, "--version"))
    return int(match[1]) if match else None


# --- libbpf --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Libbpf:
    """Files of a libbpf.

    include: holds bpf/*.h. library: the shared library or a link to it. licence: the terms that go
    with every copy of the library.
    """

    include: Path
    library: Path
    licence: Path

    @classmethod
    def at(cls, include: Path, libraries: Iterable[Path], licences: Iterable[Path]) -> Libbpf:
        """Return the first of each that is there. Raises ToolchainError."""
        header = include / "bpf/libbpf_version.h"
        try:
            text = header.read_text()
        except OSError as error:
            raise ToolchainError(f"{header}: {error.strerror}") from error
        found = [re.search(rf"LIBBPF_{part}_VERSION (\d+)", text) for part in ("MAJOR", "MINOR")]
        version = tuple(int(match[1]) for match in found if match)
        if version < LIBBPF_LEAST:
            raise ToolchainError(f"{header} is version {_dotted(version)}")
        library = next((path for path in libraries if path.exists()), None)
        if library is None:
            raise ToolchainError(f"libbpf.so.1 is not with {header}")
        # Headers and library may be of different versions: the file behind the link tells its own.
        match = re.fullmatch(r"libbpf\.so\.(\d+)\.(\d+).*", library.resolve().name)
        if match and (int(match[1]), int(match[2])) < LIBBPF_LEAST:
            raise ToolchainError(f"{library} is version {match[1]}.{match[2]}")
        licence = next((path for path in licences if path.exists()), None)
        if licence is None:
            raise ToolchainError(f"{library} came without its licence, so it cannot be passed on")
        return cls(include, library, licence)


def ensure_libbpf(cache: Path = LIBBPF_CACHE, log: Log | None = None) -> Libbpf:
    """Return the system's libbpf, or the one in `cache`, fetched if need be.

    Raises:
        ToolchainError: there is none; the text says what to install.
    """
    log = log or (lambda message: print(f"libbpf: {message}", file=sys.stderr, flush=True))
    try:
        return find_libbpf(cache)
    except ToolchainError as error:
        why = str(error)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with locked(cache.parent / "libbpf.lock", log):
            try:
                return _in_directory(cache)  # another run may have fetched it in the meantime
            except ToolchainError:
                _fetch(cache, log)
        return _in_directory(cache)
    except (SuiteError, ToolchainError) as error:
        raise ToolchainError(
            f"bpf/ needs libbpf {_dotted(LIBBPF_LEAST)} or later: please install it with its "
            f"headers (Debian: libbpf-dev). Looked for here: {why}. Fetching it failed: {error}"
        ) from error


def find_libbpf(cache: Path = LIBBPF_CACHE) -> Libbpf:
    """Return the system's libbpf or the one in `cache`.

    Raises:
        ToolchainError: there is none that is new enough; the text says what was looked at.
    """
    reasons = []
    for include, libraries in _system_places():
        try:
            return Libbpf.at(include, libraries, _system_licences())
        except ToolchainError as error:
            reasons.append(str(error))
    try:
        return _in_directory(cache)
    except ToolchainError as error:
        reasons.append(str(error))
    raise ToolchainError("; ".join(reasons))


def _in_directory(directory: Path) -> Libbpf:
    """Return the libbpf in a directory that is laid out as the cache."""
    return Libbpf.at(
        directory / "include", [directory / "lib/libbpf.so.1"], [directory / "LICENSE"]
    )


def _system_places() -> Iterator[tuple[Path, list[Path]]]:
    """Yield pairs of an include directory and where the library of those headers may be."""
    include = _output("pkg-config", "--variable=includedir", "libbpf").strip()
    library = _output("pkg-config", "--variable=libdir", "libbpf").strip()
    if include and library:
        yield Path(include), [Path(library) / "libbpf.so.1"]
        return
    for prefix in (Path("/usr/local"), Path("/usr")):
        directories = [f"lib/{MULTIARCH}", "lib64", "lib"]
        yield prefix / "include", [prefix / name / "libbpf.so.1" for name in directories]


def _system_licences() -> list[Path]:
    """Return where distributions may have put the licence: Debian first, then the others."""
    share = Path("/usr/share")
    return [
        *sorted(share.glob("doc/libbpf[0-9]*/copyright")),
        *sorted(share.glob("licenses/libbpf*/LICENSE*")),
    ]


def _fetch(into: Path, log: Log) -> None:
    """Lay out the backported packages' files in `into`. Raises SuiteError, ToolchainError."""
    try:
        codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    except (OSError, KeyError) as error:
        raise ToolchainError("not a Debian release") from error
    suite = f"{codename}-backports"
    with tempfile.TemporaryDirectory(dir=into.parent, prefix="libbpf-") as name:
        work = Path(name)
        apt = Apt(work / "apt", suite, find_mirror())
        log(f"the system has none that is new enough; fetching it from {suite}")
        twice(apt.update, log)
        packages = twice(lambda: apt.download(["libbpf1", "libbpf-dev"], work), log)
        unpack(packages, work / "files")
        usr, whole = work / "files/usr", work / "whole"
        (whole / "lib").mkdir(parents=True)
        try:
            shutil.copytree(usr / "include/bpf", whole / "include/bpf")
            shutil.copy(usr / f"lib/{MULTIARCH}/libbpf.so.1", whole / "lib")
            shutil.copy(usr / "share/doc/libbpf1/copyright", whole / "LICENSE")
        except FileNotFoundError as error:
            raise ToolchainError(f"the packages of {suite} lack {error.filename}") from error
        _in_directory(whole)
        if into.exists():
            shutil.rmtree(into)
        whole.rename(into)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _output(*argv: str) -> str:
    """Return what a program prints; empty where there is no such program, or where it fails."""
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


# --- what setup installs -------------------------------------------------------------------------


def missing_packages(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Name the Debian packages that hold what is missing, under their names in this release."""
    missing = []
    if not environ.get("CLANG"):  # a chosen clang is not replaced
        try:
            find_clang(environ)
        except ToolchainError:
            missing.append(clang_package(_output("apt-cache", "pkgnames", "clang").split()))
    include = Path("/usr/include")
    asm = [include / "asm/types.h", include / MULTIARCH / "asm/types.h"]
    if not (include / "linux/bpf.h").exists() or not any(path.exists() for path in asm):
        missing.append("linux-libc-dev")
    if not _loads("libelf.so.1"):
        names = _output("apt-cache", "pkgnames", "libelf1").split()
        missing.append("libelf1t64" if "libelf1t64" in names else "libelf1")
    if not _loads("libz.so.1"):
        missing.append("zlib1g")
    try:
        find_libbpf()
    except ToolchainError:
        if libbpf_is_offered(_output("apt-cache", "policy", "libbpf-dev")):
            missing.append("libbpf-dev")
    return missing


def clang_package(names: Iterable[str]) -> str:
    """Choose among package names the one with the clang that find_clang() would take."""
    matches = (re.fullmatch(r"clang-(\d+)", name) for name in names)
    numbers = sorted(int(match[1]) for match in matches if match)
    if CLANG_TESTED in numbers:
        return f"clang-{CLANG_TESTED}"
    return f"clang-{numbers[-1]}" if numbers and numbers[-1] >= CLANG_LEAST else "clang"


def libbpf_is_offered(policy: str) -> bool:
    """Say whether `apt-cache policy libbpf-dev` has a candidate that is new enough."""
    match = re.search(r"Candidate: (?:\d+:)?(\d+)\.(\d+)", policy)
    return match is not None and (int(match[1]), int(match[2])) >= LIBBPF_LEAST


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Run one of the two commands at the top of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.bpf_toolchain", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=["missing", "libbpf"])
    arguments = parser.parse_args(argv)
    if arguments.command == "missing":
        print("".join(f"{name}\n" for name in missing_packages()), end="")
        return 0
    try:
        print(ensure_libbpf().library)
    except ToolchainError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
