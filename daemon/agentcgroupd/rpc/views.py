"""What the daemon says of itself when asked: pool, calls, policy, and a session's budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

from agentcgroup import __version__
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.calls.queue import AdmissionQueue
from agentcgroupd.cgroup import knobs
from agentcgroupd.errors import FailedPrecondition, NotFound
from agentcgroupd.gpu.service import Gpus
from agentcgroupd.guard.loop import GuardLoop
from agentcgroupd.guard.policy_files import PolicyFiles
from agentcgroupd.host.idle import IdleCpus
from agentcgroupd.policy.explain import explain, policy_state
from agentcgroupd.rpc.pages import Key, page
from agentcgroupd.sessions.holding import held_beside_calls, used_for_good, used_of_pool
from agentcgroupd.sessions.lifecycle import SessionLifecycle
from agentcgroupd.sessions.pool import Pool
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.session import Call, Session, held_around, unix_usec
from agentcgroupd.telemetry.wire import call_to_proto, is_paused, pool_pressure, usage_of
from agentcgroupd.turns import Slices
from agentcgroupd.units import show_bytes, show_cores

HELD_MATTERS_BYTES = 16 << 20
"""Less than this is not worth a word."""
_FILES = "files in tmpfs or /dev/shm whose call has ended hold"


def _holders(session: Session) -> str:
    """Name what holds much of a session's memory besides its calls."""
    held = held_beside_calls(session)
    parts = [
        f"{name} {show_bytes(size)}"
        for name, size in (
            ("your own processes hold", held.agent_bytes),
            (_FILES, held.files_bytes),
        )
        if size >= HELD_MATTERS_BYTES
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _itself(call: pb.Call) -> pb.Call:
    return call


class Views:
    """Reads what there is; changes nothing."""

    def __init__(
        self,
        pool: Pool,
        sessions: Sessions,
        lifecycle: SessionLifecycle,
        calls: Calls,
        queue: AdmissionQueue,
        policy_files: PolicyFiles,
        gpus: Gpus,
        guard: GuardLoop | None,
    ) -> None:
        """`guard`: None where it does not run."""
        self._pool = pool
        self._sessions = sessions
        self._lifecycle = lifecycle
        self._calls = calls
        self._queue = queue
        self._policy_files = policy_files
        self._gpus = gpus
        self._guard = guard
        self._started_unix_usec = unix_usec()
        self.idle_cpus = IdleCpus()

    async def list_calls(
        self,
        sessions: list[Session],
        request: pb.ListCallsRequest,
        admin: bool,
        slices: Slices,
        sees: Callable[[Call], bool] | None = None,
    ) -> pb.ListCallsResponse:
        """A page of the calls that wait, then of the open calls with what they use now, oldest
        first. `sees`: of open calls, those that the caller is shown, and none that waits; None:
        all."""
        waiting = [call for session in sessions for call in self._queue.waiting(session)]
        if sees is not None:
            waiting = []
        items: list[tuple[Key, Callable[[], pb.Call]]] = [
            ((number - len(waiting), call.id), partial(_itself, call))
            for number, call in enumerate(waiting)
        ]
        calls = [call for session in sessions for call in session.calls.values()]
        if sees is not None:
            calls = [call for call in calls if sees(call)]
        calls.sort(key=lambda call: (call.began_boot_usec, call.id))
        items += (
            ((call.began_boot_usec, call.id), partial(call_to_proto, call, admin, usage=True))
            for call in calls
        )
        found, token = await page(items, request.page_size, request.page_token, slices)
        return pb.ListCallsResponse(calls=found, next_page_token=token)

    async def list_sessions(
        self, request: pb.ListSessionsRequest, slices: Slices
    ) -> pb.ListSessionsResponse:
        """A page of the open sessions, oldest first."""
        sessions = sorted(self._sessions.open.values(), key=lambda s: (s.opened_unix_usec, s.id))
        items = (
            (
                (session.opened_unix_usec, session.id),
                partial(self._lifecycle.describe, session, True),
            )
            for session in sessions
        )
        found, token = await page(items, request.page_size, request.page_token, slices)
        return pb.ListSessionsResponse(sessions=found, next_page_token=token)

    def describe_pool(self) -> pb.Pool:
        """The pool as sent."""
        own = self._pool.cgroup.read_if(knobs.MEMORY_CURRENT)
        return pb.Pool(
            cgroup_path=self._pool.path,
            memory_max_bytes=self._pool.memory_max_bytes,
            memory_current_bytes=None if own is None else own + self._pool.adopted_bytes,
            cpu_millicores=self._pool.cpu_millicores,
            sessions_open=len(self._sessions.open),
            calls_open=len(self._calls.open),
            calls_begun=self._calls.begun,
            calls_ended=self._calls.ended,
            leftovers_removed=self._lifecycle.leftovers_removed,
            controllers=self._pool.controllers,
            not_enforced=self._pool.not_enforced(),
            version=__version__,
            kernel=os.uname().release,
            started_unix_usec=self._started_unix_usec,
            calls_waiting=len(self._queue),
            calls_paused=sum(is_paused(call) for call in self._calls.open.values()),
            usage=usage_of(self._pool.cgroup),
            memory_held_bytes=self._pool.held_bytes,
            **pool_pressure(self._pool.cgroup),
        )

    def budget(self, session: Session, call: Call | None = None) -> pb.Budget:
        """What is left for a session: the tightest of its own limit and the pool's. `call`: the one
        that a tool asks from, whose limits hold for it as well."""
        limits, pool = session.limits, self._pool
        used = session.cgroup.read_if(knobs.MEMORY_CURRENT)
        sides = [
            (limits.memory_max_bytes, used_for_good(session.cgroup)),
            (pool.memory_max_bytes, used_of_pool(pool)),
        ]
        sides += [_limit_and_use(each) for each in _with_outer(call)]
        left = [top - now for top, now in sides if top is not None and now is not None]
        tops = [top for top, _ in sides if top]
        available = max(0, min(left)) if left else None
        pids = session.cgroup.read_if(knobs.PIDS_CURRENT)
        pids_limit = limits.pids_max if pids is not None else None
        pids_left = limits.pids_max - pids if pids is not None and limits.pids_max else None
        for each in _with_outer(call):
            used_pids, most = each.cgroup.read_if(knobs.PIDS_CURRENT), each.grant.pids_max
            if used_pids is not None and most is not None:
                pids_left = min(most - used_pids, most if pids_left is None else pids_left)
                pids_limit = min(most, pids_limit or most)
        millicores = min(limits.cpu_max_millicores or pool.cpu_millicores, pool.cpu_millicores)
        cores = [each.grant.cpu_max_millicores for each in _with_outer(call)]
        millicores = min([millicores, *filter(None, cores)])
        idle = self.idle_cpus.millicores()
        memory = "memory without a limit"
        if tops and available is None:
            memory = f"a limit of {show_bytes(min(tops))} of memory, which this host does not keep,"
        if available is not None:
            memory = f"{show_bytes(available)} of memory{_holders(session)}"
        calls = f"{len(session.calls)} of {limits.calls_max} calls open"
        return pb.Budget(
            memory_limit_bytes=min(tops) if tops else None,
            memory_used_bytes=used,
            memory_available_bytes=available,
            cpu_limit_millicores=millicores,
            cpu_available_millicores=min(millicores, idle),
            pids_limit=pids_limit,
            pids_available=pids_left,
            calls_open=len(session.calls),
            calls_max=limits.calls_max,
            sentence=f"You have {memory} and {show_cores(millicores)}; {calls}.",
            gpus=self._gpus.grants.budget(),
        )

    def describe_policy(self) -> pb.PolicyState:
        """The policy in force; how its rulesets stand, where the guard runs. Raises KnobError."""
        files, guard = self._policy_files, self._guard
        state = (files.loaded, files.error, files.loaded_unix_usec)
        if guard is None:
            return policy_state(*state)
        return policy_state(*state, guard.snapshot(), guard.state)

    def explain(self, call: Call) -> pb.Explanation:
        """How the policy sees an open call, and what it did to it. Raises RequestError,
        KnobError."""
        if self._guard is None:
            raise FailedPrecondition(
                "the guard does not run here, so no policy acts on calls: it is disabled "
                "(guard.enabled), or the pool has no limit"
            )
        if call.parent is not None:
            raise FailedPrecondition(
                f"call {call.id} is inside call {call.parent.id}: the policy acts on the outermost "
                "call as a whole, so ask about that"
            )
        snapshot = self._guard.snapshot()
        if all(seen.id != call.id for seen in snapshot.calls):
            raise NotFound(f"call {call.id} is ending", "call_id", call.id)
        holder = held_around(call)
        held = "" if holder is None else holder.id
        state = self._guard.state
        return explain(self._guard.policy, snapshot, state, call.id, call.history, held)


def _with_outer(call: Call | None) -> Iterator[Call]:
    """A call and those that it is in."""
    while call is not None:
        yield call
        call = call.parent


def _limit_and_use(call: Call) -> tuple[int | None, int | None]:
    return call.grant.memory_max_bytes, used_for_good(call.cgroup)
