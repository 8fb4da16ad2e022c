"""Finds and probes every libcuda in use: the host's at the start, others when a process that opens
a GPU has them mapped. A container may bring its own copy, under any name.

Reading files takes time, so it is done in an executor, and once for each file.
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
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/lib64",
    "/usr/lib",
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/run/opengl-driver/lib",
)
"""Directories where drivers put it; those that the loader is configured with are searched too."""
TRUSTED_UID = 0
SMALLEST_BYTES = 4096

FileId = tuple[int, int]
"""Device and inode."""


@dataclass(slots=True)
class Probed:
    """A libcuda with probes on it."""

    path: str
    link: int
    calls: dict[int, CudaCall]
    launches: dict[int, CudaCall]


@dataclass(slots=True)
class Libraries:
    """All libraries that are known. Not for two threads at once."""

    programs: VramPrograms
    probed: dict[FileId, Probed] = field(default_factory=dict)
    _others: set[tuple[FileId, int]] = field(default_factory=set)
    """Files that are no libcuda, with the time of their last change."""
    failures: list[str] = field(default_factory=list)

    def probe_host(self, extra: Iterable[Path] = ()) -> list[str]:
        """Find and probe the host's own; returns their paths. What fails is in `failures`."""
        found = []
        places = [*map(str, extra), *host_paths()]
        for path in dict.fromkeys(map(os.path.realpath, places)):
            if self._probe(path, path, of_host=True):
                found.append(path)
        return found

    def probe_process(self, pid: int) -> list[FileId]:
        """Find and probe what a process has mapped; returns the libcudas that it uses, none where
        it is gone."""
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
        """Probe one file; returns whether it is a libcuda and is probed now. `name`: for messages.
        `of_host`: it is one of the host's own; where root owns it, it is also asked what
        cuGetProcAddress gives out."""
        try:
            # Held open, so that the file which is read is the one which is probed.
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
        """Have a probe tell of work that a process gives to the GPU; returns the link's descriptor.
        Raises BpfError."""
        probed = self.probed[key]
        path = probed.path
        if not os.path.exists(path):  # a container's own
            path = f"/proc/{pid}/root{path}"
        return self.programs.attach_launches(path, probed.launches, pid)

    def close(self) -> None:
        """Take all probes away."""
        for probed in self.probed.values():
            os.close(probed.link)
        self.probed.clear()


def host_paths() -> Iterator[str]:
    """Paths of libcuda.so.1 on this host, as its loader could find it."""
    for directory in (*PLACES, *_configured()):
        path = f"{directory}/{NAME}"
        if os.path.exists(path):
            yield path


def _configured() -> Iterator[str]:
    """Directories in the daemon's own LD_LIBRARY_PATH, and in /etc/ld.so.conf.d."""
    yield from filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    for path in sorted(Path("/etc/ld.so.conf.d").glob("*.conf")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            continue
        yield from (line.strip() for line in lines if line.startswith("/"))


def _mapped(pid: int) -> Iterator[tuple[str, str]]:
    """Executable mappings of files in a process: the name, and a path that opens the very file.
    Nothing for a process that is gone."""
    try:
        # Bytes: only \n ends a line here, and a name may hold \r.
        text = Path(f"/proc/{pid}/maps").read_bytes().decode("utf-8", "replace")
    except OSError:
        return
    seen = set()
    for line in text.split("\n"):
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
