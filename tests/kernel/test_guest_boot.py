"""The test guests from outside, booted for real: how they end, and that nothing stays behind."""

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

from tests.guest import boot, kernel, uml_kernel, vm

pytestmark = [
    pytest.mark.full_speed,
    pytest.mark.skipif(os.geteuid() != 0, reason="the guests need root"),
]
VM, UML = "tests.guest.vm", "tests.guest.uml"


def not_tried(module: str) -> str:
    """Why this guest is not booted here; empty where it is."""
    if module == UML:
        return "" if uml_kernel.cached(kernel.cache_dir()) else "no user-mode Linux in the cache"
    if not os.environ.get("AGENTCG_GUEST_BOOT"):
        return "set AGENTCG_GUEST_BOOT=1: QEMU takes minutes"
    if shutil.which("qemu-system-x86_64") is None:
        return "QEMU is not installed"
    if kernel.cached(kernel.cache_dir(), kernel.NEWEST) is None:
        return "no test kernel in the cache"
    return ""


@pytest.fixture(params=[VM, UML])
def module(request: pytest.FixtureRequest) -> str:
    """Either guest's program."""
    if reason := not_tried(request.param):
        pytest.skip(reason)
    return str(request.param)


def guest(module: str, *options: str) -> subprocess.Popen[str]:
    """Start a guest, in a process of its own as users do."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *options],
        cwd=vm.CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def below(pid: int) -> list[int]:
    """Pids of all descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *below(child)]
    return found


def state_of(pids: list[int]) -> Path:
    """The state directory that one of these processes was given."""
    words: list[str] = []
    for pid in pids:
        words += Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").split()
    # In user-mode Linux a process that has just been forked shows the words of the one before it.
    (init,) = {word.removeprefix("init=") for word in words if word.startswith("init=")}
    return Path(init).parent


@pytest.fixture
def running(module: str) -> Iterator[tuple[subprocess.Popen[str], list[int], Path]]:
    """A guest whose command is running: its process, what that started, and its state."""
    process = guest(module, "--", "sh", "-c", "echo running; sleep 300")
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    started = below(process.pid)
    # QEMU has a file server beside it; in user-mode Linux each process is one of the host's.
    assert len(started) == 2 if module == VM else len(started) > 2
    yield process, started, state_of(started)
    process.kill()
    process.communicate()


def wait_until_ended(pids: list[int]) -> None:
    """AssertionError if one of them is still there after a while."""
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(alive(pid) for pid in pids)


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
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    wait_until_ended(started)
    assert not state.exists()


def test_sigkill_takes_the_children_along(
    running: tuple[subprocess.Popen[str], list[int], Path],
) -> None:
    process, started, state = running
    process.kill()
    process.wait()
    wait_until_ended(started)
    os.utime(state, (0, 0))
    boot.sweep(boot.STATE_PARENT)
    assert not state.exists()


def test_panic_is_told_with_the_console(module: str) -> None:
    # Output takes a moment to leave user-mode Linux.
    script = "echo before; sleep 2; echo c >/proc/sysrq-trigger"
    out, err = guest(module, "--", "sh", "-c", script).communicate()
    assert out == "before\n"
    assert "died before the command ended" in err
    assert "Kernel panic - not syncing: sysrq triggered crash" in err


def test_time_runs_out(module: str) -> None:
    begin = time.monotonic()
    process = guest(module, "--timeout", "10", "--", "sh", "-c", "echo so far; sleep 300")
    out, err = process.communicate()
    assert process.returncode == boot.EXIT_TIMEOUT
    assert out == "so far\n"
    assert "stopped after 10 s" in err
    assert time.monotonic() - begin < 60, "far less than the command takes"


def test_two_at_once_keep_apart(module: str) -> None:
    def run(word: str) -> tuple[str, int]:
        script = f"echo {word} >/etc/word; sleep 1; cat /etc/word; exit 7"
        process = guest(module, "--", "sh", "-c", script)
        return process.communicate()[0], process.returncode

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(run, ["one", "two"])) == [("one\n", 7), ("two\n", 7)]
    assert not Path("/etc/word").exists()


def test_a_walk_over_many_files_does_not_exhaust_the_file_server() -> None:
    """More inodes than virtiofsd may have descriptors for, where that limit is low."""
    if reason := not_tried(VM):
        pytest.skip(reason)
    script = "find /usr -xdev | head -n 50000 | wc -l; ls /var"
    out, err = guest(VM, "--", "sh", "-c", script).communicate()
    assert "Too many open files" not in err
    assert int(out.split()[0]) > 1000


def test_reading_many_files_does_not_exhaust_user_mode_linux() -> None:
    """A guest that has read more files than its host may hold open goes on."""
    if reason := not_tried(UML):
        pytest.skip(reason)
    most = 3000
    find = (
        f"find /usr/lib -xdev -type f -size -100k | grep -v '[^a-zA-Z0-9/._-]' | head -n {2 * most}"
    )
    # As fast as programs read; the guest has to have a chance to let go of what it holds.
    read = "xargs -n 100 sh -c 'head -qc1 \"$@\" >/dev/null; sleep 0.05' sh"
    script = f"{find} | {read}; ls /var >/dev/null; {find} | wc -l"
    low = f'ulimit -n {most}; exec "$@"'
    process = subprocess.run(
        ["sh", "-c", low, "sh", sys.executable, "-m", UML, "--", "sh", "-c", script],
        cwd=vm.CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stderr == "" and process.returncode == 0
    assert int(process.stdout) > 1000


def test_output_ends_with_the_command_and_not_with_what_it_left_behind(module: str) -> None:
    script = "(sleep 300; echo late) & head -c 300000 /dev/zero | tr '\\0' x; exit 3"
    process = guest(module, "--", "sh", "-c", script)
    out, _ = process.communicate(timeout=110)
    assert (process.returncode, out) == (3, "x" * 300_000)
