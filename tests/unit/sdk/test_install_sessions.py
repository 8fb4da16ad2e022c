"""`agentcg uninstall` and what is open: refused, or given back before the daemon stops. The pool is
a directory with the attributes that the daemon puts on its own (root only)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentcgroup import errors
from agentcgroup.cli import install, install_sessions
from agentcgroup.cli.install_sessions import POOL, OpenSessions, open_sessions
from agentcgroupd.cgroup.tree import XATTR_NAME
from agentcgroupd.sessions import cgroups

DOCKER = "/system.slice/docker-1.scope"


@dataclass
class Host:
    """A cgroup2 mount with a pool, and the daemon and systemd as far as they are asked."""

    mount: Path
    fails: dict[str, errors.AgentcgError] = field(default_factory=dict)
    """What closing a session comes to; without a name: what listing them does."""
    meanwhile: Callable[[], object] | None = None
    """Happens while the daemon stops, the first time."""
    runs: bool = True
    labelled: tuple[str, ...] = ()
    """Containers that a daemon which starts makes sessions, a moment after its start."""
    waits: int = 0
    done: list[str] = field(default_factory=list)

    @property
    def pool(self) -> Path:
        return self.mount / POOL

    def adopt(self, path: str, name: str = "") -> Path:
        """Mark a cgroup as adopted; with a name it has a session's record."""
        cgroup = self.mount / path.strip("/")
        cgroup.mkdir(parents=True, exist_ok=True)
        if name:
            record = f'{{"v": 1, "kind": "session", "id": "{name}"}}'
            os.setxattr(cgroup, XATTR_NAME, record.encode())
        mark = f"{cgroups.ADOPTED_XATTR}{cgroup.stat().st_ino}"
        os.setxattr(self.pool, mark, path.encode())
        return cgroup

    def sessions(self) -> list[SimpleNamespace]:
        """List sessions, as the daemon does: all that are adopted, and one that is not."""
        if "" in self.fails or not self.runs:
            raise self.fails.get("", errors.DaemonAway("nobody listens."))
        found = [SimpleNamespace(id="busy", adopted=False, cgroup_path="/pool/busy")]
        for shown in open_sessions((self.mount,)).adopted:
            name, _, path = shown.partition(" ")
            found.append(SimpleNamespace(id=name, adopted=True, cgroup_path=path.strip("()")))
        return found

    def close_session(self, name: str) -> None:
        """Give back one of them."""
        if name in self.fails:
            raise self.fails[name]
        self.done.append(f"close {name}")
        (session,) = (each for each in self.sessions() if each.id == name)
        cgroup = self.mount / session.cgroup_path.strip("/")
        os.removexattr(self.pool, f"{cgroups.ADOPTED_XATTR}{cgroup.stat().st_ino}")

    def systemctl(self, *arguments: str, may_fail: bool = False) -> None:
        """Start or stop the daemon or the pool."""
        unit = "daemon" if "agentcgroupd.service" in arguments else arguments[1]
        if arguments[0] != "reset-failed":
            self.done.append(f"{arguments[0]} {unit}")
        if unit == "daemon":
            self.runs = arguments[0] == "start"
            self.waits = 1 if self.runs else 0
        if self.meanwhile is not None and not self.runs:
            happens, self.meanwhile = self.meanwhile, None
            happens()

    def sleep(self, seconds: float) -> None:
        """Let the daemon find containers, where it has just been started."""
        if self.waits:
            self.waits = 0
            for name in self.labelled:
                self.adopt(f"/{name}", name)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *error: object) -> None:
        return None


STOPPED = ["stop daemon", "stop agentcg-pool.service", "stop agentcg.slice"]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host whose service is installed and runs, with nothing open."""
    made = Host(tmp_path)
    made.pool.mkdir(parents=True)
    monkeypatch.setattr(install_sessions, "Admin", lambda run_dir: made)
    monkeypatch.setattr(install, "open_sessions", lambda: open_sessions((tmp_path,)))
    monkeypatch.setattr(install, "_has_systemd", lambda: True)
    monkeypatch.setattr(install, "_systemctl", made.systemctl)
    monkeypatch.setattr("agentcgroup.cli.install.time.sleep", made.sleep)
    return made


def test_the_daemon_has_the_same_names() -> None:
    assert install_sessions.ADOPTED_XATTR == cgroups.ADOPTED_XATTR
    assert install_sessions.RECORD_XATTR == XATTR_NAME


def test_what_is_adopted_is_open_as_well(host: Host) -> None:
    assert open_sessions((host.mount / "none", host.mount)) == OpenSessions()
    assert open_sessions((host.mount / "none",)) == OpenSessions()
    (host.pool / "busy").mkdir()
    host.adopt(DOCKER, "web")
    host.adopt("/half")
    found = open_sessions((host.mount / "none", host.mount))
    assert found == OpenSessions(("busy",), ("/half", f"web ({DOCKER})"))


def test_a_container_that_has_ended_is_not_open(host: Host) -> None:
    host.adopt("/gone").rmdir()
    first = host.adopt("/again", "web")
    first.rename(host.mount / "before")  # its inode stays in use
    first.mkdir()
    assert open_sessions((host.mount,)) == OpenSessions()


@pytest.mark.parametrize("inside", [True, False], ids=["in the pool", "adopted"])
def test_it_is_refused_while_sessions_are_open(host: Host, inside: bool) -> None:
    if inside:
        (host.pool / "busy").mkdir()
    else:
        host.adopt(DOCKER, "web")
    named = "sessions are open: busy;" if inside else rf"sessions are open: web \({DOCKER}\);"
    with pytest.raises(errors.Refused, match=named):
        install._stop(False)
    assert host.done == []


def test_by_force_what_is_adopted_is_given_back_before_the_daemon_stops(host: Host) -> None:
    (host.pool / "busy").mkdir()
    host.adopt(DOCKER, "web")
    host.adopt("/other", "db")
    install._stop(True)
    assert host.done == ["close db", "close web", *STOPPED]


def test_a_container_that_starts_while_the_daemon_stops_is_given_back_too(host: Host) -> None:
    host.adopt(DOCKER, "web")
    host.meanwhile = lambda: host.adopt("/late", "late")
    install._stop(True)
    again = ["stop daemon", "start daemon", "close late"]
    assert host.done == ["close web", *again, *STOPPED]


def test_what_a_daemon_that_starts_again_adopts_anew_is_given_back_again(host: Host) -> None:
    host.labelled = ("db", "web")
    for name in host.labelled:
        host.adopt(f"/{name}", name)
    host.meanwhile = lambda: host.adopt("/late", "late")
    install._stop(True)
    first = ["close db", "close web", "stop daemon", "start daemon"]
    assert host.done == [*first, "close db", "close late", "close web", *STOPPED]


def test_without_force_a_container_that_starts_meanwhile_stays_a_session(host: Host) -> None:
    host.meanwhile = lambda: host.adopt("/late", "late")
    with pytest.raises(errors.Refused, match=r"sessions are open: late \(/late\)"):
        install._stop(False)
    assert host.done == ["stop daemon", "start daemon"]


def test_without_a_daemon_nothing_is_stopped_and_what_to_do_is_said(host: Host) -> None:
    host.adopt(DOCKER, "web")
    host.runs = False
    with pytest.raises(errors.Refused) as caught:
        install._stop(True)
    said = str(caught.value)
    assert f"web ({DOCKER}); nobody listens; start it (systemctl start agentcgroupd" in said
    assert host.done == []


def test_what_the_daemon_cannot_give_back_keeps_it_running(host: Host) -> None:
    host.adopt(DOCKER, "web")
    host.adopt("/other", "db")
    host.fails["web"] = errors.Refused("its cgroup is busy")
    with pytest.raises(errors.Refused, match=rf"web \({DOCKER}\): its cgroup is busy"):
        install._stop(True)
    assert host.done == ["close db"]


def test_what_the_daemon_does_not_know_of_is_never_left_unnamed(host: Host) -> None:
    host.adopt(DOCKER, "web")
    host.fails["web"] = errors.NotFound("no such session")
    with pytest.raises(errors.Refused, match=rf"not given back: web \({DOCKER}\)"):
        install._stop(True)
    assert host.done == ["stop daemon", "start daemon"] * install.ROUNDS


def test_the_package_goes_all_the_same_and_says_what_stays(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install_sessions, "open_sessions", lambda: open_sessions((host.mount,)))
    install_sessions.give_back_or_say()
    install_sessions.say_what_stays()
    assert capsys.readouterr().err == ""
    host.adopt(DOCKER, "web")
    host.runs = False
    install_sessions.give_back_or_say()
    assert "only the daemon can give back" in capsys.readouterr().err
    install_sessions.say_what_stays()
    assert f"are stopped: web ({DOCKER})" in capsys.readouterr().err
    host.runs = True
    install_sessions.give_back_or_say()
    install_sessions.say_what_stays()
    assert (host.done, capsys.readouterr().err) == (["close web"], "")
