"""Swap in compressed memory (zram): where the cold pages of waiting agents and paused calls can go.

The daemon makes at most one zram device, and only where the configuration asks for one. The device
outlives the daemon, because calls that go on without a daemon may have pages there; a restarted
daemon knows it by the label in its swap header. What the device holds takes memory of the host that
is in no cgroup's account.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agentcgroupd.errors import AgentcgroupdError
from agentcgroupd.host.memory import host_memory_bytes
from agentcgroupd.units import show_bytes

log = logging.getLogger(__name__)

LABEL = "agentcg"
"""Volume name in the swap header, at most 16 bytes."""
SWAP_PRIORITY = 100
"""The same as zram-generator's: above that of swap on disks, which is negative unless set."""
POOL_SHARE = 0.5
"""Size of an automatic device, as a share of the pool's memory."""
COMPRESSION = 2
"""Expected ratio, so a device of more than twice the memory makes no sense
(Documentation/admin-guide/blockdev/zram.rst: Set Disk size)."""
SMALL_BYTES = 64 << 20
"""Most that is read back into memory at start to remove a device that is no longer wanted."""
ALGORITHMS = ("zstd", "lzo-rle")
"""Compression algorithms to choose from, the densest first: memory is what is short."""
COMMAND_TIMEOUT_S = 60.0

_CONTROL = Path("/sys/class/zram-control")
_BLOCK = Path("/sys/block")
_DEV = Path("/dev")
_SWAPS = Path("/proc/swaps")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_NODE = re.compile(r"/dev/zram([0-9]+)")

Setting = int | Literal["off", "auto"]


class ZramError(AgentcgroupdError):
    """A zram device cannot be set up or taken away; the message is a sentence that says why."""


# Reading


@dataclass(frozen=True, slots=True)
class Swap:
    """A swap area of the host."""

    path: str
    """For people, as /proc/swaps shows it: blanks and line ends as octal escapes. Bytes that are
    not UTF-8 are shown as \\xNN."""
    size_bytes: int
    used_bytes: int
    priority: int

    @property
    def is_zram(self) -> bool:
        """Whether the area is compressed memory."""
        return _NODE.fullmatch(self.path) is not None


def parse_swaps(data: bytes) -> tuple[Swap, ...]:
    """Parse /proc/swaps: a heading, then for each area its path, type, size and use in KiB, and
    priority. Raises ValueError."""
    _heading, *lines = data.split(b"\n")
    return tuple(_parse_swap(line) for line in lines if line)


def _parse_swap(line: bytes) -> Swap:
    # A blank in the path is escaped; other bytes that split() would split at are not.
    path, _, rest = line.partition(b" ")
    _kind, size, used, priority = rest.split()
    shown = path.decode("utf-8", "backslashreplace")
    return Swap(shown, int(size) << 10, int(used) << 10, int(priority))


def swaps() -> tuple[Swap, ...]:
    """The host's swap areas, in no order. Raises OSError."""
    return parse_swaps(_SWAPS.read_bytes())


@dataclass(frozen=True, slots=True)
class ZramStat:
    """Use of a zram device: the first fields of its mm_stat."""

    held_bytes: int
    """Size of the pages in the device before compression (orig_data_size)."""
    used_bytes: int
    """Memory that these pages take (mem_used_total)."""
    limit_bytes: int
    """Most that they may take; 0: no limit."""


def parse_mm_stat(text: str) -> ZramStat:
    """Parse mm_stat (Documentation/admin-guide/blockdev/zram.rst: Stats). Raises ValueError."""
    held, _compressed, used, limit, *_rest = map(int, text.split())
    return ZramStat(held, used, limit)


def parse_label(page: bytes) -> str | None:
    """The volume name in a swap area's first page; None if the page is no swap area's
    (include/linux/swap.h: union swap_header)."""
    if len(page) < _PAGE_BYTES or page[_PAGE_BYTES - 10 : _PAGE_BYTES] != b"SWAPSPACE2":
        return None
    return page[1052:1068].rstrip(b"\0").decode("utf-8", "replace")


def choose_algorithm(text: str) -> str | None:
    """Choose among the algorithms in comp_algorithm (`[lz4] zstd`); None: leave what is set."""
    offered = text.replace("[", " ").replace("]", " ").split()
    return next((name for name in ALGORITHMS if name in offered), None)


@dataclass(frozen=True, slots=True)
class Zram:
    """A zram device."""

    number: int

    @property
    def node(self) -> Path:
        """Path of the block device."""
        return _DEV / f"zram{self.number}"

    def read(self, file: str) -> str:
        """Text of an attribute in sysfs. Raises OSError."""
        return (_BLOCK / f"zram{self.number}" / file).read_text(encoding="ascii").strip()

    def write(self, file: str, value: str) -> None:
        """Set an attribute. Raises OSError."""
        _write(_BLOCK / f"zram{self.number}" / file, value)

    @property
    def size_bytes(self) -> int:
        """Most that can be swapped to the device; 0: not set up. Raises OSError."""
        return int(self.read("disksize"))

    def stat(self) -> ZramStat:
        """Current use of the device. Raises OSError."""
        return parse_mm_stat(self.read("mm_stat"))

    def swap(self) -> Swap | None:
        """The device as a swap area; None: the host does not swap to it. Raises OSError."""
        return next((s for s in swaps() if s.path == str(self.node)), None)


def swap_stats(areas: tuple[Swap, ...]) -> tuple[ZramStat, ...]:
    """Use of each zram device among the areas, in their order. Raises OSError."""
    found = (_NODE.fullmatch(area.path) for area in areas)
    return tuple(Zram(int(node[1])).stat() for node in found if node)


def find() -> Zram | None:
    """Find the device that a daemon made, whether or not the host swaps to it; None: there is none.
    Raises OSError."""
    for path in sorted(_BLOCK.glob("zram[0-9]*")):
        device = Zram(int(path.name.removeprefix("zram")))
        try:
            if device.size_bytes and parse_label(_first_page(device.node)) == LABEL:
                return device
        except (FileNotFoundError, PermissionError):
            # In a container the host's devices can be seen, but not be opened.
            log.debug("%s is not ours to open", device.node)
    return None


def unavailable() -> str:
    """Reason why this host cannot have zram; empty if it can. Loads and makes nothing."""
    if not _CONTROL.is_dir():
        try:
            _run("modprobe", "--dry-run", "--quiet", "zram")
        except ZramError:
            return f"the kernel {os.uname().release} has no module zram (CONFIG_ZRAM)"
    missing = [name for name in ("mkswap", "swapon") if _program(name) is None]
    return f"{missing[0]} is not installed (package util-linux)" if missing else ""


# Making and removing


def prepare(setting: Setting, pool_bytes: int) -> Zram | None:
    """Do what `pool.zram` asks for. Returns the device that is ours afterwards, or None.

    `auto` makes one of half of `pool_bytes`, unless the host swaps to anything already. Raises
    ZramError; the host is then as it was before.
    """
    try:
        return _prepare(setting, pool_bytes)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ZramError(f"pool.zram: {where}{os.strerror(error.errno or 0)}") from error


def _prepare(setting: Setting, pool_bytes: int) -> Zram | None:
    ours = find()
    if setting == "off":
        if ours is not None:
            remove(ours)
        return None
    size = int(pool_bytes * POOL_SHARE) if setting == "auto" else setting
    if ours is not None:
        _take_up(ours, size)
        return ours
    others = swaps()
    if setting == "auto" and others:
        log.info("the host swaps to %s: no zram is made", ", ".join(s.path for s in others))
        return None
    most = COMPRESSION * host_memory_bytes()
    if size > most:
        raise ZramError(
            f"pool.zram: {show_bytes(size)} cannot be used; allowed is at most {show_bytes(most)}, "
            "twice the host's memory"
        )
    return _make(size)


def _take_up(device: Zram, wanted_bytes: int) -> None:
    if device.swap() is None:
        _run("swapon", "--priority", str(SWAP_PRIORITY), str(device.node))
    size = device.size_bytes
    log.info("swap in %s of %s is there already", device.node, show_bytes(size))
    if abs(size - wanted_bytes) > _PAGE_BYTES:
        log.warning(
            "pool.zram would make it %s: it stays as it is until the host is started anew or "
            "`swapoff %s` has emptied it",
            show_bytes(wanted_bytes),
            device.node,
        )


def _make(size_bytes: int) -> Zram:
    why = unavailable()
    if why:
        raise ZramError(f"pool.zram: {why}")
    if not _CONTROL.is_dir():
        # The module's default of one device would take zram0, which an operator may count on.
        _run("modprobe", "zram", "num_devices=0")
    # Reading this file makes a device; what is read is its number.
    device = Zram(int((_CONTROL / "hot_add").read_text(encoding="ascii")))
    try:
        algorithm = choose_algorithm(device.read("comp_algorithm"))
        if algorithm is not None:
            device.write("comp_algorithm", algorithm)
        device.write("disksize", str(size_bytes))
        # Pages that compress worse than expected are not swapped once this limit is reached.
        device.write("mem_limit", str(size_bytes // COMPRESSION))
        _run("mkswap", "-L", LABEL, str(device.node))
        _run("swapon", "--priority", str(SWAP_PRIORITY), str(device.node))
    except (OSError, ZramError):
        _destroy(device)
        raise
    size, limit = show_bytes(size_bytes), show_bytes(size_bytes // COMPRESSION)
    chosen = algorithm or "the kernel's choice"
    how = f"compressed by {chosen} into at most {limit} of memory"
    log.info("made swap in %s: %s, %s", device.node, size, how)
    return device


def remove(device: Zram) -> None:
    """Take a device of ours away, if it holds at most SMALL_BYTES. Raises ZramError or OSError."""
    swap = device.swap()
    if swap is not None:
        if swap.used_bytes > SMALL_BYTES:
            raise ZramError(
                f"pool.zram: {device.node} holds {show_bytes(swap.used_bytes)}, which cannot come "
                f"back into memory just now: it is kept. It goes when it is nearly empty at a "
                f"start of the daemon, or with `swapoff {device.node}`"
            )
        _run("swapoff", str(device.node))
    _destroy(device)
    log.info("removed swap in %s", device.node)


def _destroy(device: Zram) -> None:
    try:
        _write(_CONTROL / "hot_remove", str(device.number))
    except OSError as error:
        log.warning("%s cannot be removed: %s", device.node, os.strerror(error.errno or 0))


# System calls and programs


def _write(path: Path, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"writing {value!r} to {path}") from None
    finally:
        os.close(fd)


def _first_page(node: Path) -> bytes:
    with node.open("rb", buffering=0) as file:
        return file.read(_PAGE_BYTES)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(name: str, *arguments: str) -> None:
    program = _program(name)
    if program is None:
        raise ZramError(f"pool.zram: {name} is not installed")
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ZramError(f"pool.zram: {name} took more than {COMMAND_TIMEOUT_S:g} s") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip() or f"exit status {done.returncode}"
        raise ZramError(f"pool.zram: {name} failed: {said}")
