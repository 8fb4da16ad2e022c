"""Containers by CRI, against a runtime on a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroup.v1 import cri_pb2 as cri
from agentcgroupd.config_containers import ContainerRule
from agentcgroupd.runtime import cri as module
from agentcgroupd.runtime import engine
from agentcgroupd.runtime.cri import Cri, pid_of_info, tells_everybody
from agentcgroupd.runtime.engine import Change, Told, Watcher
from agentcgroupd.runtime.labels import Container
from tests.cri_runtime import CriRuntime
from tests.harness import wait_until

ID, OTHER_ID = "ab" * 32, "cd" * 32
TRUE = {"agentcgroup.session": "true", "agentcgroup.priority": "90", "x": "y"}
MAY = ("session", "memory-max")
RULES = (ContainerRule(image="agents/*"),)


def pod(number: str = "p", annotations: dict[str, str] | None = None) -> cri.CriPod:
    name = cri.PodName(name="web", namespace="team")
    return cri.CriPod(id=number, metadata=name, annotations=TRUE if annotations is None else {})


def container(number: str = ID, of: str = "p", image: str = "busybox") -> cri.CriContainer:
    about = cri.CriContainer(id=number, pod_sandbox_id=of, image=cri.CriImage(image=image))
    about.metadata.name = "agent"
    return about


class Follower:
    """An engine with a loop in a thread, and what it has told."""

    def __init__(self, path: Path) -> None:
        self.told: list[Told] = []
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.watcher = Watcher(Cri(path, RULES, MAY), self.loop, self.told.append)
        self.watcher.start()

    def new(self) -> list[Container]:
        """Containers that were told of as running."""
        return [told.container for told in self.told if told.change is Change.RUNS]

    def close(self) -> None:
        self.watcher.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[CriRuntime]:
    with CriRuntime(tmp_path / "cri.sock") as made:
        yield made


@pytest.fixture
def follower(runtime: CriRuntime, monkeypatch: pytest.MonkeyPatch) -> Iterator[Follower]:
    monkeypatch.setattr(engine, "LOOK_EVERY_S", 0.05)
    made = Follower(runtime.path)
    yield made
    made.close()


def test_what_runs_already_is_told_with_what_its_pod_may_set(
    runtime: CriRuntime, follower: Follower
) -> None:
    runtime.run(container(), pod(), 4711)
    wait_until("it is told", lambda: follower.new() != [])
    labels = {"agentcgroup.session": "true"}
    assert follower.new()[0] == Container("cri", ID, "team/web/agent", "busybox", 4711, labels)


def test_an_event_is_followed_at_once(
    runtime: CriRuntime, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIST_EVERY_S", 1000.0)  # no list comes to it
    wait_until("it follows", lambda: runtime.followers == 1)
    runtime.tell("0" * 64)  # the time above is waited for from the next event on
    runtime.run(container(), pod(), 4711)
    wait_until("it is told", lambda: len(follower.new()) == 1)


def test_what_no_event_tells_of_is_in_the_next_list(
    runtime: CriRuntime, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIST_EVERY_S", 0.1)
    wait_until("it follows", lambda: runtime.followers == 1)
    runtime.tell("0" * 64)  # the time above is waited for from the next event on
    runtime.run(container(), pod(), 4711, told=False)
    wait_until("it is told", lambda: len(follower.new()) == 1)
    # It is told once, and afterwards that its limits may be others.
    wait_until("its limits are looked at", lambda: follower.told[-1].change is Change.CHANGED)
    assert len(follower.new()) == 1
    status = runtime.asked.count("ContainerStatus")
    assert status == 1


@pytest.mark.parametrize(
    ("name", "version", "everybody"),
    [
        ("containerd", "v2.1.9", True),
        ("containerd", "2.0.0", True),
        ("containerd", "1.7.24~ds1", False),
        ("cri-o", "1.34.1", False),
        ("containerd", "unknown", False),
        ("", "", False),
    ],
)
def test_events_are_taken_only_where_nobody_misses_them(
    name: str, version: str, everybody: bool
) -> None:
    assert tells_everybody(name, version) is everybody


def test_an_older_runtime_is_asked_for_lists_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIST_WITHOUT_EVENTS_S", 0.05)
    monkeypatch.setattr(engine, "LOOK_EVERY_S", 0.05)
    with CriRuntime(tmp_path / "old.sock", "1.7.24") as runtime:
        follower = Follower(runtime.path)
        wait_until("it is asked", lambda: runtime.asked.count("ListContainers") > 2)
        runtime.run(container(), pod(), 4711)
        wait_until("it is told", lambda: len(follower.new()) == 1)
        follower.close()
    assert "GetContainerEvents" not in runtime.asked


def test_pods_without_an_annotation_are_no_sessions(
    runtime: CriRuntime, follower: Follower
) -> None:
    wait_until("it follows", lambda: runtime.followers == 1)
    runtime.run(container(OTHER_ID, "q"), pod("q", {}), 4712)
    runtime.run(container("ef" * 32, "q", "agents/coder"), pod("q", {}), 4713)
    runtime.run(container(), pod(), 4711)
    wait_until("two are told", lambda: len(follower.new()) == 2)
    assert {found.pid for found in follower.new()} == {4711, 4713}
    # Nothing more is asked of what is no session.
    assert runtime.asked.count("ContainerStatus") == 2


def test_a_container_that_has_ended_meanwhile_is_nothing(
    runtime: CriRuntime, follower: Follower
) -> None:
    wait_until("it follows", lambda: runtime.followers == 1)
    runtime.run(container(OTHER_ID), pod(), 0)
    runtime.run(container(), pod(), 4711)
    wait_until("the other is told", lambda: len(follower.new()) == 1)
    assert follower.new()[0].id == ID


def test_a_runtime_that_is_started_again_is_asked_again(
    runtime: CriRuntime, follower: Follower
) -> None:
    runtime.run(container(), pod(), 4711)
    wait_until("it is told", lambda: len(follower.new()) == 1)
    runtime.stop()
    runtime.run(container(OTHER_ID), pod(), 4712)
    runtime.start()
    wait_until("both are told", lambda: {c.pid for c in follower.new()} == {4711, 4712}, 20)
    assert follower.watcher.connected >= 2


def test_a_runtime_without_the_interface_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """containerd as Docker ships it listens on the same socket, and knows nothing of pods."""
    monkeypatch.setattr(engine, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(engine, "AGAIN_MOST_S", 0.02)
    with CriRuntime(tmp_path / "docker.sock") as runtime:
        runtime.implements = False
        follower = Follower(runtime.path)
        wait_until("it is asked often", lambda: len(runtime.asked) > 5)
        follower.close()
    said = [record for record in caplog.records if "unimplemented" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_socket_of_another_user_is_passed_over_with_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "podman.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        assert engine.is_runtimes_socket(path)
        os.chown(path, 1000, -1)
        assert not engine.is_runtimes_socket(path)
        assert not engine.is_runtimes_socket(path)
    (record,) = caplog.records
    assert "belongs to uid 1000" in record.getMessage() and "session adopt" in record.getMessage()


@given(st.text())
def test_any_text_is_looked_through_for_a_number(text: str) -> None:
    assert pid_of_info(text) == 0


@pytest.mark.parametrize(
    ("text", "pid"),
    [
        ('{"pid": 17}', 17),
        ('{"pid": true}', 0),
        ('{"pid": -3}', 0),
        ('{"pid": "17"}', 0),
        ('[{"pid": 17}]', 0),
        ("[" * 100_000, 0),
    ],
)
def test_the_first_process_is_told_in_json(text: str, pid: int) -> None:
    assert pid_of_info(text) == pid


def test_a_runtime_that_goes_away_again_is_said_again(
    runtime: CriRuntime, follower: Follower, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        wait_until("it follows", lambda: runtime.followers == 1)
        caplog.clear()
        runtime.stop()
        wait_until("it is said", lambda: _said(caplog) != [])
        runtime.start()


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    text = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    return [each for each in text if "its containers go on meanwhile" in each]
