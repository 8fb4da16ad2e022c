"""The session that a cgroup belongs to is found by its path, however deep that cgroup lies."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentcgroupd.sessions.registry import Sessions

DEEP = "/a" * 2000
"""A path as long as the kernel tells any."""


def books(*paths: str) -> tuple[Sessions, list[Any]]:
    """The books with a session at each path, and those sessions."""
    sessions = Sessions(cast(Any, None))
    made = [SimpleNamespace(id=f"s{n}", cgroup_path=path) for n, path in enumerate(paths)]
    for session in made:
        sessions.add(cast(Any, session))
    return sessions, made


PATHS = ("/pool/one", "/pool/two", "/runtime/pods/pod-1/container", "/runtime/pods/pod-1")


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("/pool/one", 0),
        ("/pool/one/agent", 0),
        ("/pool/two/call-1/main", 1),
        ("/runtime/pods/pod-1/container", 2),
        ("/runtime/pods/pod-1/container/call-2", 2),
        ("/runtime/pods/pod-1/beside", 3),
        (f"/pool/two{DEEP}", 1),
    ],
)
def test_the_innermost_session_above_a_cgroup_is_its_own(path: str, number: int) -> None:
    sessions, made = books(*PATHS)
    assert sessions.of_cgroup(path) is made[number]


@pytest.mark.parametrize(
    "path", ["/", "", "/pool", "/pool/on", "/pool/one-more", "/runtime/pods", "/x/pool/one", DEEP]
)
def test_a_cgroup_beside_all_sessions_is_of_none(path: str) -> None:
    assert books(*PATHS)[0].of_cgroup(path) is None
    assert books()[0].of_cgroup(path) is None


def test_a_session_that_was_dropped_is_not_found() -> None:
    sessions, made = books(*PATHS)
    for session in made:
        sessions.drop(session)
        sessions.drop(session)
        assert sessions.of_cgroup(session.cgroup_path) is not session
    assert sessions.of_cgroup("/pool/one/agent") is None
    sessions.add(made[0])
    assert sessions.of_cgroup("/pool/one/agent") is made[0]


def test_a_deep_cgroup_costs_little_more_than_a_shallow_one() -> None:
    sessions, _ = books(*PATHS, *(f"/pool/s{number}" for number in range(200)))
    began = time.process_time()
    for _ in range(1000):
        assert sessions.of_cgroup(DEEP) is None
    assert time.process_time() - began < 1.0, "a millisecond each is too much"
