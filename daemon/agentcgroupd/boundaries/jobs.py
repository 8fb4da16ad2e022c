"""Jobs of shells that read their commands: an agent keeps one for a whole session, and each command
that it sends there is a job, all of whose processes are one call."""

from __future__ import annotations

from agentcgroupd.boundaries.processes import Key, ObservedCall, lives
from agentcgroupd.host.proc import command_line
from agentcgroupd.host.syscalls import process_stat
from agentcgroupd.intents.script import is_shell, reads_commands
from agentcgroupd.state.session import Session

CMDLINE_BYTES = 4096
JOBS_OF_SESSION = 1024
"""Jobs of a session that are known at a time; what else its shells start is a call for each."""
TOGETHER_NS = 100_000_000


def reads_its_commands(key: Key, comm: str) -> bool:
    """Whether a process is a shell that reads its commands, or was forked by one and has executed
    nothing since. `comm`: its name, so that only a shell is looked at."""
    if not is_shell(comm) or not reads_commands(command_line(key[0], CMDLINE_BYTES)):
        return False
    return lives(key)


class Jobs:
    """Finds the call that a process of a job belongs to."""

    def __init__(self) -> None:
        self._newest: dict[str, dict[tuple[Key, int], ObservedCall]] = {}
        """By session, then by shell and process group; a shell without job control has one group
        for all."""

    def of(self, session: Session, pid: int, shell: Key, at_ns: int) -> ObservedCall | None:
        """Find the call that others of a process's job are in. `at_ns`: when it executed its
        program. A shell with job control gives each job a process group. Without, what is started
        at almost the same time is a job, such as a pipeline."""
        group = _group_of(pid)
        found = self._newest.get(session.id, {}).get((shell, group))
        if found is None or not found.members:
            return None
        has_job_control = group != _group_of(shell[0])
        return found if has_job_control or at_ns - found.at_ns < TOGETHER_NS else None

    def began(self, pid: int, shell: Key, observed: ObservedCall) -> None:
        """Note the call of a job's first process."""
        jobs = self._newest.setdefault(observed.session.id, {})
        if len(jobs) >= JOBS_OF_SESSION:
            for key in [key for key, call in jobs.items() if not call.members]:
                del jobs[key]
        if len(jobs) < JOBS_OF_SESSION:
            jobs[shell, _group_of(pid)] = observed

    def closed(self, session: Session) -> None:
        """Forget the jobs of a session."""
        self._newest.pop(session.id, None)


def _group_of(pid: int) -> int:
    """Return the process group of a process; 0: it has ended."""
    try:
        return process_stat(pid).group
    except (FileNotFoundError, ProcessLookupError):
        return 0
