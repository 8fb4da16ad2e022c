"""Sessions that are open when the service goes: those in its pool end with it, and what it has
adopted elsewhere, cgroups of containers, is given back while the daemon runs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agentcgroup import errors, paths
from agentcgroup.admin import Admin

from .install_pins import MOUNTS
from .output import complain

POOL = Path("agentcg.slice/agentcg-pool.service/pool")
RECORD_XATTR = "trusted.agentcgroup"
"""On a session's cgroup: its record; daemon/agentcgroupd/cgroup/tree.py has it too."""
ADOPTED_XATTR = "trusted.agentcgroup.adopted."
"""On the pool, one for each adopted cgroup: its id in the name, its path as the value;
daemon/agentcgroupd/sessions/cgroups.py has it too."""


@dataclass(frozen=True, slots=True)
class OpenSessions:
    """What is open below the service's pool, and what its daemon has adopted elsewhere."""

    inside: tuple[str, ...] = ()
    """Names of the sessions in the pool."""
    adopted: tuple[str, ...] = ()
    """Adopted ones, each with the path of its cgroup below the mount."""

    def __str__(self) -> str:
        return ", ".join((*self.inside, *self.adopted))


def open_sessions(mounts: tuple[Path, ...] = MOUNTS, pool: Path = POOL) -> OpenSessions:
    """Look for open sessions; nobody is asked. `pool`: below one of the mounts. Raises OSError."""
    for mount in mounts:
        directory = mount / pool
        if directory.is_dir():
            inside = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
            return OpenSessions(tuple(inside), tuple(sorted(_adopted(mount, directory))))
    return OpenSessions()


def _adopted(mount: Path, pool: Path) -> Iterator[str]:
    for name in os.listxattr(pool):
        if not name.startswith(ADOPTED_XATTR):
            continue
        try:
            path = os.fsdecode(os.getxattr(pool, name))
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            continue  # given back meanwhile
        cgroup = mount / path.strip("/")
        try:
            there = str(cgroup.stat().st_ino) == name.removeprefix(ADOPTED_XATTR)
        except FileNotFoundError:
            continue
        if there:  # else it ended, and another is at its path
            yield _shown(cgroup, path)


def _shown(cgroup: Path, path: str) -> str:
    """A session's name and path; its path alone, where it was not wholly adopted or given back."""
    try:
        record = json.loads(os.getxattr(cgroup, RECORD_XATTR))
        return f"{record['id']} ({path})"
    except (OSError, ValueError, KeyError, TypeError):
        return path


def give_back(found: OpenSessions, run_dir: str) -> None:
    """Have the daemon close all adopted sessions: their cgroups are then as they were found, and
    their processes go on. `found`: what is open, to be named.

    Raises:
        Refused: the daemon does not answer, or could not give back all of them.
        PermissionDenied: it does not take this process for the operator.
    """
    with Admin(run_dir) as admin:
        try:
            sessions = [session for session in admin.sessions() if session.adopted]
        except errors.Unavailable as error:
            raise errors.Refused(
                f"only the daemon can give back what it has adopted: {', '.join(found.adopted)}; "
                f"{error.sentence.rstrip('.')}; start it (systemctl start agentcgroupd.service) "
                "and try again, or stop these containers first",
                code="FAILED_PRECONDITION",
            ) from error
        failed = []
        for session in sessions:
            try:
                admin.close_session(session.id)
            except errors.NotFound:  # it has ended meanwhile
                continue
            except errors.AgentcgError as error:
                failed.append(f"{session.id} ({session.cgroup_path}): {error.sentence}")
    if failed:
        raise errors.Refused(
            f"not given back: {'; '.join(failed)}; try again, or stop these containers first",
            code="FAILED_PRECONDITION",
        )


# For the Debian package, which goes whatever stays


def give_back_or_say() -> None:
    """Give back what is adopted, as far as the daemon does it, and say on stderr why it does not.
    Raises OSError."""
    found = open_sessions()
    if not found.adopted:
        return
    try:
        give_back(found, paths.DEFAULT_RUN_DIR)
    except errors.AgentcgError as error:
        complain(f"agentcgroup: {error.sentence}")


def say_what_stays() -> None:
    """Name on stderr what is still adopted once the daemon has stopped. Raises OSError."""
    left = open_sessions().adopted
    if left:
        complain(
            "agentcgroup: these stay split, with the limits of their sessions, until their "
            f"containers are stopped: {', '.join(left)}"
        )
