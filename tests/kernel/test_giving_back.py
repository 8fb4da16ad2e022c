"""An adopted cgroup is given back as it was found, whatever its agent has made in it; where that
fails, the session goes on."""

from __future__ import annotations

import errno
import secrets
import subprocess
from collections.abc import Iterator

import pytest

from agentcgroup import errors
from agentcgroup.cli.install_sessions import OpenSessions, give_back, open_sessions
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.config import SessionDefaults
from agentcgroupd.errors import KnobError
from agentcgroupd.intents.gpu import GpuCeiling
from agentcgroupd.intents.gpu_part import Part
from agentcgroupd.sessions import merging
from agentcgroupd.sessions.cgroups import SessionCgroups
from agentcgroupd.sessions.pool import Pool, offered_controllers
from agentcgroupd.sessions.registry import Sessions
from tests.harness import DaemonProcess, controllers


def give_on() -> tuple[str, ...]:
    """Controllers that the test may enable at the mount."""
    return tuple(sorted(controllers() & {"memory", "pids"}))


@pytest.fixture
def container() -> Iterator[Cgroup]:
    """A cgroup beside the pool, with controllers where there are any."""
    root = Cgroup.open(cgroup2_mount())
    root.enable(give_on())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    held = Cgroup.open(made.path)
    root.close()
    yield held
    held.kill_and_remove()
    held.close()


@pytest.fixture
def shells(container: Cgroup) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Three processes in it."""
    made = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
    for shell in made:
        container.attach(shell.pid)
    yield made
    for shell in made:
        shell.kill()
        shell.wait()


def nest(leaf: Cgroup, shells: list[subprocess.Popen[bytes]]) -> None:
    """Do what an agent may do in its leaf: cgroups in one another that give controllers on, and all
    processes in these; one of them is frozen."""
    sub = leaf.make_child("sub")
    deep, other = sub.make_child("deep"), sub.make_child("other")
    for shell, into in zip(shells, (deep, deep, other), strict=True):
        into.attach(shell.pid)
    for giving in (leaf, sub):
        assert giving.enable(offered_controllers(giving)) == ()
    other.write(knobs.CGROUP_FREEZE, True)


def test_an_agent_in_cgroups_of_its_own_is_given_back(
    daemon: DaemonProcess, container: Cgroup, shells: list[subprocess.Popen[bytes]]
) -> None:
    request = pb.AdoptSessionRequest(
        cgroup_path=f"/{container.path.name}", spec=pb.SessionSpec(id="adopted")
    )
    daemon.admin.AdoptSession(request)
    nest(container.child("agent"), shells)
    beside = container.make_child("beside")
    beside.enable(offered_controllers(beside))
    daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="adopted"))
    assert sorted(container.procs()) == sorted(shell.pid for shell in shells)
    assert list(container.children()) == ["beside"]
    assert container.read(knobs.CGROUP_SUBTREE_CONTROL) == ()
    assert container.get_xattr() is None
    assert all(shell.poll() is None for shell in shells)
    assert "adopted" not in {
        session.id for session in daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions
    }


def test_uninstall_finds_adopted_sessions_without_the_daemon_and_gives_them_back_with_it(
    daemon: DaemonProcess, container: Cgroup, shells: list[subprocess.Popen[bytes]]
) -> None:
    path = f"/{container.path.name}"
    spec = pb.SessionSpec(id="web")
    daemon.admin.AdoptSession(pb.AdoptSessionRequest(cgroup_path=path, spec=spec))
    daemon.stop()
    where = ((cgroup2_mount(),), daemon.cgroup_dir.relative_to(cgroup2_mount()))
    found = open_sessions(*where)
    assert found.adopted == (f"web ({path})",)
    with pytest.raises(errors.Refused, match=rf"web \({path}\).*systemctl start"):
        give_back(found, str(daemon.run_dir))
    assert container.procs() == ()
    daemon.start()
    assert open_sessions(*where) == found
    give_back(found, str(daemon.run_dir))
    assert sorted(container.procs()) == sorted(shell.pid for shell in shells)
    assert open_sessions(*where) == OpenSessions(found.inside)


@pytest.fixture
def books(container: Cgroup) -> Iterator[SessionCgroups]:
    """What makes sessions, without a daemon, with a pool of its own."""
    root = Cgroup.open(cgroup2_mount())
    made = root.make_child(f"agentcg-test-{secrets.token_hex(4)}")
    pool = Pool(Cgroup.open(made.path), cgroup2_mount(), f"/{made.path.name}", (), None, 1000)

    def no_gpu(part: Part) -> tuple[str, ...]:
        raise AssertionError("no GPU is asked for")

    yield SessionCgroups(SessionDefaults(), pool, Sessions(pool), GpuCeiling, no_gpu)
    pool.cgroup.kill_and_remove()
    pool.cgroup.close()
    root.close()


def test_a_session_that_cannot_be_given_back_goes_on(
    books: SessionCgroups,
    container: Cgroup,
    shells: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = books.adopt(f"/{container.path.name}", pb.SessionSpec(id="adopted"))
    nest(session.agent, shells)
    given_on = container.read(knobs.CGROUP_SUBTREE_CONTROL)
    assert set(given_on) >= set(give_on())

    def refuse(cgroup: Cgroup, leaf: str) -> None:
        merging.merge(cgroup, leaf)
        raise KnobError(OSError(errno.EBUSY, "busy"), str(cgroup.path), "cgroup.procs")

    with monkeypatch.context() as patched:
        patched.setattr("agentcgroupd.sessions.cgroups.merge", refuse)
        with pytest.raises(KnobError):
            books.remove(session)
    pids = sorted(shell.pid for shell in shells)
    assert sorted(container.child("agent").procs()) == pids and container.procs() == ()
    assert session.agent.exists()
    assert container.read(knobs.CGROUP_SUBTREE_CONTROL) == given_on
    assert container.get_xattr() == session.record()
    books.remove(session)
    books.forget(session)
    assert sorted(container.procs()) == pids and list(container.children()) == []
