"""The command line of user-mode Linux, what it sees, and its place in the cache; nothing boots."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest import boot, uml, uml_kernel, vm
from tests.guest.kernel import KernelError

CHANNELS = boot.Channels(console=3, out=4, err=5, control=6)


def made(directory: Path) -> uml_kernel.UmlKernel:
    """An empty user-mode Linux of release 7.2.7."""
    (directory / "lib/modules/7.2.7").mkdir(parents=True)
    return uml_kernel.UmlKernel(directory)


def test_each_channel_has_a_line_of_its_own(tmp_path: Path) -> None:
    guest = uml.Uml(memory_mib=512, kernel_args=("one=1",))
    argv = uml.uml_argv(guest, made(tmp_path), Path("/tmp/s"), None, CHANNELS)
    assert {"mem=512M", "init=/tmp/s/init.sh", "uml_dir=/tmp/s", "one=1"} <= set(argv)
    assert {"con0=fd:3", "ssl0=fd:4", "ssl1=fd:5", "ssl2=fd:6"} <= set(argv)


def test_memory_lies_where_it_fits(tmp_path: Path) -> None:
    kernel, state = made(tmp_path), Path("/tmp/s")
    for memory, expected in ((Path("/dev/shm"), "/dev/shm"), (None, "/tmp/s")):
        argv = uml.uml_argv(uml.Uml(), kernel, state, memory, CHANNELS)
        assert f"TMPDIR={expected}" in argv[: argv.index("./linux")]
    assert uml.memory_dir(1, tmp_path) == tmp_path
    assert uml.memory_dir(1 << 40, tmp_path) is None
    assert uml.memory_dir(1, tmp_path / "nothing") is None


def test_it_starts_with_its_own_c_library(tmp_path: Path) -> None:
    argv = uml.uml_argv(uml.Uml(), made(tmp_path), Path("/tmp/s"), None, CHANNELS)
    assert argv[0] == "env"
    assert f"LD_LIBRARY_PATH={tmp_path}/lib" in argv[: argv.index("./linux")]


def test_the_loader_is_replaced_in_place() -> None:
    before = b"\x7fELF..." + uml_kernel.LOADER + b"the rest"
    after = uml_kernel.with_our_loader(before)
    assert len(after) == len(before)
    assert after.startswith(b"\x7fELF..../ld.so\0") and after.endswith(b"\0the rest")


@pytest.mark.parametrize("program", [b"static", uml_kernel.LOADER * 2])
def test_a_program_with_another_loader_is_refused(program: bytes) -> None:
    with pytest.raises(KernelError, match="dynamic loader"):
        uml_kernel.with_our_loader(program)


def test_only_a_complete_one_counts(tmp_path: Path) -> None:
    assert uml_kernel.cached(tmp_path) is None
    (tmp_path / "newest-uml").write_text("7.2um1\n")
    kernel = made(tmp_path / "uml/7.2um1")
    assert uml_kernel.cached(tmp_path) is None
    (kernel.directory / "complete").touch()
    found = uml_kernel.cached(tmp_path)
    assert found == kernel and found.modules.name == "7.2.7"
    assert uml_kernel.ensure(cache=tmp_path) == kernel


def test_the_guest_knows_which_it_is() -> None:
    environ = {"PATH": "/bin", "AGENTCG_EMULATED": "1"}
    assert vm.passed_env(environ)["AGENTCG_GUEST"] == "qemu"
    env = uml.passed_env(environ)
    assert env["AGENTCG_GUEST"] == "uml" and "AGENTCG_EMULATED" not in env


def test_systemd_boots_our_target(tmp_path: Path) -> None:
    kernel = made(tmp_path / "uml/7.2um1")
    for systemd, pid1 in ((False, "command"), (True, "systemd")):
        guest = uml.from_arguments(uml.parser().parse_args(["-s"] * systemd + ["--", "ls"]))
        argv = uml.uml_argv(guest, kernel, tmp_path, None, CHANNELS)
        assert ("systemd.unit=agentcg-guest.target" in argv) is systemd
        assert f"pid1={pid1}\n" in uml.config_text(guest, kernel)


def test_options_become_a_guest() -> None:
    options = ["-m", "300", "-w", "/srv", "-a", "x=1", "-t", "7", "--", "ls", "-l"]
    arguments = uml.parser().parse_args(options)
    guest = uml.from_arguments(arguments)
    assert (guest.memory_mib, guest.timeout_sec) == (300, 7)
    assert guest.rw == (vm.CHECKOUT / "build", Path("/srv"))
    assert guest.kernel_args == ("x=1",) and arguments.command == ["ls", "-l"]
