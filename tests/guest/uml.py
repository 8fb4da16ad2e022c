"""Run a command on a real kernel that is a program: this machine's files inside user-mode Linux.

The fast guest. Python runs in it at the host's speed, and cgroup v2 has its controllers. It has no
BTF, so no BPF programs, no pressure stall information and one CPU: what needs those runs in QEMU
(tests/guest/vm.py). In all else the two are alike: the host's / under an overlay, where writes are
gone afterwards except below the directories shared read-write, and the command's exit status:

    python -m tests.guest.uml --memory 2048 -- pytest tests/guest

Root only: the guest must be able to read and own anything. x86-64 only.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.guest import vm
from tests.guest.boot import EXIT_BROKEN, Boot, Channels, GuestError, Limits, Sink, state_dir
from tests.guest.kernel import KernelError
from tests.guest.uml_kernel import UmlKernel, ensure
from tests.guest.vm import CHECKOUT

MEMORY_MIB = 2048
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Uml:
    """A user-mode Linux to run commands in, one boot per command.

    memory_mib: the guest's RAM, a file of the host's that takes up what the guest has touched.
    rw: directories shared read-write, at the same path inside.
    systemd: boot systemd as PID 1 and run the command as a service.
    root: another root file system for the guest, a directory of the host.
    timeout_sec: for the boot and the command together.
    boot_timeout_sec: until the first sign of life.
    """

    memory_mib: int = MEMORY_MIB
    rw: tuple[Path, ...] = (CHECKOUT / "build",)
    systemd: bool = False
    root: Path = Path("/")
    kernel_args: tuple[str, ...] = ()
    timeout_sec: float = 600
    boot_timeout_sec: float = 60
    verbose: bool = False

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

        Parameters and statuses are those of tests.guest.vm.Guest.run.
        """
        out = out or vm.writer(sys.stdout.fileno())
        err = err or vm.writer(sys.stderr.fileno())
        cwd = Path.cwd() if cwd is None else cwd
        env = passed_env(os.environ) if env is None else env
        try:
            kernel = ensure()
            # It holds a descriptor for each file that the guest has read.
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            with state_dir() as state:
                vm.write_state(state, self.root, self.rw, config_text(self, kernel))
                (state / "command").write_text(vm.command_text(command, cwd, env))
                limits = Limits(self.boot_timeout_sec, self.timeout_sec)
                with Boot(state, limits, out, err, show_console=self.verbose) as boot:
                    argv = partial(uml_argv, self, kernel, state, memory_dir(self.memory_mib))
                    boot.start_machine("uml", argv, kernel.directory)
                    return boot.wait()
        except (GuestError, KernelError) as error:
            err(f"uml: {error}\n".encode())
            return error.exit_status if isinstance(error, GuestError) else EXIT_BROKEN


def passed_env(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environ` that the guest gets too, and those that say where it is."""
    env = {**vm.passed_env(environ), "AGENTCG_GUEST": "uml"}
    del env["AGENTCG_EMULATED"]
    return env


def config_text(uml: Uml, kernel: UmlKernel) -> str:
    """What init.sh needs to know."""
    values = {
        "lower": str(uml.root.absolute()),
        "release": kernel.modules.name,
        "modules": str(kernel.modules),
        "checkout": str(CHECKOUT),
        "pid1": "systemd" if uml.systemd else "command",
        "hostname": "agentcg-guest",
    }
    return vm.shell_text(values, uml.rw)


def memory_dir(memory_mib: int, shared_memory: Path = SHARED_MEMORY) -> Path | None:
    """Where the guest's memory fits: shared memory, which containers often limit, else None."""
    try:
        room = os.statvfs(shared_memory)
    except FileNotFoundError:
        return None
    return shared_memory if room.f_bavail * room.f_frsize >= memory_mib << 20 else None


def uml_argv(
    uml: Uml, kernel: UmlKernel, state: Path, memory: Path | None, channels: Channels
) -> list[str]:
    """The command line of user-mode Linux, to be started in its own directory.

    memory: the directory of the file that holds the guest's memory; None: the state directory.
    """
    environment = {"LD_LIBRARY_PATH": kernel.libraries, "TMPDIR": memory or state}
    return [
        "env",
        *(f"{name}={value}" for name, value in environment.items()),
        f"./{kernel.program.name}",
        f"mem={uml.memory_mib}M",
        "seccomp=auto",  # faster than ptrace, where the host's kernel allows it
        *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "rw"),
        f"init={state}/init.sh",
        *(f"uml_dir={state}", "umid=uml"),  # else below the home directory
        *("con=null", f"con0=fd:{channels.console}", "ssl=null"),
        *(
            f"ssl{number}=fd:{descriptor}"
            for number, descriptor in enumerate((channels.out, channels.err, channels.control))
        ),
        "panic=-1",
        "ignore_loglevel" if uml.verbose else "quiet",
        *(vm.SYSTEMD_ARGS.split() if uml.systemd else ()),
        *uml.kernel_args,
    ]


def parser(prog: str = "python -m tests.guest.uml") -> argparse.ArgumentParser:
    """Options of the guest, then the command."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run a command in user-mode Linux with this machine's files.",
        epilog="Exit status: the command's; 124 out of time; 125 the guest broke.",
    )
    add = parser.add_argument
    add("-m", "--memory", type=int, default=MEMORY_MIB, metavar="MIB", help="(%(default)s)")
    writable = "share DIR read-write, as build/ always is"
    add("-w", "--rw", type=Path, action="append", default=[], metavar="DIR", help=writable)
    add("-s", "--systemd", action="store_true", help="boot systemd, run the command as a service")
    root = "another root file system"
    add("-r", "--root", type=Path, default=Path("/"), metavar="DIR", help=root)
    add("-a", "--kernel-arg", action="append", default=[], metavar="ARG")
    variable = "set a variable, or pass one on (AGENTCG_* and a few more always are)"
    add("-e", "--env", action="append", default=[], metavar="NAME[=VALUE]", help=variable)
    add("-t", "--timeout", type=float, default=600, metavar="SEC", help="(%(default)s)")
    add("-v", "--verbose", action="store_true", help="show the console")
    add("command", nargs="+", help="after --")
    return parser


def from_arguments(arguments: argparse.Namespace) -> Uml:
    """The guest that parsed options describe."""
    return Uml(
        memory_mib=arguments.memory,
        rw=(CHECKOUT / "build", *(path.absolute() for path in arguments.rw)),
        systemd=arguments.systemd,
        root=arguments.root.absolute(),
        kernel_args=tuple(arguments.kernel_arg),
        timeout_sec=arguments.timeout,
        verbose=arguments.verbose,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = parser().parse_args(argv)
    env = vm.add_to_env(passed_env(os.environ), arguments.env)
    uml = from_arguments(arguments)
    return vm.run_as_program(lambda: uml.run(arguments.command, env=env))


if __name__ == "__main__":
    sys.exit(main())
