"""The daemon as a plugin of NRI, against a runtime on a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroup.v1 import nri_pb2 as nri
from agentcgroupd.runtime import early, engine
from agentcgroupd.runtime.early import Splitter
from agentcgroupd.runtime.engine import Change, Told, Watcher, is_runtimes_socket
from agentcgroupd.runtime.labels import Container
from agentcgroupd.runtime.nri import Nri
from agentcgroupd.runtime.place import NoPlace, cgroup_of_container, cgroup_of_oci_path
from agentcgroupd.runtime.ttrpc import BrokenFrame, Mux
from tests.harness import wait_until
from tests.nri_runtime import NriRuntime, RefusedByPlugin

ID = "ab" * 32
ANSWER_S = 0.5
POD = nri.Pod(
    id="p", name="web", namespace="team", annotations={"agentcgroup.session": "true", "x": "y"}
)
OTHER = nri.Pod(id="o", name="other", namespace="team")
MAY = ("session", "memory-max")


def container(number: str = ID, state: int = 1) -> nri.NriContainer:
    linux = nri.LinuxContainer(cgroups_path=f"kubepods-pod1.slice:cri-containerd:{number}")
    return nri.NriContainer(id=number, pod_sandbox_id="p", name="agent", linux=linux, state=state)


class Plugin:
    """A plugin with a loop in a thread, and what it has told."""

    def __init__(self, path: Path, splitter: Splitter) -> None:
        self.told: list[Told] = []
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.nri = Nri(path, (), MAY, Path("/run/here/agent"), splitter)
        self.watcher = Watcher(self.nri, self.loop, self.told.append)
        self.watcher.start()

    def close(self) -> None:
        self.watcher.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class FakeSplitter(Splitter):
    """Notes what is to be split."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self.paths: list[str] = []
        self.takes_s = 0.0

    def _split(self, path: str) -> str:
        self.paths.append(path)
        time.sleep(self.takes_s)
        return ""


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[NriRuntime]:
    with NriRuntime(tmp_path / "nri.sock") as made:
        yield made


@pytest.fixture
def splitter() -> Iterator[FakeSplitter]:
    made = FakeSplitter()
    yield made
    made.close()


@pytest.fixture
def plugin(
    runtime: NriRuntime, splitter: FakeSplitter, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Plugin]:
    monkeypatch.setattr(engine, "LOOK_EVERY_S", 0.05)
    made = Plugin(runtime.path, splitter)
    yield made
    made.close()


def test_it_registers_for_what_every_version_knows(runtime: NriRuntime, plugin: Plugin) -> None:
    about = runtime.accept()
    assert (about.plugin_name, about.plugin_idx) == ("agentcgroup", "90")
    # CreateContainer, StartContainer, PostStartContainer, PostUpdateContainer
    assert runtime.mask == 0b101101000
    wait_until("it is connected", lambda: plugin.watcher.connected == 1)
    assert plugin.nri._runtime == "containerd v2.1.9"


def test_what_runs_already_is_told_if_it_may_be_a_session(
    runtime: NriRuntime, plugin: Plugin
) -> None:
    strange = nri.NriContainer(id="3" * 64, pod_sandbox_id="o", name="x", state=3)
    runtime.accept([POD, OTHER], [container(state=3), strange, container("cd" * 32, state=4)])
    wait_until("it is told", lambda: len(plugin.told) == 1)
    (told,) = plugin.told
    assert told.change is Change.RUNS
    assert told.container == Container(
        "nri",
        ID,
        "team/web/agent",
        "",
        0,
        {"agentcgroup.session": "true"},
        f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope",
    )


def test_a_sessions_container_gets_the_sockets_and_is_split_before_it_starts(
    runtime: NriRuntime, plugin: Plugin, splitter: FakeSplitter
) -> None:
    runtime.accept()
    created = runtime.start(POD, container())
    (mount,) = created.adjust.mounts
    assert (mount.source, mount.destination) == ("/run/here/agent", "/run/agentcgroup/agent")
    assert "ro" in mount.options
    assert {e.key: e.value for e in created.adjust.env} == {"AGENTCG_RUN_DIR": "/run/agentcgroup"}
    assert splitter.paths == [f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope"]
    wait_until("it is told", lambda: len(plugin.told) == 1)


def test_newer_versions_have_a_method_for_each_event(
    runtime: NriRuntime, plugin: Plugin, splitter: FakeSplitter
) -> None:
    runtime.accept()
    about = nri.OfContainer(pod=POD, container=container())
    for method in ("StartContainer", "PostStartContainer", "PostUpdateContainer"):
        assert runtime.ask(method, about) == b""
    assert len(splitter.paths) == 1
    changes = [Change.RUNS, Change.RUNS, Change.CHANGED]
    wait_until("all are told", lambda: [t.change for t in plugin.told] == changes)


def test_other_containers_are_let_alone(
    runtime: NriRuntime, plugin: Plugin, splitter: FakeSplitter
) -> None:
    runtime.accept()
    created = runtime.start(OTHER, container())
    assert created == nri.Created() and splitter.paths == []
    assert runtime.ask("Shutdown", b"") == b""
    assert plugin.told == []


def test_annotations_set_what_they_may(runtime: NriRuntime, plugin: Plugin) -> None:
    runtime.accept()
    given = {
        "agentcgroup.session": "mine",
        "agentcgroup.priority": "100",
        "agentcgroup.memory-max": "1G",
    }
    runtime.start(nri.Pod(id="p", name="a", annotations=given), container())
    wait_until("it is told", lambda: len(plugin.told) == 1)
    assert plugin.told[0].container.labels == {
        "agentcgroup.session": "mine",
        "agentcgroup.memory-max": "1G",
    }


def test_it_answers_in_time_whatever_else_is_slow(
    runtime: NriRuntime, plugin: Plugin, splitter: FakeSplitter
) -> None:
    """The loop stands still and each split hangs: containers start all the same, and none is
    forgotten."""
    runtime.accept()
    runtime.took_s.clear()
    free = threading.Event()
    plugin.loop.call_soon_threadsafe(free.wait)
    splitter.takes_s = 1.0
    for number in range(3):
        runtime.start(POD, container(f"{number}" * 64))
    assert plugin.told == []
    assert len(runtime.took_s) == 6 and max(runtime.took_s) < ANSWER_S
    free.set()
    wait_until("all are told", lambda: len(plugin.told) == 3)


def test_a_runtime_that_was_restarted_is_joined_again(runtime: NriRuntime, plugin: Plugin) -> None:
    for count in (1, 2, 3):
        runtime.accept([POD], [container(state=3)])
        wait_until("it is told again", partial(lambda n: len(plugin.told) >= n, count))
        runtime.hang_up()
    wait_until("it is told each time", lambda: len(plugin.told) == 3)


def test_what_cannot_be_read_is_an_error_and_not_the_end(
    runtime: NriRuntime, plugin: Plugin
) -> None:
    runtime.accept()
    with pytest.raises(RefusedByPlugin, match=r"12.*no method"):
        runtime.ask("ValidateContainerAdjustment", b"")
    with pytest.raises(RefusedByPlugin):
        runtime.ask("CreateContainer", b"\xff\xff\xff")
    runtime.start(POD, container())
    wait_until("it goes on", lambda: len(plugin.told) == 1)


def test_a_split_that_takes_too_long_is_said(
    splitter: FakeSplitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "SPLIT_S", 0.05)
    splitter.takes_s = 0.5
    assert "more than" in splitter.split("/x")


def test_a_cgroup_that_is_not_there_is_said(tmp_path: Path) -> None:
    splitter = Splitter(tmp_path)
    assert "there is no cgroup /a/b" in splitter.split("/a/b")
    splitter.close()


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("/k8s.io/abc", "/k8s.io/abc"),
        ("system.slice:docker:abc", "/system.slice/docker-abc.scope"),
        (
            "kubepods-burstable-pod1_2.slice:cri-containerd:abc",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"
            "/cri-containerd-abc.scope",
        ),
        ("-.slice:crio:abc", "/crio-abc.scope"),
    ],
)
def test_paths_of_oci_runtimes(given: str, path: str) -> None:
    assert cgroup_of_oci_path(given) == path


@pytest.mark.parametrize("path", ["/a/../../etc/x", "/other", "/"])
def test_a_path_that_is_not_the_containers_is_refused(path: str) -> None:
    with pytest.raises(NoPlace):
        cgroup_of_container(Container("nri", "x", "n", "", 0, {}, path))


def pair() -> tuple[socket.socket, Mux]:
    ours, theirs = socket.socketpair()
    return ours, Mux(theirs)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">II", 1, 1 << 31),
        struct.pack(">II", 1, 10) + struct.pack(">IIBB", 1 << 30, 1, 1, 0),
        struct.pack(">II", 1, 100) + b"short",
        b"abc",
        b"".join(struct.pack(">II", number, 1) + b"x" for number in range(40)),
    ],
)
def test_frames_that_cannot_be_are_refused(data: bytes) -> None:
    sock, mux = pair()
    sock.sendall(data)
    sock.close()
    with pytest.raises(BrokenFrame):
        list(mux.frames())


@given(st.lists(st.tuples(st.integers(1, 3), st.binary(max_size=300)), max_size=5), st.data())
def test_messages_come_whole_however_they_are_cut(
    messages: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    sock, mux = pair()
    for connection, payload in messages:
        whole = struct.pack(">IIBB", len(payload), 1, 1, 0) + payload
        cut = data.draw(st.integers(0, len(whole)))
        for piece in (whole[:cut], whole[cut:]):
            sock.sendall(struct.pack(">II", connection, len(piece)) + piece)
    sock.close()
    assert [(f.connection, f.payload) for f in mux.frames()] == messages


def test_a_container_cannot_move_its_session_deeper() -> None:
    path = "/kubepods.slice/cri-containerd-abc.scope/agent/x-abc-x/y"
    found = cgroup_of_container(Container("nri", "abc", "n", "", 0, {}, path))
    assert found == "/kubepods.slice/cri-containerd-abc.scope"


def test_a_runtime_is_not_believed_at_anybodys_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "nri.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        assert is_runtimes_socket(path)
        if os.geteuid() == 0:
            os.chown(path, 1000, 1000)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 1)
        assert not is_runtimes_socket(path)
