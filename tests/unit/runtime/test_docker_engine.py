"""Docker is followed over real HTTP on a Unix socket."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroupd.runtime import engine as engines
from agentcgroupd.runtime.docker_engine import DockerEngine
from agentcgroupd.runtime.engine import Change, EngineError, Told, Watcher
from tests.docker_api import DockerApi
from tests.harness import wait_until

ONE, TWO = "1" * 64, "2" * 64
LABELS = {"agentcgroup.session": "true"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[DockerApi]:
    server = DockerApi(tmp_path / "docker.sock")
    yield server
    server.stop()


class Followed:
    """A watcher with a loop in a thread, and what it has told."""

    def __init__(self, engine: DockerEngine) -> None:
        self.told: list[Told] = []
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.watcher = Watcher(engine, self.loop, self.told.append)
        self.watcher.start()

    def ids(self) -> list[str]:
        return [each.container.id[0] for each in self.told]

    def close(self) -> None:
        self.watcher.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def followed(api: DockerApi, monkeypatch: pytest.MonkeyPatch) -> Iterator[Followed]:
    monkeypatch.setattr(engines, "LOOK_EVERY_S", 0.05)
    made = Followed(DockerEngine("docker", api.path, ()))
    yield made
    made.close()


def test_what_runs_is_listed_and_what_starts_is_told(api: DockerApi, followed: Followed) -> None:
    wait_until("it is connected", lambda: followed.watcher.connected == 1)
    api.start(ONE, "web", 41, LABELS)
    api.start("3" * 64, "other", 43, {})
    api.start(TWO, "db", 42, LABELS)
    wait_until("both are told", lambda: len(followed.told) == 2)
    first = followed.told[0]
    assert first.change is Change.RUNS
    assert (first.container.id, first.container.name, first.container.pid) == (ONE, "web", 41)
    assert followed.ids() == ["1", "2"]
    # Nobody is asked about who is none of ours.
    assert not any(f"/containers/{'3' * 64}/json" in path for path in api.asked)


def test_new_limits_are_told(api: DockerApi, followed: Followed) -> None:
    api.add(ONE, "web", 41, LABELS)
    wait_until("it is connected", lambda: followed.watcher.connected == 1)
    api.tell("update", ONE)
    changed = [Change.RUNS, Change.CHANGED]
    wait_until("it is told", lambda: [each.change for each in followed.told][-2:] == changed)


def test_a_runtime_that_is_restarted_is_listed_again(
    api: DockerApi, followed: Followed, tmp_path: Path
) -> None:
    api.add(ONE, "web", 41, LABELS)
    wait_until("it is connected", lambda: followed.watcher.connected == 1)
    api.stop()
    again = DockerApi(api.path)
    try:
        again.add(ONE, "web", 41, LABELS)
        again.start(TWO, "db", 42, LABELS)
        wait_until("it is connected again", lambda: followed.watcher.connected == 2)
        wait_until("the new one is told", lambda: "2" in followed.ids())
        assert followed.ids().count("1") >= 2
    finally:
        again.stop()


def test_what_starts_between_the_list_and_the_events_is_not_missed(api: DockerApi) -> None:
    engine = DockerEngine("docker", api.path, ())
    engine.connect()
    before = time.time()
    assert list(engine.running()) == []
    api.start(ONE, "web", 41, LABELS)
    assert next(engine.events(before)).container.id == ONE
    engine.close()


def test_a_container_that_has_ended_meanwhile_is_left_out(api: DockerApi) -> None:
    engine = DockerEngine("docker", api.path, ())
    engine.connect()
    api.start(ONE, "gone", 41, LABELS)
    api.end(ONE)
    api.start(TWO, "there", 42, LABELS)
    assert next(engine.events(time.time() - 5)).container.id == TWO
    engine.close()


def test_a_runtime_that_does_not_answer_is_an_error(
    api: DockerApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentcgroupd.runtime.docker_engine.ANSWER_S", 0.2)
    api.hold.clear()
    engine = DockerEngine("docker", api.path, ())
    with pytest.raises(EngineError, match=r"(?i)time"):
        engine.connect()
    api.hold.set()


def test_the_thread_ends_when_it_is_told_to_while_it_waits_for_events(
    api: DockerApi, followed: Followed
) -> None:
    wait_until("it is connected", lambda: followed.watcher.connected == 1)
    wait_until("it waits", lambda: any("/events" in path for path in api.asked))
    followed.watcher.stop()
    thread = followed.watcher._thread
    wait_until("it has ended", lambda: not thread.is_alive())


def test_a_file_that_is_no_socket_is_no_runtime(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    assert not DockerEngine("docker", path, ()).there()
    path.touch()
    assert not DockerEngine("docker", path, ()).there()


def test_an_image_sets_only_what_others_may(api: DockerApi) -> None:
    mine = {"agentcgroup.pids-max": "10", "agentcgroup.cpu-weight": "50", "x": "y"}
    by_image = {"agentcgroup.session": "a", "agentcgroup.priority": "100", "z": "1"}
    api.images["box"] = by_image | {"agentcgroup.cpu-weight": "10"}
    api.add(ONE, "web", 41, by_image | mine)
    engine = DockerEngine("docker", api.path, (), ("session", "pids-max"))
    engine.connect()
    found = next(engine.running())
    assert found.labels == mine | {"agentcgroup.session": "a", "z": "1"}
    engine.close()


def test_what_nobody_expected_does_not_end_the_following(
    api: DockerApi, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until("it is connected", lambda: followed.watcher.connected == 1)

    def broken(*_: object) -> bool:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(DockerEngine, "_told", broken)
        api.start(ONE, "web", 41, LABELS)
        time.sleep(0.2)
    wait_until("it is told all the same", lambda: "1" in followed.ids())
