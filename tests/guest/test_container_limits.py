"""What a runtime sets on its container's cgroup, before and while it is a session: taken over or
set aside, and there again when the cgroup is given back."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.config import SessionDefaults
from agentcgroupd.intents.gpu import GpuCeiling
from agentcgroupd.intents.gpu_part import Part
from agentcgroupd.sessions.cgroups import SessionCgroups
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.session import Session

pytestmark = pytest.mark.controllers


@pytest.fixture
def container() -> Iterator[Cgroup]:
    """A cgroup beside the pool with a process in it, as a kubelet has it made for a container that
    requests 100m of CPU time."""
    root = Cgroup.open(cgroup2_mount())
    root.enable(("memory", "cpu", "pids", "io"))
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    root.close()
    held = Cgroup.open(made.path)
    held.write(knobs.MEMORY_OOM_GROUP, True)
    held.write(knobs.CPU_WEIGHT, 4)
    inside = subprocess.Popen(["sleep", "1000"])
    held.attach(inside.pid)
    yield held
    inside.kill()
    inside.wait()
    held.kill_and_remove()
    held.close()


@pytest.fixture
def pool() -> Iterator[Pool]:
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    pool = Pool(Cgroup.open(made.path), cgroup2_mount(), f"/{made.path.name}", (), None, 1000)
    yield pool
    pool.cgroup.kill_and_remove()
    pool.cgroup.close()
    root.close()


@pytest.fixture
def books(pool: Pool) -> SessionCgroups:
    """What makes sessions, without a daemon."""
    return _books(pool)


def _books(pool: Pool) -> SessionCgroups:
    def no_gpu(part: Part) -> tuple[str, ...]:
        raise AssertionError("no GPU is asked for")

    return SessionCgroups(SessionDefaults(), pool, Sessions(pool), GpuCeiling, no_gpu)


def adopt(books: SessionCgroups, container: Cgroup, **spec: Any) -> Session:
    return books.adopt(f"/{container.path.name}", pb.SessionSpec(id="box", **spec))


def give_back(books: SessionCgroups, session: Session) -> None:
    books.remove(session)
    books.forget(session)


def set_again(books: SessionCgroups, session: Session, **spec: Any) -> None:
    limits = books.changed(session, pb.SessionSpec(**spec))
    books.write_changed(session, limits)
    books.keep_changed(session, limits)


def killed_and_restored(pool: Pool, session: Session) -> tuple[SessionCgroups, Session]:
    """The same session as the next daemon finds it."""
    session.cgroup.close()
    books = _books(pool)
    (found,) = books.restore()
    return books, found


def test_a_container_is_not_ended_as_a_whole(
    books: SessionCgroups, container: Cgroup, pool: Pool
) -> None:
    session = adopt(books, container)
    assert not container.read(knobs.MEMORY_OOM_GROUP)
    container.write(knobs.MEMORY_OOM_GROUP, True)
    set_again(books, session, pids_max="77")
    assert not books.reread(session), "its limits are what they were"
    assert not container.read(knobs.MEMORY_OOM_GROUP)
    container.write(knobs.MEMORY_OOM_GROUP, True)
    books, session = killed_and_restored(pool, session)
    assert not container.read(knobs.MEMORY_OOM_GROUP)
    give_back(books, session)
    assert container.read(knobs.MEMORY_OOM_GROUP), "as it was found"


def test_what_a_runtime_sets_meanwhile_is_there_afterwards(
    books: SessionCgroups, container: Cgroup, pool: Pool
) -> None:
    container.write(knobs.MEMORY_OOM_GROUP, False)
    session = adopt(books, container)
    # As an earlier daemon left it, that knew nothing of this file.
    for texts in (session.found, session.written):
        del texts[knobs.MEMORY_OOM_GROUP.file]
    container.set_xattr(session.record())
    container.write(knobs.MEMORY_OOM_GROUP, True)
    books, session = killed_and_restored(pool, session)
    assert not container.read(knobs.MEMORY_OOM_GROUP)
    give_back(books, session)
    assert container.read(knobs.MEMORY_OOM_GROUP)
    session = adopt(books, container)
    container.write(knobs.MEMORY_OOM_GROUP, True)
    give_back(books, session)
    assert container.read(knobs.MEMORY_OOM_GROUP), "set after the last look"


def test_a_runtimes_weight_stays_and_changes_with_it(
    books: SessionCgroups, container: Cgroup, pool: Pool
) -> None:
    session = adopt(books, container)
    assert (session.limits.cpu_weight, container.read(knobs.CPU_WEIGHT)) == (4, 4)
    container.write(knobs.CPU_WEIGHT, 9)
    assert books.reread(session) and session.limits.cpu_weight == 9
    set_again(books, session, pids_max="77")
    assert container.read(knobs.CPU_WEIGHT) == 9
    books, session = killed_and_restored(pool, session)
    assert session.limits.cpu_weight == 9
    container.write(knobs.CPU_WEIGHT, 11)
    assert books.reread(session) and session.limits.cpu_weight == 11
    give_back(books, session)
    assert container.read(knobs.CPU_WEIGHT) == 11


@pytest.mark.parametrize(
    ("spec", "weight"), [({"cpu_weight": "4"}, 4), ({"priority": "important"}, 400)]
)
@pytest.mark.parametrize("when", ["from the beginning", "later"])
def test_a_weight_of_its_own_stays(
    books: SessionCgroups,
    container: Cgroup,
    pool: Pool,
    spec: dict[str, Any],
    weight: int,
    when: str,
) -> None:
    """Whatever the runtime sets is there again when the container is given back."""
    if when == "later":
        container.write(knobs.CPU_WEIGHT, 5)
        session = adopt(books, container)
        set_again(books, session, **spec)
    else:
        session = adopt(books, container, **spec)
    assert (session.limits.cpu_weight, container.read(knobs.CPU_WEIGHT)) == (weight, weight)
    books, session = killed_and_restored(pool, session)
    container.write(knobs.CPU_WEIGHT, 9)
    assert not books.reread(session)
    assert (session.limits.cpu_weight, container.read(knobs.CPU_WEIGHT)) == (weight, weight)
    give_back(books, session)
    assert container.read(knobs.CPU_WEIGHT) == 9


def test_a_weight_that_the_policy_has_lowered_is_not_the_runtimes(
    books: SessionCgroups, container: Cgroup
) -> None:
    session = adopt(books, container)
    container.write(knobs.CPU_WEIGHT, 1)
    session.slowed = True
    assert not books.reread(session) and session.limits.cpu_weight == 4
    give_back(books, session)
    assert container.read(knobs.CPU_WEIGHT) == 4


def test_a_session_of_an_earlier_daemon_keeps_the_weight_of_its_priority(
    books: SessionCgroups, container: Cgroup, pool: Pool
) -> None:
    session = adopt(books, container)
    session.limits = replace(session.limits, cpu_weight=100)
    session.written[knobs.CPU_WEIGHT.file] = "100"
    container.set_xattr(session.record())
    books, session = killed_and_restored(pool, session)
    assert container.read(knobs.CPU_WEIGHT) == 100
    container.write(knobs.CPU_WEIGHT, 9)
    assert not books.reread(session) and container.read(knobs.CPU_WEIGHT) == 100
    give_back(books, session)
    assert container.read(knobs.CPU_WEIGHT) == 9


@pytest.mark.full_kernel
def test_weights_for_disks_stay_as_well(
    books: SessionCgroups, container: Cgroup, pool: Pool
) -> None:
    weight = next((k for k in (knobs.IO_BFQ_WEIGHT, knobs.IO_WEIGHT) if container.has(k)), None)
    if weight is None:
        pytest.skip("this kernel keeps no weights for disks")
    container.write(weight, 300)
    session = adopt(books, container, cpu_weight="7")
    assert (session.limits.io_weight, container.read(weight)) == (300, 300)
    container.write(weight, 30)
    assert books.reread(session) and session.limits.io_weight == 30
    books, session = killed_and_restored(pool, session)
    set_again(books, session, io_weight="50")
    assert container.read(weight) == 50
    give_back(books, session)
    assert container.read(weight) == 30


def test_a_session_of_our_own_has_the_weights_of_its_priority(books: SessionCgroups) -> None:
    session = books.make(pb.SessionSpec(id="ours"))
    assert session.limits.cpu_weight == 100 and not session.written
    books.remove(session)
    books.forget(session)
