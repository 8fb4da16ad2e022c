"""Cgroup directories and interface files on this kernel's own cgroup2 mount."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroupd.cgroup import knobs, subtree
from agentcgroupd.cgroup.events import FileEvents
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount, move_all
from agentcgroupd.errors import CgroupGone, KnobError
from agentcgroupd.host.syscalls import pidfd_ended, process_stat
from agentcgroupd.turns import Turns
from tests.harness import ROOT, wait_until


@pytest.fixture
def top() -> Iterator[Cgroup]:
    """A cgroup of our own, removed with all below it."""
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    root.close()
    held = Cgroup.open(made.path)
    yield held
    held.kill_and_remove()
    held.close()


def spawn(cgroup: Cgroup, *argv: str) -> subprocess.Popen[bytes]:
    """A process in `cgroup`."""
    process = subprocess.Popen(argv)
    cgroup.attach(process.pid)
    return process


def test_id_is_the_inode_and_names_this_directory_only(top: Cgroup) -> None:
    first = top.make_child("x")
    assert first.id == os.stat(first.path).st_ino
    assert first.exists()
    first.remove()
    assert not first.exists()
    second = top.make_child("x")
    assert second.id != first.id
    assert second.exists() and not first.exists()


@pytest.mark.full_speed
def test_all_processes_are_listed_however_many_there_are(top: Cgroup) -> None:
    """The kernel gives a page of pids at a time, which is some 800 of them."""
    crowd = top.make_child("crowd")
    code = "import os\nfor _ in range(1200):\n    if not os.fork(): os.read(0, 1); os._exit(0)\n"
    spawned = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.read(0, 1)\n{code}os.read(0, 1)"],
        stdin=subprocess.PIPE,
    )
    crowd.attach(spawned.pid)
    assert spawned.stdin is not None
    spawned.stdin.write(b"x")
    spawned.stdin.flush()
    wait_until("all are there", lambda: len(crowd.all_procs()) == 1201)
    assert sorted(crowd.procs()) == sorted(crowd.all_procs())
    crowd.kill()
    spawned.stdin.close()
    spawned.wait()


def test_a_file_that_is_not_there_is_an_error_and_is_never_made(top: Cgroup) -> None:
    with pytest.raises(KnobError) as caught:
        top.write_text("memory.maxx", "1")
    assert caught.value.errno in (errno.ENOENT, errno.EACCES, errno.EPERM)
    assert not isinstance(caught.value, CgroupGone)
    assert not (top.path / "memory.maxx").exists()


def test_a_removed_cgroup_is_gone_and_not_merely_missing_a_file(top: Cgroup) -> None:
    child = top.make_child("x")
    child.remove()
    for action in (child.procs, child.populated, child.kill, lambda: child.attach(os.getpid())):
        with pytest.raises(CgroupGone):
            action()
    child.remove()  # a second time is no error


def test_the_kernels_word_on_a_bad_value_reaches_the_error(top: Cgroup) -> None:
    with pytest.raises(KnobError) as caught:
        top.write_text("cgroup.freeze", "2")
    assert caught.value.errno == errno.ERANGE
    assert "cgroup.freeze" in str(caught.value) and "ERANGE" in str(caught.value)


def test_kill_and_remove_takes_everything_below(top: Cgroup) -> None:
    call = top.make_child("call")
    nested = call.make_child("nested")
    processes = [spawn(call, "sleep", "100"), spawn(nested, "sleep", "100")]
    assert call.populated()
    with pytest.raises(KnobError) as caught:
        call.remove()
    assert caught.value.errno == errno.EBUSY
    call.kill_and_remove()
    assert not call.exists()
    assert [p.wait(10) for p in processes] == [-9, -9]


def nest(top: Cgroup, depth: int) -> int:
    """Nest cgroups, one in the other, and return a descriptor of the innermost one."""
    here = os.dup(top.dir_fd)
    for _ in range(depth):
        os.mkdir("deep", dir_fd=here)
        inner = os.open("deep", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = inner
    return here


def test_nesting_too_deep_for_recursion_and_for_paths_is_removed(top: Cgroup) -> None:
    """The path of the innermost cgroup is longer than PATH_MAX."""
    os.close(nest(top, max(1_300, sys.getrecursionlimit() + 300)))
    assert top.all_procs() == []
    top.remove()
    assert not top.exists()


def test_a_signal_reaches_processes_in_nested_cgroups(top: Cgroup) -> None:
    """All processes are signalled and counted, at every depth."""
    below = top.make_child("a").make_child("b")
    processes = [spawn(top.child("a"), "sleep", "60"), spawn(below, "sleep", "60")]
    assert sorted(top.all_procs()) == sorted(process.pid for process in processes)
    assert top.signal(signal.SIGTERM) == 2
    assert [process.wait(10) for process in processes] == [-signal.SIGTERM] * 2


SYS_EXIT = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
LEADERLESS = f"""
import ctypes, signal, sys, threading, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=time.sleep, args=(600,)).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall({SYS_EXIT}, 0)  # exit(2): of the main thread alone
"""


def test_a_process_without_its_main_thread_is_killed_as_well(top: Cgroup) -> None:
    """cgroup.kill misses it on some kernels (seen: Linux 6.18)."""
    argv = [sys.executable, "-S", "-c", LEADERLESS]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        top.attach(process.pid)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        wait_until("its main thread is a zombie", lambda: process_stat(process.pid).state == "Z")
        pidfd = os.pidfd_open(process.pid)
        try:
            assert not pidfd_ended(pidfd)
            top.kill_and_remove()
            assert pidfd_ended(pidfd)
        finally:
            os.close(pidfd)
        assert process.wait(10) == -signal.SIGKILL
    assert not top.exists()


def test_processes_below_a_threaded_cgroup_are_counted_and_killed(top: Cgroup) -> None:
    """A threaded cgroup does not list its processes; the cgroup above it does."""
    threaded = top.make_child("t")
    threaded.write_text("cgroup.type", "threaded")
    process = spawn(top, "sleep", "60")
    assert top.all_procs() == [process.pid]
    assert top.signal(signal.SIGTERM) == 1
    assert process.wait(10) == -signal.SIGTERM


def test_many_processes_are_signalled_without_asking_for_each(top: Cgroup) -> None:
    """More than are signalled at a time, and their list is read once for each part."""
    processes = [spawn(top, "sleep", "60") for _ in range(300)]
    assert top.signal(signal.SIGKILL) == len(processes)
    assert {process.wait(20) for process in processes} == {-signal.SIGKILL}


def test_what_vanishes_meanwhile_does_not_end_a_removal(
    top: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else removes a cgroup on the way down; the rest is removed all the same."""
    inner = top.make_child("a").make_child("b")
    top.make_child("c")
    step, removed = subtree._step, list[str]()

    def other_removes(here: int, name: str) -> int:
        there = step(here, name)
        if name == "a" and not removed:
            removed.append(name)
            inner.remove()
            os.rmdir(top.path / "a")
        return there

    monkeypatch.setattr(subtree, "_step", other_removes)
    top.remove()
    assert removed and not top.exists()


def test_move_all_moves_every_process(top: Cgroup) -> None:
    source, target = top.make_child("a"), top.make_child("b")
    processes = [spawn(source, "sleep", "100") for _ in range(5)]
    assert move_all(source, target) == 5
    assert source.procs() == ()
    assert sorted(target.procs()) == sorted(p.pid for p in processes)
    target.kill()
    for process in processes:
        process.wait(10)


def test_xattrs_are_kept_and_replaced(top: Cgroup) -> None:
    child = top.make_child("x")
    assert child.get_xattr() is None
    child.set_xattr(b"a" * 2000)
    child.set_xattr(b"b" * 3000)
    assert child.get_xattr() == b"b" * 3000
    assert "trusted.agentcgroup" in child.list_xattrs()
    child.remove_xattr()
    child.remove_xattr()
    assert child.get_xattr() is None


def test_events_tell_of_the_last_process_and_of_freezing(top: Cgroup) -> None:
    child = top.make_child("x")
    seen: list[dict[str, int]] = []

    async def watch() -> None:
        events = FileEvents(Turns())
        ended, frozen = asyncio.Event(), asyncio.Event()

        def changed() -> None:
            seen.append(child.read(knobs.CGROUP_EVENTS))
            if seen[-1]["frozen"]:
                frozen.set()
            if frozen.is_set() and seen[-1]["populated"] == 0:
                ended.set()

        handle = events.watch(child, knobs.CGROUP_EVENTS, changed)
        process = spawn(child, "sleep", "100")
        await asyncio.sleep(0)
        child.write(knobs.CGROUP_FREEZE, True)
        await asyncio.wait_for(frozen.wait(), 10)
        child.kill()
        await asyncio.wait_for(ended.wait(), 10)
        process.wait(10)
        events.unwatch(handle)
        child.remove()
        await asyncio.sleep(0.01)
        events.close()

    asyncio.run(watch())
    assert any(s["populated"] == 1 for s in seen)
    assert any(s["frozen"] == 1 for s in seen)


def test_a_thousand_leaves_come_and_go(top: Cgroup) -> None:
    before = set(top.children())
    for number in range(1000):
        top.make_child(f"call-{number}").remove()
    assert set(top.children()) == before


@pytest.mark.psi
def test_psi_is_read_with_its_units(top: Cgroup) -> None:
    pressure = top.read_if(knobs.MEMORY_PRESSURE)
    if pressure is None:
        pytest.skip("this kernel has no PSI")
    assert set(pressure) == {"some", "full"}
    assert pressure["some"].total_usec >= pressure["full"].total_usec >= 0


def test_enable_names_what_the_kernel_refuses(top: Cgroup) -> None:
    assert top.enable(("no_such_controller",)) == ("no_such_controller",)


MOUNT_IN_NAMESPACE = """
echo $$ > "$0/cgroup.procs"
exec unshare --cgroup --mount -- sh -c "$1" "$2" "$3"
"""
PRINT_MOUNT = """
from agentcgroupd.cgroup.tree import cgroup2_mount
try:
    print(repr(str(cgroup2_mount())))
except OSError as error:
    print(error.strerror)
"""


def mount_seen(cgroup: Cgroup, setup: str) -> str:
    """Output of PRINT_MOUNT in a cgroup namespace whose root is `cgroup`, after a shell command."""
    then = f'{setup}exec "$0" -c "$1"'
    argv = ("sh", "-c", MOUNT_IN_NAMESPACE, str(cgroup.path), then, sys.executable, PRINT_MOUNT)
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return done.stdout.strip()


def test_a_mount_from_outside_the_cgroup_namespace_is_refused(top: Cgroup, tmp_path: Path) -> None:
    said = mount_seen(top.make_child("outside"), "")
    begins = f"cgroup2 at {str(cgroup2_mount())!r} begins at '/../..'"
    assert said.startswith(begins)
    assert "it was mounted from outside; mount cgroup2 inside this namespace" in said
    # Among the mounts of this namespace, the one that was made inside it is found.
    own = tmp_path / "own cgroup2\r"
    own.mkdir()
    setup = f"mount -t cgroup2 none '{own}' && "
    assert mount_seen(top.make_child("inside"), setup) == repr(str(own))


def test_wait_until_fails_loudly() -> None:
    with pytest.raises(AssertionError, match="timed out: the moon"):
        wait_until("the moon", lambda: False, 0.01)
