"""The test guest from the outside, booted for real: how it ends, and that nothing stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.guest import boot, kernel, vm

pytestmark = [
    pytest.mark.full_speed,
    pytest.mark.skipif(os.geteuid() != 0, reason="the guest needs root"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
    pytest.mark.skipif(
        kernel.cached(kernel.cache_dir(), kernel.NEWEST) is None,
        reason="no test kernel in the cache",
    ),
]


def guest(*options: str) -> subprocess.Popen[str]:
    """Start a guest, in a process of its own as users do."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.guest.vm", *options],
        cwd=vm.CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> list[int]:
    """Pids of a process's children."""
    return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state_of(pid: int) -> Path:
    """The state directory that a QEMU was given."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").split()
    (init,) = (word.removeprefix("init=") for word in words if word.startswith("init="))
    return Path(init).parent


@pytest.fixture
def running() -> Iterator[tuple[subprocess.Popen[str], list[int], Path]]:
    """A guest whose command is running: its process, what that started, and its state."""
    process = guest("--", "sh", "-c", "echo running; sleep 300")
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    started = children(process.pid)
    yield process, started, state_of(started[-1])
    process.kill()
    process.communicate()


def alive(pid: int) -> bool:
    """False for a zombie too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_everything(
    number: signal.Signals, running: tuple[subprocess.Popen[str], list[int], Path]
) -> None:
    process, started, state = running
    assert len(started) == 2
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    assert not any(alive(pid) for pid in started)
    assert not state.exists()


def test_sigkill_takes_the_children_along(
    running: tuple[subprocess.Popen[str], list[int], Path],
) -> None:
    process, started, state = running
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(alive(pid) for pid in started)
    os.utime(state, (0, 0))
    boot.sweep(boot.STATE_PARENT)
    assert not state.exists()


def test_panic_is_told_with_the_console() -> None:
    out, err = guest("--", "sh", "-c", "echo before; echo c >/proc/sysrq-trigger").communicate()
    assert out == "before\n"
    assert "died before the command ended" in err
    assert "Kernel panic - not syncing: sysrq triggered crash" in err


def test_time_runs_out() -> None:
    begin = time.monotonic()
    process = guest("--timeout", "20", "--", "sh", "-c", "echo so far; sleep 300")
    out, err = process.communicate()
    assert process.returncode == boot.EXIT_TIMEOUT
    assert out == "so far\n"
    assert "stopped after 20 s" in err
    assert time.monotonic() - begin < 26


def test_two_at_once_keep_apart() -> None:
    def run(word: str) -> tuple[str, int]:
        process = guest("--", "sh", "-c", f"echo {word} >/etc/word; sleep 1; cat /etc/word; exit 7")
        return process.communicate()[0], process.returncode

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(run, ["one", "two"])) == [("one\n", 7), ("two\n", 7)]
    assert not Path("/etc/word").exists()


def test_a_walk_over_many_files_does_not_exhaust_the_file_server() -> None:
    """More inodes than virtiofsd may have descriptors for, where that limit is low."""
    out, err = guest("--", "sh", "-c", "find /usr -xdev | wc -l; ls /var").communicate()
    assert "Too many open files" not in err
    assert int(out.split()[0]) > 1000
