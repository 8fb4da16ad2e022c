"""Run a command on a real, recent kernel: this machine's files inside a QEMU guest.

The guest needs no hardware virtualisation, no disk image and no initramfs. Its root is the host's
/ over virtiofs, under an overlay: it sees the same programs and the same checkout at the same
paths, and what it writes is gone afterwards, except below the directories shared read-write. The
command's output streams out while it runs and its exit status comes back. A guest that panics,
hangs or never starts ends as an exit status too, with the console's last lines, in bounded time:

    python -m tests.guest.vm --memory 2048 -- pytest tests/guest

Root only: the file server must be able to read and own anything. x86-64 only.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.guest.boot import (
    EXIT_BROKEN,
    FILES_SOCKET,
    Boot,
    Channels,
    GuestError,
    Limits,
    Sink,
    state_dir,
)
from tests.guest.kernel import NEWEST, Kernel, KernelError, ensure

CHECKOUT = Path(__file__).resolve().parents[2]
# What a command is likely to need of its caller's environment; AGENTCG_* goes along as well.
PASSED = ("PATH", "LANG", "LC_ALL", "TZ", "TRACES", "COLUMNS", "PYTHONUNBUFFERED")

KERNEL_ARGS = (
    "root=host rootfstype=virtiofs rw console=ttyS0 panic=-1 oops=panic "
    # Time that emulation cannot spare, and clocks that it keeps well enough unasked.
    "mitigations=off init_on_alloc=0 audit=0 nowatchdog kfence.sample_interval=0 cryptomgr.notests "
    "nokaslr ima=off rcupdate.rcu_expedited=1 8250.nr_uarts=1 random.trust_cpu=on "
    "lpj=5000000 tsc=reliable no_timer_check "
    "lsm=landlock,lockdown,yama,bpf"
)
DISK_SERIAL = "agentcg-test"
"""Serial number of a guest's own disk, by which tests know that they may write to it."""
C_FILE_SERVER = Path("/usr/lib/qemu/virtiofsd")
SYSTEMD_ARGS = (
    "systemd.unit=agentcg-guest.target systemd.show_status=0 systemd.firstboot=0 "
    # The host's file systems, encrypted disks and partitions are not the guest's.
    "fstab=no luks=no systemd.gpt_auto=0"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A virtual machine to run commands in, one boot per command.

    memory_mib: the guest's RAM; overlay, /tmp and /run live in it too.
    cpus: virtual CPUs, all emulated by one host thread.
    rw: directories shared read-write, at the same path inside.
    systemd: boot systemd as PID 1 and run the command as a service.
    root: another root file system for the guest, a directory of the host.
    kernel: what tests.guest.kernel.ensure takes.
    timeout_sec: for the boot and the command together.
    boot_timeout_sec: until the first sign of life.
    disk: size in MiB and speed in MiB a second of a disk of its own, which has the serial
    number DISK_SERIAL; None: there is none.
    """

    memory_mib: int = 1024
    cpus: int = 2
    rw: tuple[Path, ...] = (CHECKOUT / "build",)
    systemd: bool = False
    root: Path = Path("/")
    kernel: str = NEWEST
    kernel_args: tuple[str, ...] = ()
    timeout_sec: float = 600
    boot_timeout_sec: float = 120
    verbose: bool = False
    disk: tuple[int, int] | None = None

    def run(
        self,
        command: str | Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        out: Sink | None = None,
        err: Sink | None = None,
    ) -> int:
        """Boot, run `command` (a string goes through sh), and return its exit status.

        cwd: where the command starts; default: here.
        env: its whole environment; default: what `passed_env` picks from ours.
        out, err: take the command's output as it comes; default: our own standard streams.
        Returns 128+n for a command killed by signal n, 124 past timeout_sec, and 125 for a guest
        that broke; the reason is then on `err`.
        """
        out = out or writer(sys.stdout.fileno())
        err = err or writer(sys.stderr.fileno())
        cwd = Path.cwd() if cwd is None else cwd
        env = passed_env(os.environ) if env is None else env
        try:
            kernel = ensure(self.kernel)
            with state_dir() as state:
                write_state(state, self.root, self.rw, config_text(self, kernel))
                (state / "command").write_text(command_text(command, cwd, env))
                limits = Limits(self.boot_timeout_sec, self.timeout_sec)
                with Boot(state, limits, out, err, show_console=self.verbose) as boot:
                    boot.start_file_server(partial(file_server_argv, find_file_server()))
                    boot.start_machine("qemu", partial(qemu_argv, self, kernel, state))
                    return boot.wait()
        except (GuestError, KernelError) as error:
            err(f"guest: {error}\n".encode())
            return error.exit_status if isinstance(error, GuestError) else EXIT_BROKEN


def passed_env(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environ` that the guest gets too, and those that say where it is."""
    keep = {
        name: value
        for name, value in environ.items()
        if name in PASSED or name.startswith("AGENTCG_")
    }
    here = {"AGENTCG_WHERE": "native", "AGENTCG_GUEST": "qemu", "AGENTCG_EMULATED": "1"}
    return {**keep, **here}


# --- what the guest reads ------------------------------------------------------------------------


def write_state(state: Path, root: Path, rw: Sequence[Path], config: str) -> None:
    """Write init.sh and its config. Raises GuestError for what cannot work.

    root: the guest's root file system. rw: the directories that are shared read-write.
    """
    if not (root / "bin/sh").exists():
        raise GuestError(f"no root file system in {root}: it has no /bin/sh")
    for directory in rw:
        if not directory.is_absolute():
            raise GuestError(f"{directory}: a shared directory needs an absolute path")
        directory.mkdir(parents=True, exist_ok=True)
    (state / "work").mkdir()
    init = state / "init.sh"
    shutil.copyfile(CHECKOUT / "tests/guest/init.sh", init)
    init.chmod(0o755)
    (state / "config").write_text(config)


def config_text(guest: Guest, kernel: Kernel) -> str:
    """What init.sh needs to know."""
    values = {
        "lower": str(guest.root.absolute()),
        "release": kernel.release,
        "modules": str(kernel.modules),
        "checkout": str(CHECKOUT),
        "pid1": "systemd" if guest.systemd else "command",
        "hostname": "agentcg-guest",
    }
    return shell_text(values, guest.rw)


def shell_text(values: Mapping[str, str], rw: Sequence[Path]) -> str:
    """Shell assignments; the shared directories become positional parameters."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    lines.append(shlex.join(["set", "--", *(str(directory) for directory in rw)]))
    return "\n".join(lines) + "\n"


def command_text(command: str | Sequence[str], cwd: Path, env: Mapping[str, str]) -> str:
    """A shell script that becomes the command."""
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    exports = [f"export {name}={shlex.quote(env[name])}" for name in sorted(env)]
    change = f"cd {shlex.quote(str(cwd))} || exit {EXIT_BROKEN}"
    return "\n".join([*exports, change, f"exec {shlex.join(argv)}"]) + "\n"


# --- command lines -------------------------------------------------------------------------------


def qemu_argv(guest: Guest, kernel: Kernel, state: Path, channels: Channels) -> list[str]:
    """QEMU's command line."""
    words = [KERNEL_ARGS, f"init={state}/init.sh"]
    words.append("ignore_loglevel" if guest.verbose else "quiet")
    if guest.systemd:
        words.append(SYSTEMD_ARGS)
    words.extend(guest.kernel_args)
    argv = [
        "qemu-system-x86_64",
        *("-machine", "q35,memory-backend=memory,vmport=off,hpet=off"),
        # With one thread per virtual CPU, guests panic at random (int3, seen with QEMU 7.2).
        *("-accel", "tcg,thread=single"),
        *("-cpu", "max,la57=off"),
        *("-smp", str(guest.cpus)),
        *("-m", str(guest.memory_mib)),
        *("-object", f"memory-backend-memfd,id=memory,size={guest.memory_mib}M,share=on"),
        *("-kernel", str(kernel.vmlinux)),
        *("-append", " ".join(words)),
        *("-chardev", f"socket,id=host,path={state / FILES_SOCKET}"),
        *("-device", "vhost-user-fs-pci,chardev=host,tag=host,queue-size=1024"),
        *("-device", "virtio-serial-pci,max_ports=4"),
    ]
    for number, (name, descriptor) in enumerate(
        [("out", channels.out), ("err", channels.err), ("control", channels.control)], start=1
    ):
        argv += ["-chardev", f"socket,id={name},fd={descriptor}"]
        argv += ["-device", f"virtserialport,chardev={name},nr={number}"]
    argv += ["-chardev", f"socket,id=console,fd={channels.console}", "-serial", "chardev:console"]
    if guest.disk is not None:
        size_mib, mib_per_s = guest.disk
        image = state / "disk"
        image.touch()
        os.truncate(image, size_mib << 20)
        speed = f"throttling.bps-total={mib_per_s << 20}"
        argv += ["-drive", f"file={image},if=none,id=disk,format=raw,cache=unsafe,{speed}"]
        argv += ["-device", f"virtio-blk-pci,drive=disk,serial={DISK_SERIAL}"]
    return [*argv, "-display", "none", "-nodefaults", "-no-reboot", "-no-user-config"]


def file_server_argv(binary: Path, descriptor: int) -> list[str]:
    """virtiofsd's command line: the one in C that came with QEMU until 7.2, or the Rust one."""
    argv = [str(binary), f"--fd={descriptor}"]
    if binary == C_FILE_SERVER:
        options = ("source=/", "cache=always", "sandbox=chroot", "xattr", "no_posix_lock")
        return argv + [word for option in options for word in ("-o", option)]
    # Announced submounts become automounts in the guest, and overlayfs refuses those (EREMOTE).
    options = ("shared-dir=/", "cache=always", "sandbox=chroot", "xattr", "no-announce-submounts")
    return [*argv, *(f"--{option}" for option in options), "--log-level=error"]


def find_file_server() -> Path:
    """virtiofsd is never in PATH. Raises GuestError."""
    for path in (C_FILE_SERVER, Path("/usr/libexec/virtiofsd")):
        # Later Debians keep a symbolic link in the old place, to another program.
        if os.access(path, os.X_OK) and path.resolve() == path:
            return path
    raise GuestError("virtiofsd is missing (Debian: qemu-system-common, later virtiofsd)")


# --- command line --------------------------------------------------------------------------------


def parser(prog: str = "python -m tests.guest.vm") -> argparse.ArgumentParser:
    """Options of the guest, then the command."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run a command in a QEMU guest with a recent kernel and this machine's files.",
        epilog="Exit status: the command's; 124 out of time; 125 the guest broke.",
    )
    add = parser.add_argument
    add("-m", "--memory", type=int, default=1024, metavar="MIB", help="RAM (default %(default)s)")
    add("-c", "--cpus", type=int, default=2, metavar="N", help="virtual CPUs (default %(default)s)")
    add(
        "-w",
        "--rw",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="share DIR read-write, as build/ always is",
    )
    add("-s", "--systemd", action="store_true", help="boot systemd, run the command as a service")
    add(
        "-r", "--root", type=Path, default=Path("/"), metavar="DIR", help="another root file system"
    )
    add(
        "-k",
        "--kernel",
        default=os.environ.get("AGENTCG_KERNEL", NEWEST),
        metavar="VERSION",
        help="such as 6.12 (default: $AGENTCG_KERNEL, or the newest)",
    )
    add("-a", "--kernel-arg", action="append", default=[], metavar="ARG")
    add(
        "-e",
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="set a variable, or pass one on (AGENTCG_* and a few more always are)",
    )
    add(
        "-d",
        "--disk",
        metavar="MIB:MIB_PER_S",
        type=lambda text: tuple(int(word) for word in text.split(":")),
        help="a disk of this size and speed",
    )
    add("-t", "--timeout", type=float, default=600, metavar="SEC", help="default %(default)s")
    add("-v", "--verbose", action="store_true", help="show the console")
    add("command", nargs="+", help="after --")
    return parser


def from_arguments(arguments: argparse.Namespace) -> Guest:
    """The guest that parsed options describe."""
    return Guest(
        memory_mib=arguments.memory,
        cpus=arguments.cpus,
        rw=(CHECKOUT / "build", *(path.absolute() for path in arguments.rw)),
        systemd=arguments.systemd,
        root=arguments.root.absolute(),
        kernel=arguments.kernel,
        kernel_args=tuple(arguments.kernel_arg),
        timeout_sec=arguments.timeout,
        verbose=arguments.verbose,
        disk=arguments.disk,
    )


def add_to_env(env: dict[str, str], items: Sequence[str]) -> dict[str, str]:
    """Return the environment with what the options --env ask for: NAME=VALUE, or NAME of ours."""
    env = dict(env)
    for item in items:
        name, given, value = item.partition("=")
        if given:
            env[name] = value
        elif name in os.environ:
            env[name] = os.environ[name]
    return env


def writer(descriptor: int) -> Sink:
    """A sink that writes to a descriptor, unbuffered."""

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    return write


def _terminated(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def run_as_program(run: Callable[[], int]) -> int:
    """Run a guest as a command-line program does; return the exit status.

    SIGTERM, SIGHUP and Ctrl-C end the guest and leave nothing behind.
    """
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGHUP, _terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    if os.geteuid() != 0:
        print("guest: needs root, to serve this machine's files to the guest", file=sys.stderr)
        return EXIT_BROKEN
    try:
        return run()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as in `... | head`
        return 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = parser().parse_args(argv)
    env = add_to_env(passed_env(os.environ), arguments.env)
    guest = from_arguments(arguments)
    return run_as_program(lambda: guest.run(arguments.command, env=env))


if __name__ == "__main__":
    sys.exit(main())
