"""What the daemon says of itself when asked: pool, sessions, calls, and what is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from agentcgroup import __version__
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.sched import CpuNumbers
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.cgroup import knobs
from agentcgroupd.errors import CgroupGone, FailedPrecondition, NotFound
from agentcgroupd.guard.policy_files import PolicyFiles
from agentcgroupd.policy.explain import explain, policy_state
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.session import Call, Session, unix_usec
from agentcgroupd.telemetry.wire import call_to_proto, session_to_proto
from agentcgroupd.units import CgroupId, show_bytes

if TYPE_CHECKING:
    from agentcgroupd.gpu.service import Gpus
    from agentcgroupd.guard.loop import Guard


class Answers:
    """Reads what is there; changes nothing."""

    def __init__(
        self, pool: Pool, sessions: Sessions, calls: Calls,
        waiting: Callable[[Session], list[pb.Call]],
        cpu: Callable[[CgroupId], CpuNumbers | None] = lambda cgroup: None,
    ) -> None:  # fmt: skip
        self._cpu = cpu
        self.pool = pool
        self.sessions = sessions
        self.calls = calls
        self._waiting = waiting
        self.started_unix_usec = unix_usec()
        self.leftovers_removed = 0
        self.gpus: Gpus | None = None
        self.guard: Guard | None = None
        """None: it does not run here."""

    def describe(self, session: Session, admin: bool) -> pb.Session:
        """A session as sent. Raises CgroupGone."""
        return session_to_proto(session, admin, self.sessions.not_enforced(),
                                self._cpu(session.cgroup.id))  # fmt: skip

    def list_calls(self, sessions: list[Session], admin: bool) -> pb.ListCallsResponse:
        """Open calls with what they use now."""
        calls = []
        for session in sessions:
            calls += self._waiting(session)
            for call in session.calls.values():
                try:
                    calls.append(call_to_proto(call, admin, usage=True))
                except CgroupGone:
                    continue
        return pb.ListCallsResponse(calls=calls)

    def describe_pool(self) -> pb.Pool:
        """The pool as sent."""
        return pb.Pool(
            cgroup_path=self.pool.path,
            memory_max_bytes=self.pool.memory_max_bytes,
            memory_current_bytes=self.pool.cgroup.read_if(knobs.MEMORY_CURRENT),
            cpu_millicores=self.pool.cpu_millicores,
            sessions_open=len(self.sessions.open),
            calls_open=len(self.calls.open),
            calls_begun=self.calls.begun,
            calls_ended=self.calls.ended,
            leftovers_removed=self.leftovers_removed,
            controllers=self.pool.controllers,
            not_enforced=self.sessions.not_enforced(),
            version=__version__,
            kernel=os.uname().release,
            started_unix_usec=self.started_unix_usec,
        )

    def budget(self, session: Session) -> pb.Budget:
        """What is left for a session: the tightest of its own limit and the pool's."""
        limits, cgroup = session.limits, session.cgroup
        used = cgroup.read_if(knobs.MEMORY_CURRENT)
        left: list[int] = []
        if used is not None and limits.memory_max_bytes is not None:
            left.append(limits.memory_max_bytes - used)
        pool_used = self.pool.cgroup.read_if(knobs.MEMORY_CURRENT)
        if pool_used is not None and self.pool.memory_max_bytes is not None:
            left.append(self.pool.memory_max_bytes - pool_used)
        tops = [top for top in (limits.memory_max_bytes, self.pool.memory_max_bytes) if top]
        pids = cgroup.read_if(knobs.PIDS_CURRENT)
        cores = min(limits.cpu_max_millicores or self.pool.cpu_millicores, self.pool.cpu_millicores)
        idle = max(0, round((len(os.sched_getaffinity(0)) - os.getloadavg()[0]) * 1000))
        available = max(0, min(left)) if left else None
        memory = (
            f"{show_bytes(available)} of memory"
            if available is not None
            else "memory without a limit"
        )
        open_calls = f"{len(session.calls)} of {limits.calls_max} calls open"
        sentence = f"You have {memory} and {cores / 1000:g} cores; {open_calls}."
        return pb.Budget(
            memory_limit_bytes=min(tops) if tops else None,
            memory_used_bytes=used,
            memory_available_bytes=available,
            cpu_limit_millicores=cores,
            cpu_available_millicores=min(cores, idle),
            pids_limit=limits.pids_max if pids is not None else None,
            pids_available=limits.pids_max - pids if pids is not None and limits.pids_max else None,
            calls_open=len(session.calls),
            calls_max=limits.calls_max,
            sentence=sentence,
            gpus=self.gpus.grants.budget() if self.gpus is not None else (),
        )

    def describe_policy(self, files: PolicyFiles) -> pb.PolicyState:
        """The policy in force; how its rulesets stand, where the guard runs. Raises KnobError."""
        state, guard = (files.loaded, files.error, files.loaded_unix_usec), self.guard
        if guard is None:
            return policy_state(*state)
        return policy_state(*state, guard.snapshot(), guard.state)

    def explain(self, call: Call) -> pb.Explanation:
        """How the policy sees an open call, and what it did to it. Raises RequestError,
        KnobError."""
        if self.guard is None:
            raise FailedPrecondition(
                "the guard does not run here, so no policy acts on calls: it is disabled "
                "(guard.enabled), or the pool has no limit"
            )
        snapshot = self.guard.snapshot()
        if all(seen.id != call.id for seen in snapshot.calls):
            raise NotFound(f"call {call.id} is ending", "call_id", call.id)
        return explain(self.guard.policy, snapshot, self.guard.state, call.id, call.history)
