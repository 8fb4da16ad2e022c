"""Functions of libbpf that are used here, each declared once, and the errors that they return.

The library comes with the wheel (bpf/lib/libbpf.so.1); without it the system's own is taken. Since
libbpf 1.0 a function that fails returns a negative errno, or NULL with errno set.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_int, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from agentcgroupd.errors import BpfError

BUNDLED = Path(__file__).parent / "lib/libbpf.so.1"
LEAST_VERSION = (1, 4)
"""The first version that loads struct_ops maps with optional programs."""
MESSAGES_KEPT = 4000
_OWN_ERRORS = 4000
"""__LIBBPF_ERRNO__START in bpf/libbpf.h."""

Pointer = c_void_p
SampleCallback = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)
_PrintCallback = CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "libbpf_version_string": (c_char_p, ()),
    "libbpf_set_print": (c_void_p, (c_void_p,)),
    "bpf_object__open_file": (Pointer, (c_char_p, c_void_p)),
    "bpf_object__close": (None, (Pointer,)),
    "bpf_object__load": (c_int, (Pointer,)),
    "bpf_object__next_program": (Pointer, (Pointer, Pointer)),
    "bpf_object__find_program_by_name": (Pointer, (Pointer, c_char_p)),
    "bpf_object__find_map_by_name": (Pointer, (Pointer, c_char_p)),
    "bpf_object__btf": (Pointer, (Pointer,)),
    "bpf_program__name": (c_char_p, (Pointer,)),
    "bpf_program__set_autoload": (c_int, (Pointer, c_bool)),
    "bpf_program__autoload": (c_bool, (Pointer,)),
    "bpf_program__attach": (Pointer, (Pointer,)),
    "bpf_program__fd": (c_int, (Pointer,)),
    "bpf_link__destroy": (c_int, (Pointer,)),
    "bpf_link__fd": (c_int, (Pointer,)),
    "bpf_map__fd": (c_int, (Pointer,)),
    "bpf_map__key_size": (c_uint32, (Pointer,)),
    "bpf_map__value_size": (c_uint32, (Pointer,)),
    "bpf_map__initial_value": (c_void_p, (Pointer, POINTER(c_size_t))),
    "bpf_map__set_autocreate": (c_int, (Pointer, c_bool)),
    "bpf_map__set_max_entries": (c_int, (Pointer, c_uint32)),
    "bpf_map__reuse_fd": (c_int, (Pointer, c_int)),
    "bpf_map__attach_struct_ops": (Pointer, (Pointer,)),
    "bpf_map__max_entries": (c_uint32, (Pointer,)),
    "bpf_map_update_elem": (c_int, (c_int, c_void_p, c_void_p, ctypes.c_uint64)),
    "bpf_map_lookup_elem": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_map_delete_elem": (c_int, (c_int, c_void_p)),
    "bpf_map_get_next_key": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_obj_pin": (c_int, (c_int, c_char_p)),
    "bpf_obj_get": (c_int, (c_char_p,)),
    "bpf_obj_get_info_by_fd": (c_int, (c_int, c_void_p, POINTER(c_uint32))),
    "bpf_map_get_next_id": (c_int, (c_uint32, c_void_p)),
    "bpf_map_get_fd_by_id": (c_int, (c_uint32,)),
    "bpf_prog_test_run_opts": (c_int, (c_int, c_void_p)),
    "bpf_link_create": (c_int, (c_int, c_int, c_int, c_void_p)),
    "bpf_program__set_expected_attach_type": (c_int, (Pointer, c_int)),
    "bpf_prog_attach": (c_int, (c_int, c_int, c_int, c_uint32)),
    "bpf_prog_detach2": (c_int, (c_int, c_int, c_int)),
    "bpf_prog_query": (c_int, (c_int, c_int, c_uint32, c_void_p, c_void_p, c_void_p)),
    "bpf_prog_get_fd_by_id": (c_int, (c_uint32,)),
    "ring_buffer__new": (Pointer, (c_int, c_void_p, c_void_p, c_void_p)),
    "ring_buffer__consume": (c_int, (Pointer,)),
    "ring_buffer__epoll_fd": (c_int, (Pointer,)),
    "ring_buffer__free": (None, (Pointer,)),
    "btf__load_vmlinux_btf": (Pointer, ()),
    "btf__parse": (Pointer, (c_char_p, c_void_p)),
    "btf__free": (None, (Pointer,)),
    "btf__find_by_name_kind": (ctypes.c_int32, (Pointer, c_char_p, c_uint32)),
    "btf__type_by_id": (c_void_p, (Pointer, c_uint32)),
    "btf__name_by_offset": (c_char_p, (Pointer, c_uint32)),
    "btf__type_cnt": (c_uint32, (Pointer,)),
    "btf__resolve_size": (ctypes.c_int64, (Pointer, c_uint32)),
}


class Libbpf:
    """The loaded library, to be had from `libbpf()`."""

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        """Declare the functions. Raises AttributeError if the library lacks one."""
        self.path = path
        self._library = library
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
        self.version = str(library.libbpf_version_string().decode())
        self._messages: list[str] = []
        # Kept for as long as the library may call it.
        self._print = _PrintCallback(self._collect)
        library.libbpf_set_print(ctypes.cast(self._print, c_void_p))
        libc = ctypes.CDLL(None, use_errno=True)
        self._vsnprintf = libc.vsnprintf
        self._vsnprintf.argtypes = (c_void_p, c_size_t, c_char_p, c_void_p)

    def _collect(self, level: int, template: bytes, arguments: int) -> int:
        """Keep a message of libbpf if it is a warning (level 0)."""
        if level == 0:
            buffer = ctypes.create_string_buffer(1 << 16)
            self._vsnprintf(buffer, len(buffer), template, arguments)
            self._messages.append(buffer.value.decode("utf-8", "replace"))
            del self._messages[:-MESSAGES_KEPT]
        return 0

    @contextmanager
    def messages(self) -> Iterator[list[str]]:
        """Collect libbpf's warnings during the block, in order. Not for two threads at once."""
        outer, self._messages = self._messages, []
        try:
            yield self._messages
        finally:
            self._messages = outer

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function and return its result unchecked."""
        return getattr(self._library, name)(*arguments)

    def check(self, what: str, name: str, *arguments: Any) -> int:
        """Call a function that returns an int. Raises BpfError, which says `what` was tried, if the
        int is negative."""
        result = int(self.call(name, *arguments))
        if result < 0:
            raise BpfError(what, errno_of(-result))
        return result

    def pointer(self, what: str, name: str, *arguments: Any) -> int:
        """Call a function that returns a pointer. Raises BpfError, which says `what` was tried, if
        the pointer is NULL."""
        ctypes.set_errno(0)
        result = self.call(name, *arguments)
        if not result:
            raise BpfError(what, errno_of(ctypes.get_errno() or errno.EINVAL))
        return int(result)


@cache
def libbpf() -> Libbpf:
    """The library, loaded once. Raises BpfError, which says what to install."""
    candidates = [str(BUNDLED)] if BUNDLED.exists() else []
    reasons = []
    for path in [*candidates, "libbpf.so.1"]:
        try:
            library = Libbpf(ctypes.CDLL(path, use_errno=True), path)
        except (OSError, AttributeError) as error:
            reasons.append(str(error))
            continue
        version = tuple(int(part) for part in library.version.lstrip("v").split(".")[:2])
        if version >= LEAST_VERSION:
            return library
        reasons.append(f"{path} is {library.version}")
    raise BpfError(
        f"libbpf {'.'.join(map(str, LEAST_VERSION))} or newer is needed, with libelf1 and zlib1g "
        f"(Debian packages): {'; '.join(reasons)}",
        errno.ENOENT,
    )


def errno_of(number: int) -> int:
    """An errno for a number that libbpf returned. ENOEXEC stands for libbpf's own numbers: each of
    them says that libbpf cannot use the file."""
    return errno.ENOEXEC if number >= _OWN_ERRORS else number


def pid_namespace() -> int:
    """Inode of this process's pid namespace. Raises OSError."""
    return os.stat("/proc/self/ns/pid").st_ino
