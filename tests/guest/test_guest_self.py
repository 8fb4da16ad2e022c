"""The test guests themselves: what the tests of the daemon take for granted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.guest.where import decide

ROOT = Path("/sys/fs/cgroup")

GUEST = os.environ.get("AGENTCG_GUEST", "")
pytestmark = pytest.mark.with_programs  # in both guests

in_guest = pytest.mark.skipif(not GUEST, reason="about the guests, and this is none")


def mounted(point: str) -> tuple[str, set[str]]:
    """Type and options of what is mounted last on `point`."""
    found = ("", set[str]())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if where == point:
            found = (kind, set(options.split(",")))
    return found


@pytest.mark.controllers
def test_controllers_reach_a_child() -> None:
    wanted = {"memory", "cpu", "pids"}
    assert wanted <= set((ROOT / "cgroup.controllers").read_text().split())
    before = (ROOT / "cgroup.subtree_control").read_text()
    (ROOT / "cgroup.subtree_control").write_text("+memory +cpu +pids")
    child = ROOT / "agentcg-test-self"
    child.mkdir()
    try:
        assert wanted <= set((child / "cgroup.controllers").read_text().split())
        assert (child / "memory.max").read_text() == "max\n"
    finally:
        child.rmdir()
        for name in wanted - set(before.split()):
            (ROOT / "cgroup.subtree_control").write_text(f"-{name}")


def test_this_is_the_place_to_run_natively() -> None:
    assert decide().kind == "native"


@in_guest
def test_cgroup2_is_mounted_as_systemd_would() -> None:
    kind, options = mounted("/sys/fs/cgroup")
    assert kind == "cgroup2"
    assert {"rw", "nsdelegate", "memory_recursiveprot"} <= options


@in_guest
@pytest.mark.parametrize(
    ("point", "kind"),
    [
        ("/", "overlay"),
        ("/run", "tmpfs"),
        ("/tmp", "tmpfs"),
        ("/dev/shm", "tmpfs"),
        ("/sys/fs/bpf", "bpf"),
        pytest.param("/sys/kernel/tracing", "tracefs", marks=pytest.mark.full_kernel),
    ],
)
def test_mounts(point: str, kind: str) -> None:
    assert mounted(point)[0] == kind


@in_guest
def test_root_is_writable() -> None:
    path = Path("/etc/agentcg-test-self")
    path.write_text("only the overlay sees this")
    assert path.read_text()
    path.unlink()


@in_guest
def test_checkout_is_visible_and_its_build_directory_shared(
    request: pytest.FixtureRequest,
) -> None:
    checkout = request.config.rootpath
    shared = {"qemu": "virtiofs", "uml": "hostfs"}
    assert mounted(str(checkout / "build"))[0] == shared[GUEST]
    marker = checkout / "agentcg-test-self"
    marker.touch()
    marker.unlink()


@in_guest
def test_kernel_is_the_one_asked_for() -> None:
    release = os.uname().release
    assert release.endswith("-cloud-amd64") == (GUEST == "qemu")
    modules = Path("/lib/modules") / release
    assert (modules / "modules.dep").exists()
    if GUEST == "qemu" and (asked := os.environ.get("AGENTCG_KERNEL")):
        assert release.startswith(f"{asked}.") or release.startswith(f"{asked}+")


@in_guest
def test_loopback_is_up() -> None:
    assert int(Path("/sys/class/net/lo/flags").read_text(), 16) & 1


@in_guest
@pytest.mark.programs
def test_btf_is_there_for_bpf_programs() -> None:
    assert Path("/sys/kernel/btf/vmlinux").stat().st_size > 1_000_000
