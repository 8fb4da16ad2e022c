"""Command lines and files of the guest, and how its end is recognised; nothing here boots."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.guest import boot, vm
from tests.guest.kernel import Kernel

KERNEL = Kernel("7.3.4+deb13-cloud-amd64", Path("/cache/kernels/7.3.4+deb13-cloud-amd64"))


def value_of(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_qemu_runs_one_emulating_thread() -> None:
    argv = vm.qemu_argv(vm.Guest(), KERNEL, Path("/tmp/s"), boot.Channels(3, 4, 5, 6))
    assert value_of(argv, "-accel") == "tcg,thread=single"


def test_qemu_gets_sizes_kernel_and_arguments() -> None:
    guest = vm.Guest(memory_mib=512, cpus=3, kernel_args=("one=1", "two"))
    argv = vm.qemu_argv(guest, KERNEL, Path("/tmp/s"), boot.Channels(3, 4, 5, 6))
    assert value_of(argv, "-m") == "512"
    assert value_of(argv, "-smp") == "3"
    assert value_of(argv, "-kernel") == str(KERNEL.vmlinux)
    assert "memory-backend-memfd,id=memory,size=512M,share=on" in argv
    words = value_of(argv, "-append").split()
    assert "init=/tmp/s/init.sh" in words
    assert words[-2:] == ["one=1", "two"]
    assert "systemd.unit=agentcg-guest.target" not in words
    assert {"socket,id=out,fd=4", "socket,id=err,fd=5", "socket,id=control,fd=6"} <= set(argv)


def test_systemd_boots_our_target() -> None:
    guest = vm.Guest(systemd=True)
    argv = vm.qemu_argv(guest, KERNEL, Path("/tmp/s"), boot.Channels(3, 4, 5, 6))
    words = value_of(argv, "-append").split()
    assert {"systemd.unit=agentcg-guest.target", "fstab=no"} <= set(words)


@pytest.mark.parametrize(
    ("name", "source", "deny"),
    [
        ("/usr/lib/qemu/virtiofsd", "source=/", "--shared-dir=/"),
        ("/usr/libexec/virtiofsd", "--shared-dir=/", "-o"),
    ],
)
def test_file_server_serves_the_root_on_the_given_socket(name: str, source: str, deny: str) -> None:
    argv = vm.file_server_argv(Path(name), 9)
    assert argv[:2] == [name, "--fd=9"]
    assert source in argv
    assert deny not in argv


def sh(script: str) -> str:
    return subprocess.run(
        ["sh", "-c", script], stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def test_config_is_read_back_by_a_shell() -> None:
    guest = vm.Guest(rw=(Path("/a b"), Path("/it's")))
    text = vm.config_text(guest, KERNEL)
    out = sh(text + 'printf "%s\\n" "$lower" "$release" "$pid1" "$@"')
    assert out.splitlines() == ["/", KERNEL.release, "command", "/a b", "/it's"]


def test_command_keeps_words_directory_and_environment(tmp_path: Path) -> None:
    where = tmp_path / "a dir"
    where.mkdir()
    argv = ["sh", "-c", 'pwd; echo "$1" "$X"', "-", "it's; $HOME"]
    out = sh(vm.command_text(argv, where, {"X": "a 'b' \n c", "PATH": os.environ["PATH"]}))
    assert out == f"{where}\nit's; $HOME a 'b' \n c\n"


def test_command_as_a_string_is_for_the_shell() -> None:
    assert sh(vm.command_text("echo a | tr a b", Path("/"), {})) == "b\n"


def test_passed_environment() -> None:
    env = vm.passed_env({"PATH": "/bin", "AGENTCG_NO_SKIP": "1", "SECRET": "x", "TRACES": "t"})
    assert env["PATH"] == "/bin"
    assert env["AGENTCG_NO_SKIP"] == "1"
    assert env["AGENTCG_WHERE"] == "native"
    assert env["TRACES"] == "t"
    assert "SECRET" not in env


def test_options_become_a_guest() -> None:
    arguments = vm.parser().parse_args(
        ["-m", "300", "-w", "/srv", "-s", "-k", "6.12", "-a", "x=1", "-e", "A=b", "--", "ls", "-l"]
    )
    guest = vm.from_arguments(arguments)
    assert (guest.memory_mib, guest.systemd, guest.kernel) == (300, True, "6.12")
    assert guest.rw == (vm.CHECKOUT / "build", Path("/srv"))
    assert guest.kernel_args == ("x=1",)
    assert arguments.command == ["ls", "-l"]
    assert vm.add_to_env({"A": "a"}, arguments.env) == {"A": "b"}


# --- the end, played by a stand-in for QEMU ------------------------------------------------------


def play(
    tmp_path: Path, script: str, limits: boot.Limits
) -> tuple[int | boot.GuestError, bytes, bytes]:
    """Boot with a Python script in QEMU's place: c, o, e, r are the far ends of its ports."""
    out, err = bytearray(), bytearray()

    def argv(channels: boot.Channels) -> list[str]:
        numbers = (channels.console, channels.out, channels.err, channels.control)
        opened = "; ".join(
            f"{name} = socket.socket(fileno={number})"
            for name, number in zip("coer", numbers, strict=True)
        )
        return [sys.executable, "-c", f"import os, socket, time; {opened}; {script}"]

    try:
        with boot.Boot(tmp_path, limits, out.extend, err.extend) as machine:
            machine.start_file_server(lambda descriptor: ["sleep", "60"])
            machine.start_machine("qemu", argv)
            return machine.wait(), bytes(out), bytes(err)
    except boot.GuestError as error:
        return error, bytes(out), bytes(err)


USUAL = boot.Limits(boot_sec=20, total_sec=30)


def test_status_and_output_come_back(tmp_path: Path) -> None:
    script = "r.send(b'up\\n'); o.send(b'out'); e.send(b'err'); r.send(b'ex'); r.send(b'it 7\\n')"
    assert play(tmp_path, script, USUAL) == (7, b"out", b"err")


def test_a_dead_guest_shows_its_console(tmp_path: Path) -> None:
    error, _, _ = play(tmp_path, "r.send(b'up\\n'); c.send(b'one\\r\\nKernel panic\\n')", USUAL)
    assert isinstance(error, boot.GuestError)
    assert error.exit_status == 125
    assert "died" in str(error)
    assert "  | one\n  | Kernel panic" in str(error)


def test_a_hung_guest_ends_in_time(tmp_path: Path) -> None:
    limits = boot.Limits(boot_sec=20, total_sec=1.5)
    begin = time.monotonic()
    error, out, _ = play(
        tmp_path, "r.send(b'up\\n'); o.send(b'so far'); c.send(b'stuck\\n'); time.sleep(60)", limits
    )
    assert isinstance(error, boot.GuestError)
    assert error.exit_status == 124
    assert "1.5 s" in str(error)
    assert "stuck" in str(error)
    assert out == b"so far"
    assert time.monotonic() - begin < 10


def test_a_guest_that_never_starts_ends_in_time(tmp_path: Path) -> None:
    limits = boot.Limits(boot_sec=1, total_sec=60)
    error, _, _ = play(tmp_path, "time.sleep(60)", limits)
    assert isinstance(error, boot.GuestError)
    assert error.exit_status == 125
    assert "no sign of life within 1 s" in str(error)


def test_qemus_own_words_are_shown(tmp_path: Path) -> None:
    error, _, _ = play(tmp_path, "raise SystemExit('no such machine')", USUAL)
    assert "qemu: no such machine" in str(error)


def test_children_are_gone_afterwards(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    note = f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))"
    script = f"{note}; r.send(b'up\\nexit 0\\n'); time.sleep(.1)"
    assert play(tmp_path, script, USUAL)[0] == 0
    assert not Path("/proc", pid_file.read_text()).exists()


# --- state directories ---------------------------------------------------------------------------


def test_state_directory_goes_away(tmp_path: Path) -> None:
    with boot.state_dir(tmp_path) as state:
        (state / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_sweep_takes_only_old_and_unlocked_ones(tmp_path: Path) -> None:
    old, held, new = (tmp_path / f"{boot.STATE_PREFIX}{name}" for name in ("old", "held", "new"))
    other = tmp_path / "other"
    for path in (old, held, new, other):
        path.mkdir()
    for path in (old, held, other):
        os.utime(path, (0, 0))
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        boot.sweep(tmp_path)
    finally:
        os.close(descriptor)
    assert set(tmp_path.iterdir()) == {held, new, other}


def test_inode_watch_looks_at_the_process() -> None:
    assert boot.InodeWatch(os.getpid(), limit=1).due()
    assert not boot.InodeWatch(os.getpid(), limit=1_000_000).due()
    assert not boot.InodeWatch(os.getpid(), limit=0).due()
    watch = boot.InodeWatch(os.getpid(), limit=1)
    assert [watch.due(), watch.due()] == [True, False]
