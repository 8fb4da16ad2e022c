"""Fetch a Debian kernel for the test guest, without installing anything on this machine.

apt runs with a private state directory and this machine's own Debian mirror, so any suite can be
read without pinning or upgrades. Kernels live in a cache outside every checkout, one directory per
release, each moved into place only when whole:

    <cache>/kernels/<release>/vmlinux                    unpacked image: QEMU starts it 1.5 s sooner
    <cache>/kernels/<release>/lib/modules/<release>/     uncompressed modules, with depmod's indexes
    <cache>/newest                                       the release that "newest" stands for here

Needs only the standard library, because setup runs it before there is a virtual environment.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

NEWEST = "newest"
META_PACKAGE = "linux-image-cloud-amd64"
# Searched in this order: backports has the newest kernels, the suite itself the long-term one.
SUITES = ("trixie-backports", "trixie")

# Debian splits a kernel into several packages since 7.x; before, linux-image-* held everything.
_PART = re.compile(r"linux-(?:image|binary|modules|base)-(\d\S*-cloud-amd64)$")
_SPEC = re.compile(r"\d+(?:\.\d+)*$")

T = TypeVar("T")
Log = Callable[[str], None]


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
    with _locked(cache / "lock", log):
        if not refresh and (found := cached(cache, spec)):
            return found  # another run fetched it while this one waited for the lock
        kernel = _fetch(cache, spec, log)
        if spec == NEWEST:
            _write_atomically(cache / "newest", kernel.release + "\n")
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


# --- the mirror --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mirror:
    """A Debian archive: deb822 field values, as in sources.list(5)."""

    uris: str
    signed_by: str = ""

    def stanza(self, suite: str) -> str:
        """A deb822 source for `suite`."""
        keyring = f"Signed-By: {self.signed_by}\n" if self.signed_by else ""
        return f"Types: deb\nURIs: {self.uris}\nSuites: {suite}\nComponents: main\n{keyring}"


def find_mirror(
    etc_apt: Path = Path("/etc/apt"), environ: Mapping[str, str] = os.environ
) -> Mirror:
    """This machine's Debian mirror, or $AGENTCG_DEBIAN_MIRROR. Raises KernelError."""
    if uris := environ.get("AGENTCG_DEBIAN_MIRROR"):
        return Mirror(uris, environ.get("AGENTCG_DEBIAN_KEYRING", ""))
    texts = [path.read_text() for path in sorted(etc_apt.glob("sources.list.d/*.sources"))]
    for text in texts:
        for mirror, suites in parse_deb822(text):
            if _is_debian(mirror, suites):
                return mirror
    for path in [etc_apt / "sources.list", *sorted(etc_apt.glob("sources.list.d/*.list"))]:
        for mirror, suites in parse_one_line(path.read_text() if path.exists() else ""):
            if _is_debian(mirror, suites):
                return mirror
    raise KernelError(
        "no Debian mirror among apt's sources; set AGENTCG_DEBIAN_MIRROR to the URI of one "
        "(and AGENTCG_DEBIAN_KEYRING to its keyring)"
    )


def parse_deb822(text: str) -> Iterator[tuple[Mirror, str]]:
    """Yield (mirror, suites) of each enabled binary source; a folded key stays folded."""
    for block in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t"):
                fields[name] = f"{fields.get(name, '')}\n{line}"
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.lower()
                fields[name] = value.strip()
        enabled = fields.get("enabled", "yes").lower() not in ("no", "false", "0")
        if enabled and "deb" in fields.get("types", "").split() and "uris" in fields:
            yield Mirror(fields["uris"], fields.get("signed-by", "")), fields.get("suites", "")


def parse_one_line(text: str) -> Iterator[tuple[Mirror, str]]:
    """Yield (mirror, suite) of each `deb [options] uri suite component...` line."""
    for line in text.splitlines():
        match = re.match(r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)", line)
        if match:
            keyring = re.search(r"signed-by=(\S+)", match["options"] or "")
            yield Mirror(match["uri"], keyring[1] if keyring else ""), match["suite"]


def _is_debian(mirror: Mirror, suites: str) -> bool:
    """Debian's own archive, not its security one and nobody else's."""
    names = suites.split()
    known = {"stable", "testing", "unstable", "sid", "bookworm", "trixie", "forky", "duke"}
    path = mirror.uris.split()[0].rstrip("/") if mirror.uris else ""
    return "security" not in path and "debian" in path and bool(known & set(names))


class Apt:
    """apt with a state of its own for one suite. Nothing of the machine's own state changes."""

    def __init__(self, state: Path, suite: str, mirror: Mirror) -> None:
        self.suite = suite
        self._state = state
        for name in ("lists/partial", "archives/partial", "sources"):
            (state / name).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        (state / "sources/suite.sources").write_text(mirror.stanza(suite))

    def update(self) -> None:
        """Read the suite's index again."""
        self._run("apt-get", "-q", "update", timeout_sec=300)

    def images(self) -> list[str]:
        """Releases of all cloud kernels in the suite."""
        names = self._run("apt-cache", "pkgnames", "linux-image-").split()
        matches = (re.fullmatch(r"linux-image-(\d\S*-cloud-amd64)", name) for name in names)
        return [match[1] for match in matches if match]

    def depends(self, package: str) -> list[str]:
        """Names in the package's Depends field; [] for a package that the suite lacks."""
        try:
            return parse_depends(self._run("apt-cache", "--no-all-versions", "show", package))
        except KernelError:
            return []

    def download(self, packages: list[str], into: Path) -> list[Path]:
        """Fetch .deb files, checked by apt against the signed index."""
        self._run("apt-get", "-q", "download", *packages, cwd=into, timeout_sec=600)
        return sorted(into.glob("*.deb"))

    def _run(self, *argv: str, cwd: Path | None = None, timeout_sec: float = 60) -> str:
        state = self._state
        options = {
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": state / "sources",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State::lists": state / "lists",
            "Dir::State::status": state / "status",
            "Dir::Cache::archives": state / "archives",
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "APT::Sandbox::User": "root",
            "APT::Update::Error-Mode": "any",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        flags = [flag for key, value in options.items() for flag in ("-o", f"{key}={value}")]
        try:
            done = subprocess.run(
                [argv[0], *flags, *argv[1:]],
                cwd=cwd,
                capture_output=True,
                text=True,
                timeout=timeout_sec,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                check=False,
            )
        except FileNotFoundError as error:
            raise KernelError(f"{argv[0]} is missing: the test kernel comes from Debian") from error
        except subprocess.TimeoutExpired as error:
            raise KernelError(f"{' '.join(argv)}: no answer within {timeout_sec:.0f} s") from error
        if done.returncode != 0:
            raise KernelError(f"{' '.join(argv)} ({self.suite}): {done.stderr.strip()}")
        return done.stdout


def parse_depends(stanza: str) -> list[str]:
    """Package names of the first Depends field, first alternatives only, versions dropped."""
    match = re.search(r"^Depends: (.*)$", stanza, re.MULTILINE)
    if match is None:
        return []
    return [item.split("|")[0].split()[0].split(":")[0] for item in match[1].split(",")]


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
        _twice(apt.update, log)
        packages = _choose(apt, spec)
        if packages:
            return _obtain(cache, apt, packages, log)
    raise KernelError(f"no cloud kernel {spec} in {', '.join(SUITES)}")


def _choose(apt: Apt, spec: str) -> list[str]:
    if spec == NEWEST:
        return parts_of(META_PACKAGE, apt.depends)
    release = latest(spec, apt.images())
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
        debs = _twice(lambda: apt.download(packages, work), log)
        log(f"kernel {release}: unpacking")
        for deb in debs:
            subprocess.run(["dpkg-deb", "-x", str(deb), str(work / "files")], check=True)
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


def _twice(action: Callable[[], T], log: Log) -> T:
    """A download that failed is tried once more: mirrors hiccup."""
    try:
        return action()
    except KernelError as error:
        log(f"{error}; trying once more")
        return action()


@contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Hold an exclusive lock: two setups at once fetch a kernel once."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another run that holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_atomically(path: Path, text: str) -> None:
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
