"""Fetch Debian packages of any suite, for the build and the tests, without installing anything.

apt runs with a private state directory and this machine's own Debian mirror, so a suite that the
machine does not use can be read without pinning or upgrades:

    apt = Apt(state, "trixie-backports", find_mirror())
    apt.update()
    unpack(apt.download(["libbpf1"], into), into / "files")

Needs only the standard library, because setup runs it before there is a virtual environment.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Log = Callable[[str], None]


class SuiteError(Exception):
    """A suite could not be reached, or apt refused; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """A Debian archive: deb822 field values, as in sources.list(5)."""

    uris: str
    signed_by: str = ""

    def stanza(self, suite: str) -> str:
        """Return a deb822 source for `suite`."""
        keyring = f"Signed-By: {self.signed_by}\n" if self.signed_by else ""
        return f"Types: deb\nURIs: {self.uris}\nSuites: {suite}\nComponents: main\n{keyring}"


def find_mirror(
    etc_apt: Path = Path("/etc/apt"), environ: Mapping[str, str] = os.environ
) -> Mirror:
    """Return $AGENTCG_DEBIAN_MIRROR, else this machine's Debian mirror. Raises SuiteError."""
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
    raise SuiteError(
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
    """Say whether a source is Debian's main archive: not the security one, and no one else's."""
    names = suites.split()
    known = {"stable", "testing", "unstable", "sid", "bookworm", "trixie", "forky", "duke"}
    path = mirror.uris.split()[0].rstrip("/") if mirror.uris else ""
    return "security" not in path and "debian" in path and bool(known & set(names))


class Apt:
    """An apt with a state of its own for one suite; the machine's own state stays as it is."""

    def __init__(
        self, state: Path, suite: str, mirror: Mirror, *, check_valid_until: bool = True
    ) -> None:
        """Make the state directory.

        check_valid_until: refuse an index whose date has passed; its signature is always checked.
        """
        self.suite = suite
        self._state = state
        self._check_valid_until = check_valid_until
        for name in ("lists/partial", "archives/partial", "sources"):
            (state / name).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        (state / "sources/suite.sources").write_text(mirror.stanza(suite))

    def update(self) -> None:
        """Read the suite's index again. Raises SuiteError, as the other methods do."""
        self._run("apt-get", "-q", "update", timeout_sec=300)

    def names(self, prefix: str) -> list[str]:
        """Return the names of all packages in the suite that start with `prefix`."""
        return self._run("apt-cache", "pkgnames", prefix).split()

    def depends(self, package: str) -> list[str]:
        """Return the names in a package's Depends field; [] for a package that the suite lacks."""
        try:
            return parse_depends(self._run("apt-cache", "--no-all-versions", "show", package))
        except SuiteError:
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
            "Acquire::Check-Valid-Until": str(self._check_valid_until).lower(),
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
            raise SuiteError(f"{argv[0]} is missing: not a Debian machine") from error
        except subprocess.TimeoutExpired as error:
            raise SuiteError(f"{' '.join(argv)}: no answer within {timeout_sec:.0f} s") from error
        if done.returncode != 0:
            raise SuiteError(f"{' '.join(argv)} ({self.suite}): {done.stderr.strip()}")
        return done.stdout


def parse_depends(stanza: str) -> list[str]:
    """Return the names in the first Depends field: first alternatives only, without versions."""
    match = re.search(r"^Depends: (.*)$", stanza, re.MULTILINE)
    if match is None:
        return []
    return [item.split("|")[0].split()[0].split(":")[0] for item in match[1].split(",")]


def unpack(packages: Iterable[Path], into: Path) -> None:
    """Unpack .deb files over each other; nothing in them is run. Raises SuiteError."""
    for package in packages:
        argv = ["dpkg-deb", "-x", str(package), str(into)]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise SuiteError("dpkg-deb is missing: not a Debian machine") from error
        if done.returncode != 0:
            raise SuiteError(f"{package.name}: {done.stderr.strip()}")


def twice(action: Callable[[], T], log: Log) -> T:
    """Do a download, and once more where it failed: mirrors have short faults."""
    try:
        return action()
    except SuiteError as error:
        log(f"{error}; trying once more")
        return action()


@contextmanager
def locked(path: Path, log: Log) -> Iterator[None]:
    """Hold an exclusive lock: two setups at once fetch a thing once."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another run that holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
