"""Every libcuda in use, found and probed: the host's at the start, others when a process that opens
a GPU has them mapped. A container may bring its own copy, under any name.

Reading files takes time, so it is done in an executor; what is done once for a file is done once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agentcgroupd.bpf.abi import CudaCall
from agentcgroupd.bpf.elf import Library, NotElf
from agentcgroupd.bpf.vram import VramPrograms
from agentcgroupd.errors import BpfError
from agentcgroupd.gpu import cuda

log = logging.getLogger(__name__)

NAME = "libcuda.so.1"
PLACES = (
    "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib",
    "/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/run/opengl-driver/lib",
)  # fmt: skip
"""Where drivers put it; where the loader is configured to look is looked at as well."""
TRUSTED_UID = 0
SMALLEST_BYTES = 4096

FileId = tuple[int, int]
"""Device and inode."""


@dataclass(slots=True)
class Probed:
    """One libcuda with probes on it."""

    path: str
    link: int
    calls: dict[int, CudaCall]
    launches: dict[int, CudaCall]


@dataclass(slots=True)
class Libraries:
    """Those that are known. Not for two threads at once."""

    programs: VramPrograms
    probed: dict[FileId, Probed] = field(default_factory=dict)
    _others: set[tuple[FileId, int]] = field(default_factory=set)
    """Files that are no libcuda, with when they were changed."""
    failures: list[str] = field(default_factory=list)

    def probe_host(self, extra: Iterable[Path] = ()) -> list[str]:
        """Find and probe the host's own; their paths. What fails is in `failures`."""
        found = []
        places = [*map(str, extra), *_host_paths()]
        for path in dict.fromkeys(map(os.path.realpath, places)):
            if self._probe(path, path, of_host=True):
                found.append(path)
        return found

    def probe_process(self, pid: int) -> list[FileId]:
        """Find and probe what a process has mapped; those that it uses. No error if it is gone."""
        used = []
        for name, path in _mapped(pid):
            try:
                info = os.stat(path)
            except OSError:
                continue  # unmapped meanwhile, or the process has ended
            key = (info.st_dev, info.st_ino)
            if key in self.probed:
                used.append(key)
                continue
            if (key, info.st_mtime_ns) in self._others or info.st_size < SMALLEST_BYTES:
                continue
            if self._probe(path, name, of_host=False):
                used.append(key)
            else:
                self._others.add((key, info.st_mtime_ns))
        return used

    def _probe(self, path: str, name: str, of_host: bool) -> bool:
        """Probe one file, if it is a libcuda. `name`: how it is called in messages. `of_host`: one
        of the host's own, asked what it gives out if it is root's."""
        try:
            # Held open, so that what is read and what is probed is one and the same.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if of_host:  # one of a process: unmapped meanwhile, or the process has ended
                self.failures.append(str(error))
                log.error("%s cannot be probed: %s", name, error)
            return False
        try:
            info = os.fstat(fd)
            key = (info.st_dev, info.st_ino)
            if key in self.probed:
                return True
            held = f"/proc/self/fd/{fd}"
            with Library(held) as library:
                if not library.mentions(cuda.SIGNATURE):
                    return False
                own = dict(library.exports({cuda.SIGNATURE}))
                if not own:
                    return False  # it only uses that function
                trusted = of_host and info.st_uid == TRUSTED_UID
                given_out = self._ask(Path(path)) if trusted else {}
                calls = cuda.offsets(library, given_out, cuda.CALLS)
                names = dict.fromkeys(cuda.LAUNCHES, CudaCall.NONE)
                launches = cuda.offsets(library, given_out, names)
            self.probed[key] = Probed(name, self.programs.attach(held, calls), calls, launches)
            log.info("%s is probed at %d places", name, len(calls))
            return True
        except NotElf:
            return False
        except (BpfError, OSError) as error:
            self.failures.append(f"{name}: {error}")
            log.error("%s cannot be probed, so its use of memory is only counted: %s", name, error)
            return False
        finally:
            os.close(fd)

    def _ask(self, path: Path) -> dict[str, list[int]]:
        try:
            return cuda.ask(path)
        except (OSError, ValueError) as error:
            self.failures.append(f"{path}: {error}")
            log.warning("what cuGetProcAddress gives out is not known: %s", error)
            return {}

    def watch_launches(self, key: FileId, pid: int) -> int:
        """Tell of work that a process gives to the GPU; the link's descriptor. Raises BpfError."""
        probed = self.probed[key]
        return self.programs.attach_launches(f"/proc/{pid}/root{probed.path}"
                                             if not os.path.exists(probed.path) else probed.path,
                                             probed.launches, pid)  # fmt: skip

    def close(self) -> None:
        """Take all probes away."""
        for probed in self.probed.values():
            os.close(probed.link)
        self.probed.clear()


def _host_paths() -> Iterator[str]:
    for place in PLACES:
        path = f"{place}/{NAME}"
        if os.path.exists(path):
            yield path
    for directory in _configured():
        path = f"{directory}/{NAME}"
        if os.path.exists(path):
            yield path


def _configured() -> Iterator[str]:
    """Directories in /etc/ld.so.conf.d, and LD_LIBRARY_PATH of the daemon itself."""
    yield from filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    for path in sorted(Path("/etc/ld.so.conf.d").glob("*.conf")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        yield from (line.strip() for line in lines if line.startswith("/"))


def _mapped(pid: int) -> Iterator[tuple[str, str]]:
    """(name, path that opens the very file) of executable mappings of files. None of a process that
    is gone."""
    try:
        text = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    seen = set()
    for line in text.splitlines():
        fields = line.split(None, 5)
        if len(fields) < 6 or "x" not in fields[1] or not fields[5].startswith("/"):
            continue
        span, _, _, device, inode, name = fields
        if (device, inode) in seen:
            continue
        seen.add((device, inode))
        start, end = span.split("-")
        # The name may be another's in the process's own root; the link in map_files cannot be.
        yield name, f"/proc/{pid}/map_files/{int(start, 16):x}-{int(end, 16):x}"
