"""Which processes in an agent leaf are the agent's own, and which were put there from outside, as a
container's runtime does for `docker exec`.

A runtime may move a process into the leaf, which then executes the program; or it starts a helper
there, which forks that process. So an outsider is a process that nobody in the leaf has forked, and
whatever such a helper forks. Processes that are older than the session and those that entered by
the launcher are insiders.
"""

from __future__ import annotations

import fnmatch
from itertools import islice

from agentcgroupd.boundaries.processes import TICK_NS, Key, lives
from agentcgroupd.errors import AgentcgroupdError
from agentcgroupd.host.proc import cgroup_of
from agentcgroupd.host.syscalls import process_stat
from agentcgroupd.state.session import AGENT_LEAF, Session, boottime_usec

RUNTIMES = ("runc*", "crun*", "youki*", "conmon*", "containerd*", "docker*")
"""Names of the processes by which runtimes start others in a container."""

PRUNED_MOST = 256
"""How many processes are looked at each time."""


def is_runtime(comm: str) -> bool:
    """Whether a process of that name is a runtime's."""
    return any(fnmatch.fnmatchcase(comm, pattern) for pattern in RUNTIMES)


class Insiders:
    """The agents' own processes of which no fork was seen."""

    def __init__(self) -> None:
        self._keys: dict[Key, None] = {}
        """A set that is in order: what was looked at last is behind."""
        self._since: dict[int, int] = {}
        """When each session was opened, in clock ticks since boot, by the id of its agent leaf."""

    def opened(self, session: Session) -> None:
        """Count all that runs now as a session's own, should it be in there."""
        self._since[session.agent.id] = boottime_usec() * 1000 // TICK_NS

    def closed(self, session: Session) -> None:
        """Forget a session."""
        self._since.pop(session.agent.id, None)

    def has(self, session: Session, key: Key) -> bool:
        """Whether a process in a session's agent leaf is the agent's own."""
        return key in self._keys or key[1] < self._since.get(session.agent.id, 0)

    def add(self, key: Key) -> None:
        """Count a process as an agent's own."""
        self._keys[key] = None

    def add_pid(self, pid: int) -> None:
        """Count a process as an agent's own, unless it has ended."""
        try:
            self._keys[pid, process_stat(pid).start_ticks] = None
        except (FileNotFoundError, ProcessLookupError):
            return

    def ended(self, key: Key) -> None:
        """Forget a process."""
        self._keys.pop(key, None)

    def prune(self) -> None:
        """Forget processes whose end nobody has told; to be called again and again. It was lost, or
        they had left the session."""
        for key in list(islice(self._keys, PRUNED_MOST)):
            del self._keys[key]
            if lives(key):
                self._keys[key] = None

    def forks(self, session: Session, parent: Key) -> bool:
        """Whether an agent's own process has forked: one that is known, or that is found in the
        agent leaf now and so becomes known. One that has ended counts as such."""
        if parent in self._keys:
            return True
        leaf = f"{session.cgroup_path}/{AGENT_LEAF}"
        try:
            path = cgroup_of(parent[0])
        except (FileNotFoundError, ProcessLookupError):
            return True
        except AgentcgroupdError:
            return False
        if path != leaf and not path.startswith(f"{leaf}/"):
            return False
        self._keys[parent] = None
        return True
