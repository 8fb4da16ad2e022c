"""Jobs of shells: what one session keeps takes no room from others."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from agentcgroupd.boundaries.jobs import JOBS_OF_SESSION, Jobs
from agentcgroupd.boundaries.processes import Key, ObservedCall


def named(session_id: str) -> Any:
    """A session, as far as it is asked for here."""
    return SimpleNamespace(id=session_id)


def job(session: Any, number: int) -> tuple[Key, ObservedCall]:
    """A shell, and the call of its job, which has a process."""
    main = (os.getpid(), number)
    return (number, number), ObservedCall(session, "x", ["x"], main, 0, members={main})


def test_a_session_with_many_jobs_takes_no_room_from_another() -> None:
    jobs, greedy, other = Jobs(), named("greedy"), named("other")
    for number in range(1, JOBS_OF_SESSION + 2):
        shell, observed = job(greedy, number)
        jobs.began(os.getpid(), shell, observed)
    known = [jobs.of(greedy, os.getpid(), (n, n), 0) for n in (1, JOBS_OF_SESSION + 1)]
    assert known[0] is not None and known[1] is None
    shell, observed = job(other, 1)
    jobs.began(os.getpid(), shell, observed)
    assert jobs.of(other, os.getpid(), shell, 0) is observed


def test_jobs_that_have_ended_make_room_and_a_closed_session_is_forgotten() -> None:
    jobs, session = Jobs(), named("s")
    for number in range(1, JOBS_OF_SESSION + 1):
        shell, observed = job(session, number)
        jobs.began(os.getpid(), shell, observed)
        observed.members.clear()
    shell, observed = job(session, JOBS_OF_SESSION + 1)
    jobs.began(os.getpid(), shell, observed)
    assert jobs.of(session, os.getpid(), shell, 0) is observed
    jobs.closed(session)
    assert jobs.of(session, os.getpid(), shell, 0) is None
