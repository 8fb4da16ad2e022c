"""Faults of the kernel's programs: each time a reason in plain words, nothing left in the kernel,
and a daemon that works on without them."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import abi, features, loader
from agentcgroupd.bpf.features import DENY, LIFECYCLE, MARKS, OOM_VICTIMS, FeatureState
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.bpf.loader import OBJECTS, BpfObject
from agentcgroupd.bpf.plane import OFF, DataPlane
from agentcgroupd.config import BpfConfig, GuardConfig
from agentcgroupd.doctor import report as doctor
from agentcgroupd.doctor.diagnosis import State
from agentcgroupd.errors import BpfError
from tests.guest import kernel
from tests.harness import EXEC, ROOT, DaemonProcess, wait_until
from tools import build_hook
from tools.bpf_toolchain import LIBBPF_CACHE, ensure_libbpf, find_clang

pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may load programs"),
]

NAMES = {"on_fork", "on_exec", "on_exit", "on_oom_victim", "on_move"}

# --- What a process has in the kernel -------------------------------------------------------------

Owned = tuple[str, int]
"""("prog", "map", "link" or "btf", its id)"""
_NAME_PLACES = {"prog": 64, "map": 24}
"""Offsets of the name in struct bpf_prog_info and bpf_map_info, include/uapi/linux/bpf.h."""


def owned(pid: int | str = "self") -> set[Owned]:
    """All that a process holds in the kernel through descriptors."""
    found: set[Owned] = set()
    for entry in os.scandir(f"/proc/{pid}/fdinfo"):
        try:
            text = Path(entry.path).read_text(encoding="ascii", errors="replace")
        except OSError:
            continue  # the descriptor of this very scan
        ids = re.findall(r"^(prog|map|link|btf)_id:\t(\d+)$", text, re.MULTILINE)
        found |= {(kind, int(number)) for kind, number in ids}
    return found


def mapped(pid: int | str = "self") -> int:
    """Number of maps in a process's memory, where they live on without a descriptor."""
    return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").count("anon_inode:bpf-map")


def library() -> ctypes.CDLL:
    """libbpf, for system calls that the daemon does not need."""
    return ctypes.CDLL(libbpf().path, use_errno=True)


def is_there(item: Owned) -> bool:
    """Whether the kernel still has an item. Ids are not used again soon."""
    kind, number = item
    found = ctypes.c_uint32()
    get_next = getattr(library(), f"bpf_{kind}_get_next_id")
    return get_next(ctypes.c_uint32(number - 1), ctypes.byref(found)) == 0 and (
        found.value == number
    )


def name_of(item: Owned) -> str:
    """The name that the kernel knows a program or map by: 15 characters."""
    kind, number = item
    fd = getattr(library(), f"bpf_{kind}_get_fd_by_id")(ctypes.c_uint32(number))
    assert fd >= 0, item
    info, size = ctypes.create_string_buffer(512), ctypes.c_uint32(512)
    try:
        assert library().bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size)) == 0
    finally:
        os.close(fd)
    place = _NAME_PLACES[kind]
    return info.raw[place : place + 16].partition(b"\0")[0].decode()


def wait_until_gone(items: set[Owned]) -> None:
    """Wait until the kernel has freed the items, which goes on after the last descriptor closes."""
    wait_until(f"the kernel has freed {sorted(items)}", lambda: not any(map(is_there, items)))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test gives back all that it took."""
    before = owned(), mapped()
    yield
    assert (owned(), mapped()) == before


# --- Objects with a fault -------------------------------------------------------------------------


def compiled(directory: Path, *edits: tuple[str, str, str]) -> Path:
    """A directory with a lifecycle object from changed sources: (file, text, its replacement)."""
    source = directory / "source"
    shutil.copytree(ROOT / "bpf", source)
    for name, old, new in edits:
        text = (source / name).read_text(encoding="ascii")
        assert text.count(old) == 1, (name, old)
        (source / name).write_text(text.replace(old, new), encoding="ascii")
    target = directory / "lifecycle.bpf.o"
    build_hook.compile_object(
        source, find_clang(), ensure_libbpf(LIBBPF_CACHE), source / "lifecycle.bpf.c", target
    )
    return directory


def put(directory: Path, content: bytes) -> Path:
    """A directory with a lifecycle object of this content."""
    (directory / "lifecycle.bpf.o").write_bytes(content)
    return directory


def reason_of(objects: Path, name: str = "lifecycle") -> str:
    """The one reason why no feature of an object works."""
    bpf, states = features.load(name, objects)
    if bpf is not None:
        bpf.close()
    assert bpf is None and not any(state.works for state in states)
    (reason,) = {state.reason for state in states}
    assert "\n" not in reason and all(state.fallback for state in states)
    return reason


def test_an_object_that_is_not_there(tmp_path: Path) -> None:
    reason = reason_of(tmp_path)
    assert f"{tmp_path}/lifecycle.bpf.o is not there: the installation is incomplete" in reason


GOOD = (OBJECTS / "lifecycle.bpf.o").read_bytes()


BAD = {
    "empty": b"",
    "magic": b"\x7fELF",
    "script": b"#!/bin/sh\n" * 1000,
    "garbage": bytes(range(256)) * 64,
    "zeroes": bytes(100_000),
    "head alone": GOOD[:16] + bytes(len(GOOD) - 16),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_an_object_that_is_none(tmp_path: Path, content: bytes) -> None:
    reason = reason_of(put(tmp_path, content))
    assert reason.startswith(f"opening {tmp_path}/lifecycle.bpf.o: ENOEXEC (Exec format error): ")
    assert "elf" in reason.lower(), "libbpf's own words belong to it"


def test_an_object_that_was_cut_off(tmp_path: Path) -> None:
    """Cut at many lengths, from the file's head to the last byte."""
    lengths = [1, 63, 64, 65, *range(1000, len(GOOD), len(GOOD) // 40), len(GOOD) - 1]
    for length in lengths:
        reason = reason_of(put(tmp_path, GOOD[:length]))
        assert reason.startswith(f"opening {tmp_path}/lifecycle.bpf.o: ENOEXEC"), length


def test_a_constant_that_lies_outside_of_its_section(tmp_path: Path) -> None:
    """The place of a constant is read from the file, from BTF or from a symbol. A place outside of
    the section is refused: to write there would crash the daemon or do worse."""
    with BpfObject.open("lifecycle") as bpf:
        place = bpf._place(".rodata", "daemon_pid_ns", ctypes.c_uint32)
    reasons = []
    # The ends of struct btf_var_secinfo and of Elf64_Sym: offset, size.
    for width in (4, 8):
        wanted = place.to_bytes(width, "little") + (4).to_bytes(width, "little")
        moved = (0x7FFF_0000).to_bytes(width, "little")
        for found in re.finditer(re.escape(wanted), GOOD):
            changed = GOOD[: found.start()] + moved + GOOD[found.start() + width :]
            try:
                BpfObject.open("lifecycle", put(tmp_path, changed) / "lifecycle.bpf.o").close()
            except BpfError as error:
                reasons.append(str(error))
    assert [r for r in reasons if r.startswith("lifecycle: daemon_pid_ns is outside of .rodata")]


@pytest.mark.full_speed
def test_an_object_of_another_release(tmp_path: Path) -> None:
    objects = compiled(
        tmp_path, ("abi.h", f"ABI_VERSION = {abi.ABI_VERSION},", "ABI_VERSION = 77,")
    )
    reason = reason_of(objects)
    assert "was built for version 77 of the interface, the daemon has 1" in reason
    assert "install both from one release" in reason


@pytest.mark.full_speed
def test_a_map_of_another_size(tmp_path: Path) -> None:
    """The object loads, but its entries are not what the daemon reads: the plane unloads it."""
    objects = compiled(
        tmp_path, ("abi.h", "struct managed {\n\t__u32 kind;", "struct managed {\n\t__u64 kind;")
    )
    bpf, states = features.load("lifecycle", objects)
    assert bpf is not None and {s.name for s in states if s.works} >= {LIFECYCLE}
    with bpf, pytest.raises(BpfError, match=r"map managed: entries of \(8, 16\)") as caught:
        Lifecycle(bpf)
    assert caught.value.errno == errno.EPROTO
    plane = DataPlane(BpfConfig(objects=objects), GuardConfig())
    plane.open()
    try:
        assert plane.lifecycle is None and not plane.works(LIFECYCLE)
        state = plane.states[LIFECYCLE]
        assert "map managed: entries of (8, 16) bytes" in state.reason
        assert state.programs == () and "from one release" in state.remedy
    finally:
        plane.close()


REJECTED = """
	u64 unknown = bpf_get_current_pid_tgid();

	counters.sent[0] = ((struct managed *)bpf_map_lookup_elem(&managed, &unknown))->kind;
	preempt_on();
	return 0;
}
"""


def test_one_program_that_the_verifier_rejects(tmp_path: Path) -> None:
    """OOM victims is missing, with the verifier's last words; process lifecycle works."""
    text = (ROOT / "bpf/lifecycle.bpf.c").read_text(encoding="ascii")
    head, _, tail = text.partition("int BPF_PROG(on_oom_victim")
    end = "\n\tpreempt_on();\n\treturn 0;\n}\n"
    body, found_end, rest = tail.partition(end)
    assert found_end
    objects = compiled(tmp_path)  # the sources, to be replaced
    source = objects / "source/lifecycle.bpf.c"
    source.write_text(f"{head}int BPF_PROG(on_oom_victim{body}{REJECTED}{rest}")
    target, clang, libbpf_dir = objects / "lifecycle.bpf.o", find_clang(), LIBBPF_CACHE
    build_hook.compile_object(source.parent, clang, ensure_libbpf(libbpf_dir), source, target)
    with BpfObject.open("lifecycle", objects / "lifecycle.bpf.o") as whole:
        with pytest.raises(BpfError, match="loading lifecycle: EACCES") as caught:
            whole.load()
    lines = caught.value.detail.splitlines()
    assert lines[0] == "program on_oom_victim:"
    assert lines[-1] == "R0 invalid mem access 'map_value_or_null'"
    assert 2 < len(lines) <= loader.LOG_LINES + 1

    bpf, states = features.load("lifecycle", objects)
    assert bpf is not None
    with bpf:
        found = {state.name: state for state in states}
        assert found[LIFECYCLE].works
        assert set(bpf.attached()) == NAMES - {"on_oom_victim"}
        victims = found[OOM_VICTIMS]
        assert not victims.works and victims.programs == ()
        assert victims.reason == (
            "loading lifecycle: EACCES (Permission denied): "
            "R0 invalid mem access 'map_value_or_null'"
        )
        programs = {name_of(item) for item in owned() if item[0] == "prog"}
        assert programs >= NAMES - {"on_oom_victim"} and "on_oom_victim" not in programs


def test_one_program_that_cannot_be_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other programs of its feature are detached; the object's other features work on. No
    kernel here refuses one of these programs alone, so the refusal is made up."""
    attach = BpfObject.attach

    def refuse_one(self: BpfObject, *names: str) -> None:
        if "on_exit" in names:
            raise BpfError("attaching lifecycle/on_exit", errno.EBUSY)
        attach(self, *names)

    monkeypatch.setattr(BpfObject, "attach", refuse_one)
    bpf, states = features.load("lifecycle")
    assert bpf is not None
    with bpf:
        found = {state.name: state for state in states}
        assert found[LIFECYCLE].reason == (
            "attaching lifecycle/on_exit: EBUSY (Device or resource busy)"
        )
        assert found[OOM_VICTIMS].works and not found[LIFECYCLE].works
        assert set(bpf.attached()) == {"on_oom_victim", "on_fork", "on_move"}
        assert len([item for item in owned() if item[0] == "link"]) == 3


def test_no_descriptor_left_to_attach_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs are attached, a third is not: all of it is given back."""
    limits, load = resource.getrlimit(resource.RLIMIT_NOFILE), BpfObject.load

    def load_and_run_out(self: BpfObject) -> None:
        load(self)
        free = [os.dup(0) for _ in range(3)]
        for fd in free:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[2], limits[1]))

    monkeypatch.setattr(BpfObject, "load", load_and_run_out)
    try:
        bpf, states = features.load("lifecycle")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert bpf is None
    reasons = {state.name: state.reason for state in states}
    expected = "attaching lifecycle/on_exit: EMFILE (Too many open files): libbpf: "
    assert reasons[LIFECYCLE].startswith(expected)


def test_a_full_map() -> None:
    """E2BIG with the map's name; there is room again once something was removed."""
    with BpfObject.open("lifecycle") as bpf:
        libbpf().check("map", "bpf_map__set_max_entries", bpf._map("managed"), 2)
        bpf.load()
        managed = bpf.map("managed", abi.Managed)
        assert managed.max_entries == 2
        managed[1] = managed[2] = abi.Managed(kind=abi.CgroupKind.CALL)
        with pytest.raises(BpfError, match=r"map managed: entry 3: E2BIG") as caught:
            managed[3] = abi.Managed()
        assert caught.value.errno == errno.E2BIG
        managed[2] = abi.Managed(kind=abi.CgroupKind.AGENT)
        assert sorted(set(managed.keys())) == [1, 2] and managed.get(3) is None
        managed.pop(1)
        managed[3] = abi.Managed(kind=abi.CgroupKind.POOL)
        third, second = managed.get(3), managed.get(2)
        assert third is not None and third.kind == abi.CgroupKind.POOL
        assert second is not None and second.kind == abi.CgroupKind.AGENT


# --- A process that may not, a kernel that will not -----------------------------------------------

LOAD_ALL = """
import json
from dataclasses import asdict
from agentcgroupd.bpf import features
rows = []
for name in ("lifecycle", "memory"):
    bpf, states = features.load(name)
    rows += map(asdict, states)
    if bpf is not None:
        bpf.close()
print(json.dumps(rows))
"""


def loaded_by(*command: str) -> dict[str, FeatureState]:
    """States of the features in a process that is started by `command`."""
    argv = [*command, sys.executable, "-c", LOAD_ALL]
    done = subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return states_in(done.stdout)


def states_in(output: str) -> dict[str, FeatureState]:
    """States of the features in the output of LOAD_ALL."""
    return {row["name"]: FeatureState(**row) for row in json.loads(output.splitlines()[-1])}


@pytest.mark.full_speed
@pytest.mark.parametrize(
    ("dropped", "lacking"),
    [
        ("-all", "CAP_BPF and CAP_PERFMON"),
        ("-sys_admin,-bpf", "CAP_BPF"),
        ("-sys_admin,-perfmon", "CAP_PERFMON"),
    ],
)
def test_without_capabilities(dropped: str, lacking: str) -> None:
    states = loaded_by("setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}", "--")
    for state in states.values():
        assert not state.works
        assert f"(the daemon lacks {lacking}): E" in state.reason, state
        assert lacking in state.remedy


@pytest.mark.full_speed
def test_two_capabilities_are_enough() -> None:
    """The two that the reasons name are enough: the lifecycle works without CAP_SYS_ADMIN."""
    states = loaded_by("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--")
    assert states[LIFECYCLE].works and states[OOM_VICTIMS].works


def test_a_locked_down_kernel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says so. A refusal for another reason is not blamed on the lockdown."""
    file = tmp_path / "lockdown"
    monkeypatch.setattr(loader, "LOCKDOWN", file)
    assert loader.lockdown() == "none"
    for text, blamed in (
        ("none integrity [confidentiality]\n", True),
        ("none [integrity] confidentiality\n", False),
        ("[none] integrity confidentiality\n", False),
    ):
        file.write_text(text)
        for number in (errno.EPERM, errno.EACCES, errno.EINVAL):
            assert ("lockdown=confidentiality" in loader.why_refused(number)) is blamed
        assert "lockdown" not in loader.why_refused(errno.E2BIG)
    refused = loader.refusal(errno.EPERM)
    assert refused is not None and "CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS" in refused.remedy


@pytest.mark.full_speed
@pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None
    or kernel.cached(kernel.cache_dir(), kernel.NEWEST) is None,
    reason="no QEMU, or no test kernel in the cache",
)
def test_a_kernel_that_is_locked_down() -> None:
    """Guests show it: the verifier says EINVAL, and the reason that is given is the lockdown."""
    script = (
        "mount -t securityfs none /sys/kernel/security; "
        "echo confidentiality > /sys/kernel/security/lockdown; "
        f"exec {sys.executable} -c '{LOAD_ALL}'"
    )
    argv = [sys.executable, "-m", "tests.guest.vm", "--", "sh", "-c", script]
    done = subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    for state in states_in(done.stdout).values():
        assert not state.works
        assert "the kernel is locked down" in state.reason, state
        assert state.remedy == "boot with lockdown=integrity"


def test_a_refused_trampoline_has_a_remedy() -> None:
    """A kernel without trampolines, or with a policy against them, is named with a remedy; on any
    other all memory programs work."""
    bpf, states = features.load("memory")
    if bpf is not None:
        bpf.close()
    found = {state.name: state for state in states}
    for name in (MARKS, DENY):
        state = found[name]
        if state.works:
            assert state.reason == state.remedy == ""
        else:
            assert re.search(r"EPERM|EBUSY|524|the kernel has no", state.reason)
            assert "CONFIG_" in state.remedy


# --- Unloading ------------------------------------------------------------------------------------


def test_close_leaves_nothing() -> None:
    before = owned()
    bpf, states = features.load("lifecycle")
    assert bpf is not None, states[0].reason
    part = Lifecycle(bpf)
    mine = owned() - before
    assert {name_of(i) for i in mine if i[0] == "prog"} == NAMES
    assert {name_of(i) for i in mine if i[0] == "map"} >= {"managed", "events"}
    assert len([i for i in mine if i[0] == "link"]) == len(NAMES)
    part.close()
    # The counters stay readable as long as someone holds them.
    assert [name_of(item) for item in owned() - before] == ["lifecycl.bss"]
    assert list(part.counters.lost) == [0] * abi.EventType.TYPES
    del part, bpf
    assert owned() == before
    wait_until_gone(mine)


def test_close_in_the_middle_leaves_nothing() -> None:
    """An object is opened, loaded and half attached, and closed twice after each step."""
    before = owned()
    for steps in range(4):
        bpf = BpfObject.open("lifecycle")
        if steps > 0:
            bpf.load()
        if steps > 1:
            bpf.attach("on_fork")
        if steps > 2:
            with pytest.raises(BpfError, match="has no program on_nothing"):
                bpf.attach("on_exec", "on_nothing")
            assert bpf.attached() == ("on_fork", "on_exec")
        mine = owned() - before
        assert len([i for i in mine if i[0] == "link"]) == max(0, steps - 1)
        bpf.close()
        bpf.close()
        assert owned() == before
        wait_until_gone(mine)


# --- A running daemon -----------------------------------------------------------------------------


def daemon_with(directory: Path, config: str) -> DaemonProcess:
    """A daemon whose metrics can be read, not yet started."""
    daemon = DaemonProcess(directory, config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    text = daemon.config.read_text()
    assert "metrics_address = ''" in text
    daemon.config.write_text(text.replace("metrics_address = ''", f"metrics_address = '{address}'"))
    return daemon


def metric(daemon: DaemonProcess, name: str) -> float:
    """The value of a metric without labels."""
    found = re.search(r"metrics_address = '(.*)'", daemon.config.read_text())
    assert found is not None
    with urllib.request.urlopen(f"http://{found[1]}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    value = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert value is not None, text
    return float(value[1])


def run_in(daemon: DaemonProcess, session: str, *argv: str) -> int:
    """Run a command as the agent of a session. Returns its exit status."""
    env = {**os.environ, "AGENTCG_RUN_DIR": str(daemon.run_dir)}
    return subprocess.run(
        [EXEC, "--session", session, "--", *argv], env=env, check=False
    ).returncode


def call_and_report(daemon: DaemonProcess, session: str) -> None:
    """Make a declared call that no program sees, and check it to its report."""
    assert run_in(daemon, session, EXEC, "--name", "mine", "--", "sh", "-c", "exit 5") == 5
    wait_until("it has ended", lambda: not daemon.call_dirs())
    request = pb.ListReportsRequest(session_id=session, limit=10)
    (report,) = daemon.admin.ListReports(request).reports
    told = {f.name: f.state is State.WORKS for f in doctor.run().features}
    # Before Linux 6.15 only the program would know, or who looks before the parent has waited.
    assert report.evidence == pb.EVIDENCE_KERNEL or not told["exit status of any process"]
    known = report.evidence == pb.EVIDENCE_KERNEL
    expected = (pb.VERDICT_FAILED, 5) if known else (pb.VERDICT_UNKNOWN, 0)
    assert (report.name, report.verdict, report.exit_code) == ("mine", *expected)


def open_session(daemon: DaemonProcess, name: str) -> None:
    """Open a session without limits."""
    daemon.admin.OpenSession(pb.OpenSessionRequest(spec=pb.SessionSpec(id=name)))


def pid_of(daemon: DaemonProcess) -> int:
    """Pid of the running daemon."""
    assert daemon.process is not None
    return daemon.process.pid


@pytest.fixture
def run_daemon(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], DaemonProcess]]:
    """A function that starts daemons, which are ended after the test."""
    daemons: list[DaemonProcess] = []

    def start(config: str) -> DaemonProcess:
        # The path of a Unix socket has at most 107 bytes.
        daemons.append(daemon_with(tmp_path_factory.mktemp("d"), config))
        daemons[-1].start()
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.close()
        print(daemon.log.read_text())


@pytest.mark.full_speed
def test_more_cgroups_than_a_map_has_room_for(
    tmp_path: Path, run_daemon: Callable[[str], DaemonProcess]
) -> None:
    """The map has room for two. Sessions and calls beyond that work, only unseen by the program,
    which is logged once and counted each time. Nothing of a killed or stopped daemon stays where
    nothing is pinned (tests/guest/test_outlive.py: where it is)."""
    objects = compiled(
        tmp_path, ("lifecycle.bpf.c", "ID_MAP(managed, ", "HASH_MAP(managed, 2, u64, ")
    )
    (objects / "memory.bpf.o").symlink_to(OBJECTS / "memory.bpf.o")
    daemon = run_daemon(f'[bpf]\nobjects = "{objects}"\npins = ""\n')
    names = ("one", "two", "three", "four")
    for name in names:
        open_session(daemon, name)
    call_and_report(daemon, "four")
    log = daemon.log.read_text()
    assert log.count("a session cannot be watched: map managed: entry ") == 1
    assert log.count("a call cannot be watched: map managed: entry ") == 1
    assert "E2BIG" in log and "Traceback" not in log
    assert len(daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions) == len(names)

    killed = owned(pid_of(daemon))
    programs = {name_of(item) for item in killed if item[0] == "prog"}
    assert programs >= NAMES
    assert {name_of(item) for item in killed if item[0] == "map"} >= {"managed", "events"}
    daemon.kill()
    wait_until_gone(killed)

    daemon.start()
    # Two of the four sessions that it took up.
    assert metric(daemon, "agentcg_bpf_failures_total") == 2
    stopped = owned(pid_of(daemon))
    assert {name_of(item) for item in stopped if item[0] == "prog"} == programs
    daemon.stop()
    assert daemon.process is not None and daemon.process.returncode == 0
    wait_until_gone(stopped)


@pytest.mark.full_speed
@pytest.mark.parametrize("enabled", [True, False], ids=["no objects", "switched off"])
def test_a_daemon_without_programs(
    tmp_path: Path, run_daemon: Callable[[str], DaemonProcess], enabled: bool
) -> None:
    """The daemon says so, once for each reason; it loads nothing and serves calls."""
    choice = f'objects = "{tmp_path}"' if enabled else "enabled = false"
    daemon = run_daemon(f"[bpf]\n{choice}\n")
    open_session(daemon, "alpha")
    call_and_report(daemon, "alpha")
    # Nobody sees what is not declared; it runs all the same.
    assert run_in(daemon, "alpha", "sh", "-c", "sh -c 'exit 6'; exit $?") == 6
    assert owned(pid_of(daemon)) == set()
    log = daemon.log.read_text()
    assert "Traceback" not in log and log.count("in the kernel: nothing") == 1
    if not enabled:
        assert log.count(OFF) == 1 and ": missing: " not in log
        return
    for definition in features.DEFINITIONS:
        # Those that are missing for the same reason share a line.
        lines = [line for line in log.splitlines() if f"{definition.name}" in line]
        (line,) = (line for line in lines if ": missing: " in line)
        reason = line.partition(": missing: ")[2]
        shared = f"instead of {definition.name}: {definition.fallback}"
        assert shared in line or line.endswith(f"; instead: {definition.fallback}")
        if definition.object in ("lifecycle", "memory"):
            assert f"{tmp_path}/{definition.object}.bpf.o is not there" in reason
