"""System calls that the standard library does not have, each wrapped once.

Every function raises OSError with the call's name and its subject.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_init1.argtypes = [ctypes.c_int]
_libc.inotify_init1.restype = ctypes.c_int
_libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
_libc.inotify_add_watch.restype = ctypes.c_int
_libc.inotify_rm_watch.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.inotify_rm_watch.restype = ctypes.c_int
_libc.open_by_handle_at.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
_libc.open_by_handle_at.restype = ctypes.c_int

_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.setns.restype = ctypes.c_int

CLONE_NEWCGROUP = 0x0200_0000
"""include/uapi/linux/sched.h."""
_M_ARENA_MAX = -8
"""malloc.h of glibc."""
IN_MODIFY = 0x2
IN_IGNORED = 0x8000
IN_Q_OVERFLOW = 0x4000

SO_PEERPIDFD = 77
"""include/uapi/asm-generic/socket.h; Linux 6.5."""

SO_PASSRIGHTS = 83
"""include/uapi/asm-generic/socket.h; Linux 6.16."""
_CREDENTIALS = struct.Struct("iII")
"""struct ucred: pid, uid, gid (unix(7))."""

_PIDFD_INFO = struct.Struct("=QQ11Ii")
"""The first 64 bytes of struct pidfd_info, include/uapi/linux/pidfd.h."""
_PIDFD_INFO_CGROUPID = 1 << 2
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_GET_INFO = (3 << 30) | (_PIDFD_INFO.size << 16) | (0xFF << 8) | 11


_libc.syscall.restype = ctypes.c_long
_SYS_BPF = {"x86_64": 321, "aarch64": 280}
"""arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h."""


def _check(result: int, call: str, subject: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}", subject)
    return result


def inotify_init() -> int:
    """Open an inotify descriptor, non-blocking and close-on-exec."""
    return _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1", "")


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """Watch `path`; returns the watch descriptor."""
    return _check(_libc.inotify_add_watch(fd, os.fsencode(path), mask), "inotify_add_watch", path)


def inotify_rm_watch(fd: int, watch: int) -> bool:
    """End a watch; False if the kernel already did, because the file is gone."""
    if _libc.inotify_rm_watch(fd, watch) == 0:
        return True
    if ctypes.get_errno() == errno.EINVAL:
        return False
    _check(-1, "inotify_rm_watch", str(watch))
    return False


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """The process at the other end of a Unix socket, as the kernel recorded it at connect(2)."""

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """Read SO_PEERCRED. `pid` is 0 if the peer's pid namespace is not below this process's."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return PeerCredentials(*_CREDENTIALS.unpack(raw))


def peer_pidfd(sock: socket.socket) -> int:
    """Open a pidfd of the peer process. SO_PEERPIDFD names that very process; before Linux 6.5 the
    pid of SO_PEERCRED is opened instead, and a pid given out again in between goes unnoticed.
    Either is close-on-exec."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return os.pidfd_open(peer_credentials(sock).pid)


def receive_from(sock: socket.socket, most_bytes: int) -> tuple[bytes, int | None]:
    """Receive from a Unix socket whose listener has SO_PASSCRED; returns the data and the pid of
    the process that sent it, None where the kernel told none. A process can have inherited the
    socket of the one that connected; the kernel fills in the sender unless a process with
    CAP_SYS_ADMIN names another."""
    # There is room for the credentials alone, so that descriptors that come along are dropped.
    data, ancillary, _, _ = sock.recvmsg(most_bytes, socket.CMSG_SPACE(_CREDENTIALS.size))
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return data, int(_CREDENTIALS.unpack(raw)[0])
    return data, None


def has_peer_pidfd() -> bool:
    """Whether this kernel has SO_PEERPIDFD."""
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        try:
            os.close(left.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            return False
    return True


def setns(fd: int, kind: int) -> None:
    """Enter the namespace that `fd` stands for, with the calling thread alone (setns(2))."""
    _check(_libc.setns(fd, kind), "setns", f"descriptor {fd}")


def use_few_arenas(count: int) -> None:
    """Have malloc keep at most `count` arenas, so that memory freed by one thread serves another
    (mallopt(3))."""
    if hasattr(_libc, "mallopt"):  # glibc alone has it
        _libc.mallopt(ctypes.c_int(_M_ARENA_MAX), ctypes.c_int(count))


def give_memory_back() -> None:
    """Give free memory of malloc back to the kernel (malloc_trim(3))."""
    if hasattr(_libc, "malloc_trim"):  # glibc alone has it
        _libc.malloc_trim(ctypes.c_size_t(0))


def refuse_descriptors(sock: socket.socket) -> bool:
    """Have nobody send descriptors over a Unix socket or, where it listens, over what it accepts.
    Returns whether the kernel does that; before Linux 6.16 the kernel drops them when the message
    is received without room for them."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


_SIGINFO = struct.Struct("=iiiiiIQ92x")
"""siginfo_t of a signal with a value: number, errno, code, padding, pid, uid, value
(include/uapi/asm-generic/siginfo.h)."""
_SI_QUEUE = -1
_SYS_PIDFD_SEND_SIGNAL = 424
"""include/uapi/asm-generic/unistd.h, the same on all architectures."""


def queue_signal(pidfd: int, number: int, value: int) -> None:
    """Send a signal with a value of 64 bits, as sigqueue(3) does, to the process of a pidfd."""
    info = _SIGINFO.pack(number, 0, _SI_QUEUE, 0, os.getpid(), os.getuid(), value)
    arguments = (ctypes.c_int(pidfd), ctypes.c_int(number), info, ctypes.c_uint(0))
    call = ctypes.c_long(_SYS_PIDFD_SEND_SIGNAL)
    _check(_libc.syscall(call, *arguments), "pidfd_send_signal", f"descriptor {pidfd}")


def pidfd_alive(fd: int) -> bool:
    """Whether the process of a pidfd has its pid still: it runs, or nobody has waited for it."""
    try:
        signal.pidfd_send_signal(fd, 0)
    except ProcessLookupError:
        return False
    return True


def cpus_of(pid: int) -> int | None:
    """Count the CPUs on which a process may run; None: it has ended."""
    try:
        return len(os.sched_getaffinity(pid))
    except ProcessLookupError:
        return None


def pidfd_ended(fd: int) -> bool:
    """Whether all threads of a pidfd's process have ended, reaped or not; a zombie main thread
    alone does not say so."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def wait_channel(pid: int) -> str:
    """Name of the kernel function in which the main thread of a process waits; `?` where the kernel
    does not tell, `nothing` while it runs."""
    try:
        with open(f"/proc/{pid}/wchan", "rb") as file:
            name = file.read(64).decode("ascii", "replace")
    except OSError:
        return "?"
    return "nothing" if name in ("", "0") else name


@dataclass(frozen=True, slots=True)
class PidfdInfo:
    """What the kernel tells of the process of a pidfd."""

    wait_status: int | None
    """Of a process that has ended and was reaped (Linux 6.15); None: it has not been, or the kernel
    does not keep it."""
    cgroup_id: int | None
    """The cgroup that it is in, or was in when it ended (Linux 6.13); None: the kernel does not
    tell."""


def pidfd_info(fd: int) -> PidfdInfo:
    """Ask the kernel about a process, whether it lives or was reaped."""
    wanted = _PIDFD_INFO_EXIT | _PIDFD_INFO_CGROUPID
    buffer = bytearray(_PIDFD_INFO.pack(wanted, 0, *([0] * 11), 0))
    try:
        fcntl.ioctl(fd, _PIDFD_GET_INFO, buffer)
    except OSError as error:
        # ESRCH: reaped, on a kernel without PIDFD_INFO_EXIT. ENOTTY, EINVAL: no PIDFD_GET_INFO.
        if error.errno in (errno.ESRCH, errno.ENOTTY, errno.EINVAL):
            return PidfdInfo(None, None)
        raise
    fields = _PIDFD_INFO.unpack(buffer)
    mask, cgroup, exit_code = int(fields[0]), int(fields[1]), int(fields[-1])
    return PidfdInfo(
        exit_code if mask & _PIDFD_INFO_EXIT else None,
        cgroup if mask & _PIDFD_INFO_CGROUPID else None,
    )


def pidfd_exit_status(fd: int) -> int | None:
    """Wait status of a process that has ended and was reaped, from the kernel (Linux 6.15).

    None while it has not been reaped, or on kernels that do not keep it.
    """
    return pidfd_info(fd).wait_status


_CGROUP_HANDLE = struct.Struct("=IiQ")
"""struct file_handle of a cgroup: 8 bytes of type FILEID_KERNFS, which are its id
(include/linux/exportfs.h)."""
_FILEID_KERNFS = 0xFE


def open_cgroup(mount: int, cgroup_id: int) -> int:
    """Open the directory of a cgroup by its id. `mount`: a descriptor of the mount. Raises OSError;
    ESTALE: it was removed."""
    handle = ctypes.create_string_buffer(_CGROUP_HANDLE.pack(8, _FILEID_KERNFS, cgroup_id), 16)
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    return _check(
        _libc.open_by_handle_at(mount, handle, flags), "open_by_handle_at", str(cgroup_id)
    )


def cgroup_is_gone(mount: int, cgroup_id: int) -> bool:
    """Tell whether there is no cgroup of this id any more, for all that can be told. `mount`: a
    descriptor of the mount, or of any cgroup of it."""
    try:
        os.close(open_cgroup(mount, cgroup_id))
    except OSError as error:
        return error.errno == errno.ESTALE
    return False


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """The fields of /proc/<pid>/stat that are used here (proc_pid_stat(5))."""

    state: str
    parent_pid: int
    group: int
    session: int
    terminal: int
    """Device number of its controlling terminal; 0: it has none."""
    start_ticks: int
    exit_status: int
    """Wait status; meaningful while state is Z."""


_READ_BYTES = 16_384
_HALF_PAGE_BYTES = 2048


def read_whole(path: str, dir_fd: int | None = None) -> bytes:
    """Read all of a file of /proc or of a cgroup. Lists must have lines shorter than half a page.
    `dir_fd`: the directory that `path` is below. Raises OSError."""
    # Without the system calls by which open() finds out what kind of file it is: a call that begins
    # or ends asks for many such files.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        more = data = os.read(fd, _READ_BYTES)
        # The kernel hands out as many whole lines as fit into a page (fs/seq_file.c). They are
        # shorter than half a page, so a read that gives less than that was the last.
        while len(more) >= _HALF_PAGE_BYTES:
            more = os.read(fd, _READ_BYTES)
            data += more
        return data
    finally:
        os.close(fd)


def process_stat(pid: int) -> ProcessStat:
    """Read /proc/<pid>/stat; FileNotFoundError or ProcessLookupError when there is no such
    process."""
    data = read_whole(f"/proc/{pid}/stat")
    fields = data[data.rindex(b")") + 2 :].split()
    return ProcessStat(
        state=fields[0].decode(),
        parent_pid=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        terminal=int(fields[4]),
        start_ticks=int(fields[19]),
        exit_status=int(fields[49]),
    )


def bpf(command: int, attributes: ctypes.Structure) -> int:
    """Call bpf(2) with a `union bpf_attr` laid out by the caller, for what libbpf does not know.
    Returns its result, at least 0."""
    number = _SYS_BPF[os.uname().machine]
    size = ctypes.c_long(ctypes.sizeof(attributes))
    result = _libc.syscall(
        ctypes.c_long(number), ctypes.c_long(command), ctypes.byref(attributes), size
    )
    return _check(int(result), "bpf", f"command {command}")
