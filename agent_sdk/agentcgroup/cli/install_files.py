"""Files of the daemon as a service on this host: which there are, and putting and removing them.

What is there is compared with what should be, so a second run finds nothing to do, and nothing has
to be remembered between `install` and `uninstall`.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agentcgroup.errors import AgentcgError

Found = Literal["new", "same", "changed", "kept"]

UNITS = (
    "agentcg.slice",
    "agentcg-pool.service",
    "agentcgroupd.service",
    "agentcgroupd-agent.socket",
    "agentcgroupd-admin.socket",
)
WANTED = {
    "multi-user.target.wants": ("agentcgroupd.service",),
    "sockets.target.wants": ("agentcgroupd-agent.socket", "agentcgroupd-admin.socket"),
}
"""What `systemctl enable` would link, by the directory it would do so in."""
SYSTEM = Path("/etc/systemd/system")
CONFIG = Path("/etc/agentcgroup/agentcgroupd.toml")
TMPFILES = Path("/etc/tmpfiles.d/agentcgroup.conf")
BIN = Path("/usr/local/bin")
PROGRAMS = ("agentcg", "agentcg-exec", "agentcg-sh", "agentcgroupd")
LOCAL = Path("/usr/local")
SHARED = (
    "share/bash-completion/completions/agentcg",
    "share/zsh/site-functions/_agentcg",
    "share/fish/vendor_completions.d/agentcg.fish",
    "share/man/man1/agentcg.1",
    "share/man/man8/agentcgroupd.8",
)
"""Completions and manual pages: below the installation, and again below /usr/local, where shells
and man look. Those that the installation does not have are left out."""
PACKAGED = (
    "usr/lib/systemd/system/agentcgroupd.service",
    "lib/systemd/system/agentcgroupd.service",
)
OWN_DIRECTORIES = (
    CONFIG.parent / "policy.d",
    CONFIG.parent,
    *(SYSTEM / name for name in WANTED),
    *(
        LOCAL / "share" / name
        for name in (
            *("bash-completion/completions", "bash-completion"),
            *("zsh/site-functions", "zsh", "fish/vendor_completions.d", "fish"),
            *("man/man1", "man/man8", "man"),
        )
    ),
)
"""Directories that are removed when the last file in them was."""
LOOKED_IN = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


class CannotInstall(AgentcgError):
    """The service cannot be installed here; the sentence says why and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, or a link, of the service. `path`: absolute, on the host or in the image.

    `link`: where a symbolic link points to. `kept`: one that is there already stays as it is.
    """

    path: Path
    content: bytes = b""
    link: str = ""
    kept: bool = False

    def found(self, root: Path) -> Found:
        """Compare with what is there. Raises CannotInstall where that is no file."""
        place = below(root, self.path)
        if not place.is_symlink() and not place.exists():
            return "new"
        if place.is_dir() and not place.is_symlink():
            raise CannotInstall(f"{place} is a directory; remove it first")
        if self.link and not place.is_symlink():
            raise CannotInstall(f"{place} is there and no link of ours; remove it first")
        if self.kept:
            return "kept" if place.read_bytes() != self.content else "same"
        if self.link:
            return "same" if place.is_symlink() and os.readlink(place) == self.link else "changed"
        same = not place.is_symlink() and place.read_bytes() == self.content
        return "same" if same else "changed"

    def put(self, root: Path) -> None:
        """Put it in place, whole or not at all."""
        place = below(root, self.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_name(f".{place.name}.new")
        new.unlink(missing_ok=True)
        if self.link:
            new.symlink_to(self.link)
        else:
            new.write_bytes(self.content)
            new.chmod(0o644)
        new.replace(place)


def refuse_packaged(root: Path, instead: str) -> None:
    """Raises CannotInstall where a package of the system brings the service."""
    for packaged in PACKAGED:
        if (root / packaged).is_file():
            raise CannotInstall(
                f"{root / packaged} is there: the system's own package brings the service; "
                f"try: {instead}"
            )


def is_packaged(root: Path) -> bool:
    """Whether a package of the system brings the service."""
    return any((root / packaged).is_file() for packaged in PACKAGED)


def below(root: Path, path: Path) -> Path:
    """A path of the host, in an image whose files lie below `root`."""
    return root / path.relative_to("/")


@dataclass(frozen=True, slots=True)
class Installation:
    """Where this installation's programs and data are."""

    programs: Path
    data: Path

    @classmethod
    def this(cls) -> Installation:
        """The one that this process runs from."""
        return cls(Path(sysconfig.get_path("scripts")), Path(sysconfig.get_path("data")))

    def check(self, root: Path) -> None:
        """Raises CannotInstall where the service could not run from here."""
        units = self.data / "share/agentcgroup/systemd"
        for needed in (self.programs / "agentcgroupd", units / "agentcgroupd.service"):
            if not needed.is_file():
                raise CannotInstall(
                    f"{needed} is not there: this is no whole installation of agentcgroup; "
                    "try: pip install 'agentcgroup[daemon]'"
                )
        refuse_packaged(root, "systemctl enable --now agentcgroupd")
        if root == Path("/"):
            for hidden in ("/tmp", "/var/tmp"):
                if self.programs.resolve().is_relative_to(hidden):
                    raise CannotInstall(
                        f"{self.programs} is below {hidden}, which the unit does not see "
                        "(PrivateTmp=); install into another environment, such as "
                        "/opt/agentcgroup"
                    )

    def writers(self) -> list[str]:
        """Directories on the way to the programs that others than root may change, a sentence
        each: who can do that can have the daemon, which is root, run what they like."""
        found = []
        for directory in (self.programs, *self.programs.parents):
            stat = directory.stat()
            sticky = stat.st_mode & 0o1000
            if stat.st_uid != 0:
                found.append(f"{directory} belongs to uid {stat.st_uid}, not to root")
            elif stat.st_mode & 0o022 and not sticky:
                found.append(f"{directory} can be written to by others than root")
        return found

    def entries(self) -> list[Entry]:
        """Everything that the service is made of, on the host."""
        return [*self._units(), *self._links(), *self._shared()]

    def _units(self) -> Iterator[Entry]:
        source = self.data / "share/agentcgroup/systemd"
        for name in UNITS:
            text = (source / name).read_text(encoding="utf-8")
            # systemd would look in its own PATH, which knows no virtual environment.
            text = text.replace("/usr/bin/env agentcg", f"{self.programs}/agentcg")
            yield Entry(SYSTEM / name, text.encode())
        for directory, names in WANTED.items():
            for name in names:
                yield Entry(SYSTEM / directory / name, link=str(SYSTEM / name))
        yield Entry(TMPFILES, (source / "agentcgroup.tmpfiles.conf").read_bytes())
        yield Entry(CONFIG, (source / "agentcgroupd.toml").read_bytes(), kept=True)

    def _links(self) -> Iterator[Entry]:
        if str(self.programs) in LOOKED_IN:
            return
        for name in PROGRAMS:
            yield Entry(BIN / name, link=str(self.programs / name))

    def _shared(self) -> Iterator[Entry]:
        if self.data in (LOCAL, Path("/usr")):
            return
        for name in SHARED:
            source = self.data / name
            if source.is_file():
                yield Entry(LOCAL / name, source.read_bytes())


def put(entries: Sequence[Entry], root: Path) -> list[tuple[Entry, Found]]:
    """Put in place what is not as it should be; returns each with what was there before. Raises
    OSError, CannotInstall."""
    found = [(entry, entry.found(root)) for entry in entries]
    for entry, state in found:
        if state in ("new", "changed"):
            entry.put(root)
    return found


def removable(root: Path, *, keep_data: bool) -> list[Path]:
    """Files and links of the service that are there, wherever they were installed from.

    `keep_data`: not the configuration. A program or a page of the same name that is not a link
    into an installation of agentcgroup, or not of ours, is left alone.
    """
    paths = [SYSTEM / directory / name for directory, names in WANTED.items() for name in names]
    paths += [SYSTEM / name for name in UNITS]
    paths += [TMPFILES, *(LOCAL / name for name in SHARED)]
    if not keep_data:
        paths.append(CONFIG)
    links = [BIN / name for name in PROGRAMS if _is_ours(below(root, BIN / name), name)]
    places = [below(root, path) for path in (*paths, *links)]
    return [place for place in places if place.is_symlink() or place.is_file()]


def _is_ours(place: Path, name: str) -> bool:
    """Whether a link points to a program of that name beside agentcg-cli, or to nothing."""
    if not place.is_symlink():
        return False
    target = Path(os.readlink(place))
    return target.name == name and (not target.exists() or (target.parent / "agentcg-cli").exists())


def remove(paths: Sequence[Path], root: Path) -> None:
    """Remove files, and the directories of ours that are empty then. Raises OSError."""
    for path in paths:
        path.unlink(missing_ok=True)
    for directory in OWN_DIRECTORIES:
        place = below(root, directory)
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
