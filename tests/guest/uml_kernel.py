"""Fetch Debian's user-mode Linux for tests, without installing anything on this machine.

User-mode Linux is a kernel built as a program. Debian's is linked against a C library newer than
this machine may have, so that library comes along. One directory per version in the cache that the
kernels share (tests/guest/kernel.py), moved into place only when whole:

    <cache>/uml/<version>/linux                        the kernel; start it from this directory
    <cache>/uml/<version>/ld.so, lib/                  its dynamic loader and C library
    <cache>/uml/<version>/lib/modules/<release>/       its modules
    <cache>/newest-uml                                 the version in use

Needs only the standard library, because setup runs it before there is a virtual environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.guest.kernel import KernelError, cache_dir, write_atomically
from tools.debian_suites import Apt, Log, SuiteError, find_mirror, locked, twice, unpack

SUITE = "forky"
PACKAGES = ("user-mode-linux", "libc6")
LOADER = b"/lib64/ld-linux-x86-64.so.2\0"
"""The dynamic loader that every x86-64 program names, as the file has it."""
OUR_LOADER = b"./ld.so"


@dataclass(frozen=True, slots=True)
class UmlKernel:
    """A user-mode Linux in the cache."""

    directory: Path

    @property
    def program(self) -> Path:
        """The kernel. Its loader is found from the current directory, which must be `directory`."""
        return self.directory / "linux"

    @property
    def libraries(self) -> Path:
        """Where its loader finds the C library."""
        return self.directory / "lib"

    @property
    def modules(self) -> Path:
        """What the guest sees as /lib/modules/<release>."""
        (modules,) = (self.directory / "lib/modules").iterdir()
        return modules


def cached(cache: Path) -> UmlKernel | None:
    """Return the version in use, or None where there is none."""
    try:
        version = (cache / "newest-uml").read_text().strip()
    except FileNotFoundError:
        return None
    directory = cache / "uml" / version
    return UmlKernel(directory) if (directory / "complete").exists() else None


def ensure(
    *,
    cache: Path | None = None,
    refresh: bool = False,
    log: Log = lambda message: print(message, file=sys.stderr, flush=True),
) -> UmlKernel:
    """Return the user-mode Linux of the cache, fetching it if the cache has none.

    refresh: ask the mirror even where the cache has an answer.
    Raises KernelError.
    """
    cache = cache_dir() if cache is None else cache
    if not refresh and (found := cached(cache)):
        return found
    if os.uname().machine != "x86_64":
        raise KernelError(f"user-mode Linux is x86-64 only; this machine is {os.uname().machine}")
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock-uml", log):
        if not refresh and (found := cached(cache)):
            return found  # another run fetched it while this one waited for the lock
        try:
            return _fetch(cache, log)
        except SuiteError as error:
            raise KernelError(str(error)) from error


def _fetch(cache: Path, log: Log) -> UmlKernel:
    log(f"user-mode Linux: reading the index of {SUITE}")
    # A suite still in the making may have an index past its date on a mirror that lags. Signatures
    # are checked all the same.
    apt = Apt(cache / "apt" / SUITE, SUITE, find_mirror(), check_valid_until=False)
    twice(apt.update, log)
    with tempfile.TemporaryDirectory(dir=cache, prefix="new-") as name:
        work = Path(name)
        log(f"user-mode Linux: downloading {', '.join(PACKAGES)}")
        debs = twice(lambda: apt.download(list(PACKAGES), work), log)
        (version,) = (deb.name.split("_")[1] for deb in debs if deb.name.startswith(PACKAGES[0]))
        log(f"user-mode Linux {version}: unpacking")
        unpack(debs, work / "files")
        whole = work / "uml"
        _assemble(work / "files", whole)
        (whole / "complete").write_text("\n".join(deb.name for deb in debs) + "\n")
        final = cache / "uml" / version
        final.parent.mkdir(exist_ok=True)
        if final.exists():
            shutil.rmtree(final)
        whole.rename(final)
    write_atomically(cache / "newest-uml", version + "\n")
    log(f"user-mode Linux {version}: ready in {final}")
    return UmlKernel(final)


def _assemble(files: Path, into: Path) -> None:
    """Turn unpacked packages into the layout described at the top of this module."""
    (into / "lib").mkdir(parents=True)
    (library,) = files.rglob("libc.so.6")
    shutil.copy(library, into / "lib")
    shutil.copy(library.with_name("ld-linux-x86-64.so.2"), into / "ld.so")
    (files / "usr/lib/uml/modules").rename(into / "lib/modules")
    program = into / "linux"
    program.write_bytes(with_our_loader((files / "usr/bin/linux.uml").read_bytes()))
    for path in (program, into / "ld.so"):
        path.chmod(0o755)


def with_our_loader(program: bytes) -> bytes:
    """Return the program with the loader's path replaced by ./ld.so, which fits in its place.

    To start the loader with the kernel as an argument would not do: the kernel starts itself again
    through /proc/self/exe, and it counts its memory from where its own program ends.
    Raises KernelError for a program that names another loader.
    """
    if program.count(LOADER) != 1:
        raise KernelError("user-mode Linux: its dynamic loader is not the usual one")
    return program.replace(LOADER, OUR_LOADER.ljust(len(LOADER), b"\0"))


def main(argv: list[str] | None = None) -> int:
    """Print the directory of user-mode Linux, after fetching it if need be."""
    parser = argparse.ArgumentParser(prog="python -m tests.guest.uml_kernel", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--refresh", action="store_true", help="ask the mirror again")
    arguments = parser.parse_args(argv)
    try:
        print(ensure(refresh=arguments.refresh).directory)
    except KernelError as error:
        print(f"uml: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
