"""Run the tests of this package with real container runtimes, in a guest.

    python -m tests.containers                        # in user-mode Linux, cgroupfs drivers
    python -m tests.containers --systemd              # the same with systemd, its drivers
    python -m tests.containers --qemu                 # in QEMU with systemd as PID 1 (slow)
    python -m tests.containers --suite trixie -- -k docker -x

The root file system with the runtimes is made once (tests.containers.root).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tests.containers.root import SUITES, RootError, ensure
from tests.guest import uml, vm
from tests.guest.boot import EXIT_BROKEN

LIMIT_SEC = 5400
MEMORY_MIB = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status of pytest."""
    parser = argparse.ArgumentParser(prog="python -m tests.containers", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default=SUITES[0])
    parser.add_argument("--qemu", action="store_true")
    parser.add_argument("--systemd", action="store_true", help="systemd makes the cgroups")
    parser.add_argument("pytest", nargs="*", help="after --")
    given = parser.parse_args(argv)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "--timeout=600"]
    command += [*given.pytest, "tests/containers"]
    return run(command, given.suite, with_systemd=given.systemd, qemu=given.qemu)


def run(command: Sequence[str], suite: str, *, with_systemd: bool, qemu: bool) -> int:
    """Run a command in a guest that has container runtimes; returns its exit status."""
    try:
        root = ensure(suite)
    except RootError as error:
        print(f"containers: {error}", file=sys.stderr)
        return EXIT_BROKEN
    guest: uml.Uml | vm.Guest
    if qemu:
        guest = vm.Guest(memory_mib=MEMORY_MIB, systemd=True, root=root, timeout_sec=LIMIT_SEC)
        env = vm.passed_env(os.environ)
    else:
        guest = uml.Uml(
            memory_mib=MEMORY_MIB, systemd=with_systemd, root=root, timeout_sec=LIMIT_SEC
        )
        env = uml.passed_env(os.environ)
    env["PATH"] = f"{os.path.dirname(sys.executable)}:/usr/sbin:/usr/bin:/sbin:/bin"
    return vm.run_as_program(lambda: guest.run(list(command), cwd=vm.CHECKOUT, env=env))


if __name__ == "__main__":
    sys.exit(main())
