"""The suites of `make test`, and the place in which each of them runs. docs/testing.md says which
test belongs where, tests/conftest.py what the markers mean."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tests.guest.vm import CHECKOUT
from tests.guest.where import Kind

RESULTS = CHECKOUT / "build/test"
PYTEST = [str(CHECKOUT / ".venv/bin/python"), "-m", "pytest", "-p", "no:cacheprovider"]
SCHED = (
    "tests/guest/test_cpu.py",
    "tests/guest/test_disk_hogs.py",
    "tests/guest/test_disk_shares.py",
    "tests/guest/test_sched.py",
    "tests/guest/test_sched_holds.py",
)
"""A suite of their own, so that the work can be shared out more evenly. Its guest has a disk."""
PROGRAMS = (
    *(
        f"tests/guest/test_{name}.py"
        for name in (
            "container_limits",
            "endings",
            "growers",
            "guard",
            "guest_self",
            "limits",
            "look",
            "memcg_ops",
            "memory_programs",
            "outlive",
            "policy_faults",
            "small_host",
            "zram",
        )
    ),
    *(
        f"tests/kernel/test_{name}.py"
        for name in (
            "boundaries",
            "bpf_doctor",
            "bpf_faults",
            "bpf_types",
            "gpu_gate",
            "look",
            "memcg_ops_object",
            "psi",
            "tree",
            "vram",
        )
    ),
)
"""Files with something for a full kernel: in QEMU it takes seconds to import each.

Not among them is what does not depend on the kernel's age: the host is enough for it.
"""

Place = Literal["native", "uml", "qemu"]
GUESTS: dict[Place, str] = {"uml": "tests.guest.uml", "qemu": "tests.guest.vm"}
"""The programs that run a command in a guest."""

ON_HOST = "not controllers and not waits"
WAITING = "waits and not controllers"
FULL_KERNEL = "programs or psi or full_kernel"
"""What user-mode Linux lacks, by the markers of tests/conftest.py."""
IN_UML = f"not full_speed and not waits and not ({FULL_KERNEL})"
IN_QEMU = f"not full_speed and not waits and ({FULL_KERNEL} or with_programs)"


@dataclass(frozen=True, slots=True)
class Suite:
    """Some tests, and the place and the time that they get.

    marks: pytest's -m. test_limit_sec: for one test; limit_sec: for all, the boot included.
    """

    name: str
    paths: tuple[str, ...]
    place: Place
    limit_sec: int
    test_limit_sec: int = 120
    marks: str = ""
    guest_options: tuple[str, ...] = ()
    goes_first: bool = False
    """Whether the guest has a CPU before the other suite: what it measures is time."""
    is_idle: bool = False
    """Whether it hardly needs a CPU, so that it runs beside two others."""

    @property
    def results(self) -> Path:
        """Where pytest writes what happened."""
        return RESULTS / f"{self.name}.xml"

    def selection(self) -> list[str]:
        """The arguments of pytest that choose the tests."""
        marks = ["-m", self.marks] if self.marks else []
        return [*marks, *self.paths]

    def argv(self, extra: Sequence[str] = ()) -> list[str]:
        """The command that runs it."""
        # The older form of the results names each test's file.
        results = [f"--junit-xml={self.results}", "-o", "junit_family=xunit1"]
        pytest = [*PYTEST, *results, f"--timeout={self.test_limit_sec}"]
        if self.place == "native":
            return [*pytest, *extra, *self.selection()]
        guest = [sys.executable, "-m", GUESTS[self.place], f"--timeout={self.limit_sec}"]
        # Verbose, because a guest is slow: each test shows as it ends.
        return [*guest, *self.guest_options, "--", *pytest, "-v", *extra, *self.selection()]


def plan(where: Kind, systemd_here: bool) -> tuple[list[Suite], list[str]]:
    """The suites in the order in which they begin, and what is left out.

    systemd_here: PID 1 is systemd.
    """
    if where == "guest":
        return _with_guests(), []
    suites = [
        Suite("host", ("tests/unit", "tests/fuzz", "tests/kernel", "tests/guest"), "native", 1100)
    ]
    if systemd_here:
        return [*suites, Suite("systemd", ("tests/systemd",), "native", 280)], []
    return suites, ["systemd: not PID 1 here (AGENTCG_WHERE=guest runs everything in the guest)"]


def _with_guests() -> list[Suite]:
    """The suites where this machine has no controllers: of those that take turns the longest first,
    so that the last to begin is a short one."""
    host = Suite(
        "host",
        ("tests/unit", "tests/fuzz", "tests/kernel"),
        "native",
        limit_sec=2700,
        test_limit_sec=300,
        marks=ON_HOST,
    )
    waits = replace(host, name="waits", marks=WAITING, is_idle=True)
    uml = Suite(
        "uml",
        ("tests/guest", "tests/kernel"),
        "uml",
        limit_sec=1800,
        test_limit_sec=300,
        marks=IN_UML,
    )
    programs = Suite(
        "programs",
        PROGRAMS,
        "qemu",
        limit_sec=2700,
        test_limit_sec=600,
        marks=IN_QEMU,
        guest_options=("--memory=2048",),
    )
    disk = (*programs.guest_options, "--disk=1024:50")
    # The third CPU is off, but for the test of sets of CPUs.
    cpus = (*disk, "--cpus=3", "--kernel-arg=maxcpus=2")
    sched = replace(programs, name="sched", paths=SCHED, guest_options=cpus, goes_first=True)
    systemd = Suite(
        "systemd",
        ("tests/systemd",),
        "uml",
        limit_sec=900,
        test_limit_sec=240,
        marks=IN_UML,
        guest_options=("--systemd",),
    )
    pins = Suite(
        "pins",
        ("tests/systemd/test_pins.py",),
        "qemu",
        limit_sec=1500,
        test_limit_sec=600,
        marks=IN_QEMU,
        guest_options=("--systemd",),
    )
    return [waits, programs, host, uml, sched, pins, systemd]
