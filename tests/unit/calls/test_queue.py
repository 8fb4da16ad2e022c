"""The queue of calls that have not begun, with resources that a test controls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.queue import AdmissionQueue, Ticket
from agentcgroupd.errors import FailedPrecondition, ResourceExhausted
from agentcgroupd.intents.grant import Grant
from agentcgroupd.intents.parse import Intent
from agentcgroupd.intents.request import CallRequest
from agentcgroupd.state.candidate import Candidate, Wait
from agentcgroupd.state.session import Call, Session
from agentcgroupd.telemetry.notices import Notices

GRANT = Grant(
    memory_expected_bytes=0,
    memory_high_bytes=None,
    memory_max_bytes=None,
    cpu_weight=100,
    cpu_max_millicores=None,
    pids_max=None,
    timeout_usec=None,
    priority=50,
    on_pressure="freeze",
)


class Places:
    """A resource of so many places; each call takes one and gives it back when released."""

    def __init__(self, name: str, free: int, patience_s: float = 60, refused_late: bool = True):
        self.name, self.free = name, free
        self._patience_usec, self._refused_late = int(patience_s * 1e6), refused_late
        self.retry: Callable[[], None] = lambda: None
        self.most, self.share = 1000, 1.0

    def on_freed(self, retry: Callable[[], None]) -> None:
        self.retry = retry

    def needed_by(self, candidate: Candidate) -> bool:
        return self.name in candidate.request.argv

    def wait_of(self, candidate: Candidate, now_usec: int) -> Wait:
        return Wait(candidate, now_usec, now_usec + self._patience_usec, self._refused_late)

    def waiting_max(self) -> int:
        return self.most

    def waiting_share(self) -> float:
        return self.share

    def let_in(self, waiting: Sequence[Wait]) -> Mapping[str, Place]:
        found = {}
        for wait in self.in_order(waiting)[: self.free]:
            self.free -= 1
            found[wait.id] = Place(self)
        return found

    def in_order(self, waiting: Iterable[Wait]) -> list[Wait]:
        return sorted(waiting, key=lambda w: (-w.candidate.grant.priority, w.since_usec))

    def outlook(self, ahead: Sequence[Wait]) -> Mapping[str, int]:
        return {"estimate_usec": len(ahead) * 1_000_000}

    def asked(self, candidate: Candidate) -> Mapping[str, int]:
        return {"places": 1}

    def shortage(self, candidate: Candidate) -> str:
        return f"{self.name}: {self.free} places are free"

    def refusal(self, candidate: Candidate, waited_usec: int = 0) -> ResourceExhausted:
        return ResourceExhausted(f"{self.name} is full ({waited_usec > 0})", self.name, "1", "0")


class Place:
    """A single place, until it is given back."""

    def __init__(self, places: Places) -> None:
        self._places: Places | None = places

    def apply(self, grant: Grant) -> Grant:
        assert self._places is not None
        return replace(grant, advice=(*grant.advice, self._places.name))

    def release(self) -> None:
        places, self._places = self._places, None
        if places is not None:
            places.free += 1
            places.retry()


class Audit:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, Any]]] = []

    def write(self, event: str, **fields: Any) -> None:
        self.entries.append((event, fields))


class World:
    """A queue, and what it says."""

    def __init__(self, *resources: Places) -> None:
        self.told: list[pb.Feedback] = []
        self.audit = Audit()
        gauge = SimpleNamespace(set=lambda value: None)
        observed = SimpleNamespace(observe=lambda value: None)
        histogram = SimpleNamespace(labels=lambda *names: observed)
        self.notices = SimpleNamespace(
            audit=self.audit,
            metrics=SimpleNamespace(calls_waiting=gauge, calls_waited=histogram),
            tell=lambda session, call_id, feedback: self.told.append(feedback),
        )
        self.queue = AdmissionQueue(resources, cast(Notices, self.notices))
        self.session = cast(Session, SimpleNamespace(id="s"))
        self.asked = 0

    def enter(self, *needs: str, priority: int = 50, session: Session | None = None) -> Ticket:
        """A call that needs these resources, of the one session or of another."""
        self.asked += 1
        request = CallRequest(f"call {self.asked}", needs, Intent())
        grant = replace(GRANT, priority=priority)
        return self.queue.enter(
            Candidate(str(self.asked), session or self.session, request, grant, 0)
        )

    def waiting(self) -> list[str]:
        """Ids of the calls that wait."""
        return [call.id for call in self.queue.waiting(self.session)]


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """On a loop of its own."""
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_what_is_kept_is_in_the_grant_and_given_back_once() -> None:
    async def scenario() -> None:
        memory, gpu = Places("memory", 1), Places("gpu", 1)
        ticket = World(gpu, memory).enter("memory", "gpu")
        assert ticket.wait is None
        assert ticket.apply(GRANT).advice == ("gpu", "memory")
        assert (gpu.free, memory.free) == (0, 0)
        ticket.release()
        ticket.release()
        assert (gpu.free, memory.free) == (1, 1)

    run(scenario)


def test_one_resource_after_the_other_and_the_first_is_kept_meanwhile() -> None:
    async def scenario() -> None:
        gpu, memory = Places("gpu", 0), Places("memory", 0)
        world = World(gpu, memory)
        ticket = world.enter("gpu", "memory")
        task = asyncio.create_task(world.queue.wait(ticket))
        await asyncio.sleep(0)
        assert ticket.waited_for == [gpu] and world.queue.waits_for(gpu)
        gpu.free = 1
        gpu.retry()
        await asyncio.sleep(0.01)
        assert ticket.waited_for == [gpu, memory] and not world.queue.waits_for(gpu)
        assert gpu.free == 0 and not task.done()
        memory.free = 1
        memory.retry()
        await task
        assert ticket.apply(GRANT).advice == ("gpu", "memory") and world.waiting() == []
        call = cast(Call, SimpleNamespace(id="1", name="make", session=world.session))
        world.queue.began(call, ticket)
        assert "of waiting for gpu and memory." in world.told[-1].sentence
        assert call.waited_usec >= 10_000

    run(scenario)


def test_the_next_is_chosen_by_the_resource_not_by_who_asks() -> None:
    async def scenario() -> None:
        gpu = Places("gpu", 0)
        world = World(gpu)
        low, high = world.enter("gpu", priority=20), world.enter("gpu", priority=80)
        tasks = [asyncio.create_task(world.queue.wait(t)) for t in (low, high)]
        await asyncio.sleep(0)
        places = [world.queue.place(t) for t in (low, high)]
        assert [(p.position, p.waiting) for p in places] == [(2, 2), (1, 2)]
        assert [p.estimate_usec for p in places] == [2_000_000, 1_000_000]
        gpu.free = 1
        late = world.enter("gpu", priority=50)
        assert late.wait is not None, "who asks now does not pass one that goes first"
        await tasks[1]
        tasks.append(asyncio.create_task(world.queue.wait(late)))
        assert world.waiting() == ["1", "3"]
        high.release()
        await tasks[2]
        assert world.waiting() == ["1"], "the one between them is next"
        late.release()
        await tasks[0]

    run(scenario)


def test_who_waits_is_told_its_place() -> None:
    async def scenario() -> None:
        world = World(Places("gpu", 0))
        task = asyncio.create_task(world.queue.wait(world.enter("gpu")))
        await asyncio.sleep(0)
        (feedback,) = world.told
        assert feedback.code == pb.FEEDBACK_CODE_WAITING
        assert feedback.sentence == (
            "'call 1' waits for gpu: 0 places are free. Number 1 of 1, in about 1 s; after 1 min "
            "it is refused."
        )
        assert dict(feedback.numbers) == {"position": 1, "waiting": 1, "estimate_usec": 1e6}
        (event, fields) = world.audit.entries[0]
        assert (event, fields["position"], fields["places"]) == ("call_waiting", 1, 1)
        task.cancel()

    run(scenario)


@pytest.mark.parametrize("refused", [True, False])
def test_at_its_deadline(refused: bool) -> None:
    async def scenario() -> None:
        world = World(Places("gpu", 0, 0.05, refused))
        ticket = world.enter("gpu")
        if refused:
            with pytest.raises(ResourceExhausted, match=r"gpu is full \(True\)"):
                await world.queue.wait(ticket)
            assert not ticket.late
        else:
            await world.queue.wait(ticket)
            assert ticket.late and ticket.wait is None
        assert world.waiting() == [] and len(world.queue) == 0

    run(scenario)


def test_who_may_not_wait_is_refused_and_keeps_nothing() -> None:
    async def scenario() -> None:
        gpu, memory = Places("gpu", 1), Places("memory", 0, 0)
        world = World(gpu, memory)
        with pytest.raises(ResourceExhausted, match="memory is full"):
            world.enter("gpu", "memory")
        assert gpu.free == 1 and len(world.queue) == 0

    run(scenario)


def test_too_many() -> None:
    async def scenario() -> None:
        gpu, memory = Places("gpu", 0), Places("memory", 0)
        gpu.most = 2
        world = World(gpu, memory)
        tickets = [world.enter("gpu"), world.enter("gpu"), world.enter("memory")]
        with pytest.raises(ResourceExhausted, match="2 calls wait for gpu already") as error:
            world.enter("gpu")
        assert (error.value.field, error.value.allowed) == ("gpu", "0")
        assert len(world.queue) == world.queue.count(world.session) == len(tickets)

    run(scenario)


def test_no_number_of_sessions_fills_the_queue() -> None:
    """Each may have its share of the places that the others leave, and one at least."""

    async def scenario() -> None:
        gpu = Places("gpu", 0)
        gpu.most, gpu.share = 100, 0.25
        world = World(gpu)
        sessions = [cast(Session, SimpleNamespace(id=f"s{i}")) for i in range(12)]
        tickets = []
        for session in sessions:
            with pytest.raises(ResourceExhausted, match="its share of the") as error:
                for _ in range(100):
                    tickets.append(world.enter("gpu", session=session))
            assert error.value.field == "gpu"
            assert world.queue.count(session) >= 1
        assert world.queue.count(sessions[0]) == 25
        assert len(world.queue) < 100
        others = [cast(Session, SimpleNamespace(id="late")) for _ in range(3)]
        for session in others:
            world.enter("gpu", session=session)

    run(scenario)


def test_whoever_hangs_up_leaves_nothing() -> None:
    """While it waits, and when it has just been let in."""

    async def scenario() -> None:
        gpu = Places("gpu", 0)
        world = World(gpu)
        tickets = [world.enter("gpu"), world.enter("gpu")]

        async def begin(ticket: Ticket) -> None:
            try:
                await world.queue.wait(ticket)
            finally:
                ticket.release()

        waits, started = (asyncio.create_task(begin(t)) for t in tickets)
        await asyncio.sleep(0)
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        assert world.waiting() == ["2"]
        gpu.free = 1
        gpu.retry()
        assert gpu.free == 0
        started.cancel()
        await asyncio.gather(started, return_exceptions=True)
        assert gpu.free == 1 and len(world.queue) == 0

    run(scenario)


def test_a_call_is_taken_out_by_its_own_session_or_the_operator() -> None:
    async def scenario() -> None:
        world = World(Places("gpu", 0))
        tasks = [asyncio.create_task(world.queue.wait(world.enter("gpu"))) for _ in range(2)]
        await asyncio.sleep(0)
        stranger = cast(Session, SimpleNamespace(id="t"))
        assert world.queue.leave("1", "no", stranger) is None
        assert world.queue.leave("7", "no") is None
        report = world.queue.leave("1", "its agent ended it", world.session)
        assert report is not None and report.verdict == pb.VERDICT_CANCELLED
        assert report.sentence == "It had not begun: its agent ended it while it waited for gpu."
        with pytest.raises(FailedPrecondition, match="its agent ended it"):
            await tasks[0]
        world.queue.close_session(world.session)
        with pytest.raises(FailedPrecondition, match="session s is being closed"):
            await tasks[1]
        assert len(world.queue) == 0

    run(scenario)


def test_a_call_that_was_let_in_and_taken_out_does_not_begin() -> None:
    async def scenario() -> None:
        gpu = Places("gpu", 0)
        world = World(gpu)
        task = asyncio.create_task(world.queue.wait(world.enter("gpu")))
        await asyncio.sleep(0)
        gpu.free = 1
        gpu.retry()
        assert world.queue.leave("1", "its agent ended it") is not None
        with pytest.raises(FailedPrecondition):
            await task

    run(scenario)
