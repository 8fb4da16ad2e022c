"""A BPF object: opened, checked, loaded, attached, and taken back in the opposite order.

    with BpfObject.open("lifecycle") as bpf:
        bpf.load()
        bpf.attach("on_exec")

An error in between closes what was opened, so nothing stays half attached.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, cast

from agentcgroupd.bpf import abi
from agentcgroupd.bpf.btf import KIND_STRUCT, Btf, kernel_btf
from agentcgroupd.bpf.libbpf import errno_of, libbpf, pid_namespace
from agentcgroupd.errors import BpfError

OBJECTS = Path(__file__).parent / "objects"
LOG_LINES = 12
"""How much of the verifier's log an error quotes: its last lines, where the reason stands."""
CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 21, 38, 39
ENOTSUPP = 524
"""An errno of the kernel's own, without a name in errno.h."""
_REFUSED = (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOMEM, errno.EBUSY, ENOTSUPP)
LOCKDOWN = Path("/sys/kernel/security/lockdown")

V = TypeVar("V", bound=ctypes.Structure)
S = TypeVar("S", bound="ctypes.Structure | ctypes.Array[Any]")


class BpfMap(Generic[V]):
    """A map from 64-bit ids to values of one type."""

    def __init__(self, fd: int, name: str, value: type[V], most: int) -> None:
        self._fd, self._name, self._value, self.max_entries = fd, name, value, most

    def __setitem__(self, key: int, value: V) -> None:
        """Set an entry. Raises BpfError; E2BIG: the map is full."""
        what, place = f"map {self._name}: entry {key}", ctypes.byref(ctypes.c_uint64(key))
        new = ctypes.byref(value)
        libbpf().check(what, "bpf_map_update_elem", self._fd, place, new, 0)

    def get(self, key: int) -> V | None:
        """A copy of the entry; None: there is none. Raises BpfError."""
        value, place = self._value(), ctypes.byref(ctypes.c_uint64(key))
        result = libbpf().call("bpf_map_lookup_elem", self._fd, place, ctypes.byref(value))
        if result == -errno.ENOENT:
            return None
        if result < 0:
            raise BpfError(f"map {self._name}: entry {key}", -result)
        return value

    def pop(self, key: int) -> None:
        """Remove the entry; no error if there is none. Raises BpfError."""
        place = ctypes.byref(ctypes.c_uint64(key))
        result = libbpf().call("bpf_map_delete_elem", self._fd, place)
        if result < 0 and result != -errno.ENOENT:
            raise BpfError(f"map {self._name}: entry {key}", -result)

    def keys(self) -> Iterator[int]:
        """All keys. An entry that is removed meanwhile makes the kernel start over, so a key may
        come twice. Raises BpfError."""
        before: Any = None
        while True:
            key = ctypes.c_uint64()
            result = libbpf().call("bpf_map_get_next_key", self._fd, before, ctypes.byref(key))
            if result == -errno.ENOENT:
                return
            if result < 0:
                raise BpfError(f"map {self._name}: keys", -result)
            yield key.value
            before = ctypes.byref(key)


class _RunOptions(ctypes.Structure):
    """struct bpf_test_run_opts of libbpf, up to the last member that is used here."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_int32),
        ("repeat", ctypes.c_int),
    )
    retval: int


class BpfObject:
    """An object file and everything that was made from it."""

    def __init__(self, name: str, path: Path, handle: int) -> None:
        self.name, self.path = name, path
        self._handle = handle
        self._links: list[tuple[str, int]] = []

    @classmethod
    def open(cls, name: str, path: Path | None = None) -> Self:
        """Open `objects/<name>.bpf.o` and set its constants. Raises BpfError, also for an object
        that was built for another abi.h."""
        path = path or OBJECTS / f"{name}.bpf.o"
        if not path.is_file():
            raise BpfError(f"{path} is not there: the installation is incomplete", errno.ENOENT)
        with libbpf().messages() as said:
            try:
                handle = libbpf().pointer(
                    f"opening {path}", "bpf_object__open_file", str(path).encode(), None
                )
            except BpfError as error:
                raise BpfError(error.what, error.errno, _last(said)) from None
        self = cls(name, path, handle)
        try:
            self._check_abi()
            self._constant("daemon_pid_ns").value = pid_namespace()
            self._constant("page_bytes").value = mmap.PAGESIZE
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Before the load

    def _check_abi(self) -> None:
        found = self._constant("abi_version").value
        if found != abi.ABI_VERSION:
            what = (
                f"{self.path} was built for version {found} of the interface, the daemon has "
                f"{abi.ABI_VERSION}: install both from one release"
            )
            raise BpfError(what, errno.EPROTO)

    def skip_program(self, name: str) -> None:
        """Leave a program out of the load. Raises BpfError."""
        program = self._program(name)
        libbpf().check(f"program {name}", "bpf_program__set_autoload", program, False)

    def resize(self, name: str, entries: int) -> None:
        """Give a map another number of entries; to a ring buffer, another size in bytes, which is a
        power of two. Raises BpfError."""
        libbpf().check(f"map {name}", "bpf_map__set_max_entries", self._map(name), entries)

    def fits(self, name: str, sizes: tuple[int, int, int]) -> bool:
        """Tell whether a map has these sizes: of its key and value in bytes, and its number of
        entries. Raises BpfError."""
        handle = self._map(name)
        getters = ("bpf_map__key_size", "bpf_map__value_size", "bpf_map__max_entries")
        return tuple(libbpf().call(getter, handle) for getter in getters) == sizes

    def reuse(self, name: str, fd: int) -> None:
        """Use a map that is there instead of making one. Raises BpfError."""
        libbpf().check(f"map {name}", "bpf_map__reuse_fd", self._map(name), fd)

    def programs(self) -> list[str]:
        """Names of all programs in the object."""
        names, program = [], libbpf().call("bpf_object__next_program", self._handle, None)
        while program:
            names.append(str(libbpf().call("bpf_program__name", program).decode()))
            program = libbpf().call("bpf_object__next_program", self._handle, program)
        return names

    def load(self) -> None:
        """Make the maps and have the verifier check the programs. Raises BpfError with the end of
        the verifier's log."""
        with libbpf().messages() as said:
            result = int(libbpf().call("bpf_object__load", self._handle))
        if result < 0:
            why = why_refused(-result)
            what = f"loading {self.name}" + (f" ({why})" if why else "")
            raise BpfError(what, errno_of(-result), verifier_end(said))

    # After the load

    def attach(self, *names: str) -> None:
        """Attach programs where their sections say. Raises BpfError; those attached before stay
        until close()."""
        for name in names:
            with libbpf().messages() as said:
                try:
                    link = libbpf().pointer(
                        f"attaching {self.name}/{name}", "bpf_program__attach", self._program(name)
                    )
                except BpfError as error:
                    why = why_refused(error.errno)
                    what = error.what + (f" ({why})" if why else "")
                    raise BpfError(what, error.errno, _last(said)) from None
            self._links.append((name, link))

    def attached(self) -> tuple[str, ...]:
        """Names of the programs that are attached."""
        return tuple(name for name, _ in self._links)

    def link_fds(self) -> list[tuple[str, int]]:
        """Names of the programs that are attached, with descriptors of their links."""
        return [(name, libbpf().call("bpf_link__fd", link)) for name, link in self._links]

    def detach(self, name: str) -> None:
        """Detach a program; no error if it is not attached."""
        for entry in [e for e in self._links if e[0] == name]:
            self._links.remove(entry)
            libbpf().call("bpf_link__destroy", entry[1])

    def map(self, name: str, value: type[V]) -> BpfMap[V]:
        """A map from 64-bit ids to values of a type. Raises BpfError (EPROTO: the sizes of its
        entries are not those of the daemon's types)."""
        handle = self._map(name)
        key_bytes = libbpf().call("bpf_map__key_size", handle)
        value_bytes = libbpf().call("bpf_map__value_size", handle)
        sizes, wanted = (key_bytes, value_bytes), (8, ctypes.sizeof(value))
        if sizes != wanted:
            what = f"map {name}: entries of {sizes} bytes, the daemon has {wanted}"
            raise BpfError(what, errno.EPROTO)
        fd = libbpf().check(f"map {name}", "bpf_map__fd", handle)
        return BpfMap(fd, name, value, libbpf().call("bpf_map__max_entries", handle))

    def map_fd(self, name: str) -> int:
        """Descriptor of a map, which stays the object's."""
        return libbpf().check(f"map {name}", "bpf_map__fd", self._map(name))

    def program_fd(self, name: str) -> int:
        """Descriptor of a loaded program, which stays the object's."""
        return libbpf().check(f"program {name}", "bpf_program__fd", self._program(name))

    def shared(self, name: str, kind: type[S]) -> S:
        """A global variable of the programs, in memory that is shared with them: what is written
        there, they read. The memory stays readable after close(). Raises BpfError."""
        offset = self._place(".bss", name, kind)
        fd = self.map_fd(".bss")
        size = libbpf().call("bpf_map__value_size", self._map(".bss"))
        pages = mmap.mmap(fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        return cast(S, kind.from_buffer(pages, offset))

    def missed(self, name: str) -> int | None:
        """Number of times that the kernel left out a loaded program because it was running on that
        CPU already; None on kernels that do not count them (before 5.12). Raises BpfError."""
        found = _misses(kernel_btf())
        if found is None:
            return None
        info_bytes, offset = found
        info = ctypes.create_string_buffer(info_bytes)
        size, fd = ctypes.c_uint32(len(info)), self.program_fd(name)
        what = f"program {name}"
        libbpf().check(what, "bpf_obj_get_info_by_fd", fd, info, ctypes.byref(size))
        return ctypes.c_uint64.from_buffer(info, offset).value

    def run(self, name: str, context: ctypes.Structure) -> int:
        """Run a loaded program of type syscall once, which reads and writes `context`. Returns what
        the program returned. Raises BpfError."""
        options = _RunOptions(
            sz=ctypes.sizeof(_RunOptions),
            ctx_in=ctypes.addressof(context),
            ctx_size_in=ctypes.sizeof(context),
        )
        what, fd = f"running {self.name}/{name}", self.program_fd(name)
        libbpf().check(what, "bpf_prog_test_run_opts", fd, ctypes.byref(options))
        return int(options.retval)

    def close(self) -> None:
        """Detach, newest first, and give up programs and maps; no error if that was done."""
        while self._links:
            libbpf().call("bpf_link__destroy", self._links.pop()[1])
        handle, self._handle = self._handle, 0
        if handle:
            libbpf().call("bpf_object__close", handle)

    # Parts

    def _program(self, name: str) -> int:
        what, find = f"{self.name} has no program {name}", "bpf_object__find_program_by_name"
        return libbpf().pointer(what, find, self._handle, name.encode())

    def _map(self, name: str) -> int:
        what, find = f"{self.name} has no map {name}", "bpf_object__find_map_by_name"
        return libbpf().pointer(what, find, self._handle, name.encode())

    def _types(self) -> Btf:
        """The object's own types, which it keeps."""
        return Btf(libbpf().pointer(f"{self.name}: no types", "bpf_object__btf", self._handle))

    def _initial_value(self, name: str) -> tuple[int, int]:
        """Address and size in bytes of what a map will hold first; to be changed before the load.
        Raises BpfError."""
        what, size = f"{self.name}: map {name} has no value", ctypes.c_size_t()
        place = ctypes.byref(size)
        start = libbpf().pointer(what, "bpf_map__initial_value", self._map(name), place)
        return start, size.value

    def _place(self, section: str, name: str, kind: type[ctypes.c_uint32 | S]) -> int:
        """Offset in bytes of a variable in a data section."""
        place, wanted = self._types().variables(section).get(name), ctypes.sizeof(kind)
        if place is None or place[1] != wanted:
            what = f"{self.name}: no variable {name} of {wanted} bytes in {section}"
            raise BpfError(what, errno.EPROTO)
        return place[0]

    def _constant(self, name: str) -> ctypes.c_uint32:
        """A constant of the programs; to be set before the load. Raises BpfError."""
        offset = self._place(".rodata", name, ctypes.c_uint32)
        start, size = self._initial_value(".rodata")
        if offset + ctypes.sizeof(ctypes.c_uint32) > size:
            raise BpfError(f"{self.name}: {name} is outside of .rodata", errno.EPROTO)
        return ctypes.c_uint32.from_address(start + offset)


def capabilities() -> int:
    """Effective capabilities of this process as a bit mask."""
    # Bytes: the process's name, further up, may have a carriage return in it.
    data = Path("/proc/self/status").read_bytes()
    found = re.search(rb"^CapEff:\s*([0-9a-f]+)$", data, re.MULTILINE)
    return int(found[1], 16) if found else 0


@cache
def _misses(btf: Btf) -> tuple[int, int] | None:
    """Return the size of what the kernel tells of a program, and where in it the count of misses
    is; None where there is none. Found once: it takes a quarter of a millisecond, and is asked for
    several times a second."""
    record = btf.find("bpf_prog_info", KIND_STRUCT)
    place = btf.member(record, "recursion_misses") if record else None
    if record is None or place is None:
        return None
    return btf.record(record)[3], place.offset_bits // 8


@dataclass(frozen=True, slots=True)
class Refusal:
    """Reason why the kernel refuses programs, and what to do about it."""

    why: str
    remedy: str


_LOCKED_DOWN = Refusal(
    "the kernel is locked down: lockdown=confidentiality keeps programs from reading its memory",
    "boot with lockdown=integrity",
)
_NO_TRAMPOLINES = Refusal(
    "the kernel, or a policy on it, refuses programs of this kind: they need "
    "CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS",
    "use a kernel with CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS, and no policy against fentry and "
    "fmod_ret programs",
)


def refusal(number: int) -> Refusal | None:
    """The likely reason for an errno of bpf(2) on this host; None where no reason is known."""
    if number not in _REFUSED:
        return None
    held = capabilities()
    if number in (errno.EPERM, errno.EACCES):
        wanted = {CAP_BPF: "CAP_BPF", CAP_PERFMON: "CAP_PERFMON"}
        missing = [name for bit, name in wanted.items() if not held >> bit & 1]
        if missing and not held >> CAP_SYS_ADMIN & 1:
            lacking = " and ".join(missing)
            return Refusal(
                f"the daemon lacks {lacking}",
                f"run as root with {lacking} (systemd: CapabilityBoundingSet=)",
            )
    # In that mode the helpers that read memory do not exist for the verifier: EINVAL.
    if number in (errno.EPERM, errno.EACCES, errno.EINVAL) and lockdown() == "confidentiality":
        return _LOCKED_DOWN
    if number in (errno.EPERM, errno.ENOMEM) and not held >> CAP_SYS_ADMIN & 1:
        soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if soft != resource.RLIM_INFINITY:
            return Refusal(
                f"RLIMIT_MEMLOCK is {soft}: before Linux 5.11 maps count against it",
                "raise it (systemd: LimitMEMLOCK=infinity)",
            )
    if number in (errno.EPERM, errno.EBUSY, ENOTSUPP):
        return _NO_TRAMPOLINES
    return None


def why_refused(number: int) -> str:
    """The likely reason for an errno of bpf(2), as `refusal` has it; empty where none is known."""
    found = refusal(number)
    return found.why if found else ""


def lockdown() -> str:
    """Lockdown mode of the kernel: none, integrity or confidentiality."""
    try:
        found = re.search(r"\[(\w+)\]", LOCKDOWN.read_text(encoding="ascii"))
    except OSError:
        return "none"  # this kernel has no lockdown
    return found[1] if found else "none"


def verifier_end(said: list[str]) -> str:
    """The end of the verifier's log in libbpf's messages: the program's name, and why it was
    refused."""
    text = "".join(said)
    found = re.search(r"prog '(\w+)': -- BEGIN PROG LOAD LOG --\n(.*?)-- END PROG", text, re.DOTALL)
    if found is None:
        return _last(said)
    # Linux 7.3 explains more after that; the reason itself stands before it, as on older kernels.
    log = found[2].partition("\nVerification failed:")[0].rstrip()
    lines = [line for line in log.split("\n") if not re.match(r"processed \d+ insns", line)]
    return "\n".join([f"program {found[1]}:", *lines[-LOG_LINES:]])


def _last(said: list[str]) -> str:
    return "".join(said[-LOG_LINES:]).strip()
