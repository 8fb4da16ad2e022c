"""Fetch a Debian kernel for the test guest, without installing anything on this machine.

Kernels live in a cache outside every checkout, one directory per release, each moved into place
only when whole:

    <cache>/kernels/<release>/vmlinux                    unpacked image: QEMU starts it 1.5 s sooner
    <cache>/kernels/<release>/lib/modules/<release>/     uncompressed modules, with depmod's indexes
    <cache>/newest                                       the release that "newest" stands for here

Needs only the standard library, because setup runs it before there is a virtual environment.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools.debian_suites import Apt, Log, SuiteError, find_mirror, locked, twice, unpack

NEWEST = "newest"
META_PACKAGE = "linux-image-cloud-amd64"
# Searched in this order: backports has the newest kernels, the suite itself the long-term one.
SUITES = ("trixie-backports", "trixie")

# Debian splits a kernel into several packages since 7.x; before, linux-image-* held everything.
_PART = re.compile(r"linux-(?:image|binary|modules|base)-(\d\S*-cloud-amd64)$")
_SPEC = re.compile(r"\d+(?:\.\d+)*$")


class KernelError(Exception):
    """A kernel could not be found, fetched or unpacked; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in the cache."""

    release: str
    directory: Path

    @property
    def vmlinux(self) -> Path:
        """The unpacked ELF image."""
        return self.directory / "vmlinux"

    @property
    def modules(self) -> Path:
        """What the guest sees as /lib/modules/<release>."""
        return self.directory / "lib/modules" / self.release


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where kernels are kept: $AGENTCG_GUEST_DIR, else below the user's cache directory."""
    if chosen := environ.get("AGENTCG_GUEST_DIR"):
        return Path(chosen).absolute()
    base = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "agentcgroup/guest"


def ensure(
    spec: str = NEWEST,
    *,
    cache: Path | None = None,
    refresh: bool = False,
    log: Log = lambda message: print(message, file=sys.stderr, flush=True),
) -> Kernel:
    """Return the kernel that `spec` names, fetching it if the cache lacks it.

    spec: "newest", or the start of a version ("6.12", "7.3.4"); of several, the latest counts.
    refresh: ask the mirror even where the cache has an answer.
    Raises KernelError.
    """
    if spec != NEWEST and not _SPEC.match(spec):
        raise KernelError(
            f"kernel {spec!r}: expected '{NEWEST}' or a version such as 6.12 or 7.3.4"
        )
    cache = cache_dir() if cache is None else cache
    if not refresh and (found := cached(cache, spec)):
        return found
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock", log):
        if not refresh and (found := cached(cache, spec)):
            return found  # another run fetched it while this one waited for the lock
        try:
            kernel = _fetch(cache, spec, log)
        except SuiteError as error:
            raise KernelError(str(error)) from error
        if spec == NEWEST:
            write_atomically(cache / "newest", kernel.release + "\n")
        return kernel


def cached(cache: Path, spec: str) -> Kernel | None:
    """The cached kernel for `spec`, or None."""
    if spec == NEWEST:
        try:
            release = (cache / "newest").read_text().strip()
        except FileNotFoundError:
            return None
        directory = cache / "kernels" / release
        return Kernel(release, directory) if (directory / "complete").exists() else None
    done = [path.parent for path in (cache / "kernels").glob("*/complete")]
    best = latest(spec, [path.name for path in done])
    return Kernel(best, cache / "kernels" / best) if best else None


def latest(spec: str, releases: Iterable[str]) -> str | None:
    """The highest of `releases` whose version starts with `spec`, component by component."""
    wanted = version_key(spec)
    fitting = [name for name in releases if version_key(name)[: len(wanted)] == wanted]
    return max(fitting, key=version_key, default=None)


def version_key(release: str) -> tuple[int, ...]:
    """`7.3.4+deb13-cloud-amd64` -> (7, 3, 4)."""
    match = re.match(r"\d+(?:\.\d+)*", release)
    if match is None:
        raise KernelError(f"{release!r} does not start with a kernel version")
    return tuple(int(part) for part in match.group().split("."))


# --- packages ----------------------------------------------------------------------------------


def parts_of(package: str, depends: Callable[[str], list[str]]) -> list[str]:
    """The packages that together hold the kernel of `package`, itself or a metapackage."""
    found: list[str] = []
    todo, seen = [package], {package}
    while todo:
        name = todo.pop()
        if _PART.match(name):
            found.append(name)
        for other in depends(name):
            if other not in seen and (_PART.match(other) or other.startswith("linux-image-")):
                seen.add(other)
                todo.append(other)
    return sorted(found)


# --- fetching and unpacking --------------------------------------------------------------------


def _fetch(cache: Path, spec: str, log: Log) -> Kernel:
    if os.uname().machine != "x86_64":
        raise KernelError(f"the guest is x86-64 only; this machine is {os.uname().machine}")
    mirror = find_mirror()
    for suite in SUITES[:1] if spec == NEWEST else SUITES:
        log(f"kernel {spec}: reading the index of {suite}")
        apt = Apt(cache / "apt" / suite, suite, mirror)
        twice(apt.update, log)
        packages = _choose(apt, spec)
        if packages:
            return _obtain(cache, apt, packages, log)
    raise KernelError(f"no cloud kernel {spec} in {', '.join(SUITES)}")


def _choose(apt: Apt, spec: str) -> list[str]:
    if spec == NEWEST:
        return parts_of(META_PACKAGE, apt.depends)
    names = apt.names("linux-image-")
    matches = (re.fullmatch(r"linux-image-(\d\S*-cloud-amd64)", name) for name in names)
    release = latest(spec, [match[1] for match in matches if match])
    return parts_of(f"linux-image-{release}", apt.depends) if release else []


def _obtain(cache: Path, apt: Apt, packages: list[str], log: Log) -> Kernel:
    match = _PART.match(packages[0])
    if match is None:
        raise KernelError(f"{packages[0]} is not a kernel package")
    release = match[1]
    final = cache / "kernels" / release
    if (final / "complete").exists():
        return Kernel(release, final)
    final.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="new-") as name:
        work = Path(name)
        log(f"kernel {release}: downloading {', '.join(packages)}")
        debs = twice(lambda: apt.download(packages, work), log)
        log(f"kernel {release}: unpacking")
        unpack(debs, work / "files")
        whole = work / "kernel"
        _assemble(work / "files", release, whole)
        (whole / "complete").write_text("\n".join(deb.name for deb in debs) + "\n")
        if final.exists():
            shutil.rmtree(final)
        whole.rename(final)
    log(f"kernel {release}: ready in {final}")
    return Kernel(release, final)


def _assemble(files: Path, release: str, into: Path) -> None:
    """Turn unpacked packages into the layout described at the top of this module."""
    trees = [files / prefix / "lib/modules" / release for prefix in ("usr", ".")]
    modules = next((tree for tree in trees if (tree / "kernel").is_dir()), None)
    if modules is None:
        raise KernelError(f"the packages of {release} hold no modules")
    images = [*modules.glob("vmlinuz*"), *files.glob("boot/vmlinuz-*")]
    if not images:
        raise KernelError(f"the packages of {release} hold no kernel image")
    into.mkdir()
    (into / "vmlinux").write_bytes(extract_vmlinux(images[0].read_bytes()))
    for config in [*files.glob("boot/config-*"), *modules.glob("config")]:
        shutil.copy(config, into / "config")
    for image in modules.glob("vmlinuz*"):
        image.unlink()
    target = into / "lib/modules" / release
    target.parent.mkdir(parents=True)
    modules.rename(target)
    with ThreadPoolExecutor() as pool:  # lzma lets go of the interpreter lock
        list(pool.map(_decompress_module, sorted(target.rglob("*.ko.xz"))))
    subprocess.run(["depmod", "-b", str(into), release], check=True, env=_sbin_env())


def _decompress_module(path: Path) -> None:
    path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
    path.unlink()


def extract_vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside an x86 bzImage, found through its setup header.

    Documentation/arch/x86/boot.rst: setup_sects at 0x1f1, "HdrS" at 0x202, payload_offset and
    payload_length at 0x248, the offset counted from the start of the protected-mode code. The
    payload's last four bytes are its unpacked size.
    """
    if image[:4] == b"\x7fELF":
        return image
    if image[0x202:0x206] != b"HdrS":
        raise KernelError("kernel image: neither ELF nor bzImage")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length - 4]
    if payload[:4] == b"\x28\xb5\x2f\xfd":
        done = subprocess.run(["zstd", "-dcq"], input=payload, capture_output=True, check=False)
        if done.returncode != 0:
            raise KernelError(f"zstd: {done.stderr.decode(errors='replace').strip()}")
        elf = done.stdout
    elif payload[:6] == b"\xfd7zXZ\x00":
        elf = lzma.decompress(payload)
    elif payload[:2] == b"\x1f\x8b":
        elf = gzip.decompress(payload)
    else:
        raise KernelError(f"kernel image: compression {payload[:6].hex()} is not supported")
    if elf[:4] != b"\x7fELF":
        raise KernelError("kernel image: its payload is not an ELF file")
    return elf


# --- small helpers -----------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a small file of the cache in one step: whoever reads it sees all or nothing of it."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(text)
    new.rename(path)


def _sbin_env() -> dict[str, str]:
    """Debian keeps depmod in /usr/sbin, which a plain user's PATH lacks."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"}


def main(argv: list[str] | None = None) -> int:
    """Print the directory of a kernel, after fetching it if need be."""
    parser = argparse.ArgumentParser(prog="python -m tests.guest.kernel", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("spec", nargs="?", default=NEWEST, help="'newest', or a version: 6.12")
    parser.add_argument("--refresh", action="store_true", help="ask the mirror again")
    arguments = parser.parse_args(argv)
    try:
        kernel = ensure(arguments.spec, refresh=arguments.refresh)
    except KernelError as error:
        print(f"kernel: {error}", file=sys.stderr)
        return 1
    print(kernel.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
