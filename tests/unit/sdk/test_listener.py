"""The thread that listens to events."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from agentcgroup import Admin
from agentcgroup.listener import EventListener
from agentcgroup.types import Event
from tests.harness import wait_until
from tests.unit.fake_daemon import FakeDaemon, running


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    yield from running(monkeypatch)


def say_until_heard(daemon: FakeDaemon, heard: list[Event], call_id: str) -> None:
    def is_heard() -> bool:
        daemon.say("It was paused.", call_id)
        return any(each.feedback is not None and each.feedback.call_id == call_id for each in heard)

    wait_until(f"{call_id} is heard", is_heard)


def test_it_hears_a_daemon_that_comes_late_and_one_that_comes_back(daemon: FakeDaemon) -> None:
    daemon.stop()
    heard: list[Event] = []
    asked: list[Admin] = []

    def make() -> Admin:
        asked.append(Admin())
        return asked[-1]

    with EventListener(make, heard.append, retry_s=0.05) as listener:
        listener.start()
        wait_until("a daemon that is away is asked again", lambda: len(asked) >= 2)
        assert not heard
        daemon.start()
        say_until_heard(daemon, heard, "c1")
        daemon.stop()
        daemon.start()
        say_until_heard(daemon, heard, "c2")
    assert not [each for each in threading.enumerate() if each.name == "listen"]


def test_it_ends_while_the_daemon_is_away_and_before_it_began(daemon: FakeDaemon) -> None:
    daemon.stop()
    listener = EventListener(Admin, lambda event: None, retry_s=60)
    listener.close()
    listener = EventListener(Admin, lambda event: None, retry_s=60)
    listener.start()
    started = time.monotonic()
    listener.close()
    assert time.monotonic() - started < 4
    assert not [each for each in threading.enumerate() if each.name == "listen"]
