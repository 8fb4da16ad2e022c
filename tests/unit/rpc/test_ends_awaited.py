"""A caller that asks for a call's end is told of it also where that comes before the answer is
awaited: a task awaits the answer, which runs after whatever the event loop has to do before."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any
from unittest.mock import Mock

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.rpc import hook_verb
from agentcgroupd.rpc.hook_verb import HookVerb
from agentcgroupd.rpc.packets import Request, packet
from agentcgroupd.rpc.verbs import AgentVerbs


class Ending:
    """Calls of which one ends as soon as the loop goes round."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[asyncio.Future[pb.Report]] = []
        loop.call_soon(self._end)

    def ended_report(self, call: object) -> Coroutine[Any, Any, pb.Report]:
        future: asyncio.Future[pb.Report] = self._loop.create_future()
        self._waiting.append(future)
        return _awaited(future)

    def _end(self) -> None:
        report = pb.Report(call_id="c-1", verdict=pb.VERDICT_TIMEOUT, sentence="It took too long.")
        for future in self._waiting:
            future.set_result(report)


async def _awaited(future: asyncio.Future[pb.Report]) -> pb.Report:
    return await future


def test_a_launcher_hears_of_a_call_that_ends_at_that_moment() -> None:
    async def ask() -> list[str]:
        caller = Mock()
        caller.session.report.return_value = None
        caller.find.return_value.grant.leftovers = "end"
        callers = Mock(**{"of.return_value": caller})
        calls: Any = Ending(asyncio.get_running_loop())
        verbs = AgentVerbs(callers, calls, Mock(), ())
        answer = verbs.report(Mock(), Request(packet(["ACG1", "report", "call=c-1"])))
        assert not isinstance(answer, list)
        return await asyncio.wait_for(asyncio.ensure_future(answer), 2)

    assert asyncio.run(ask()) == ["OK", "say=It took too long."]


def test_a_hook_does_not_wait_for_a_call_that_ends_at_that_moment(monkeypatch: Any) -> None:
    async def ask() -> float:
        call = Mock()
        call.grant.leftovers, call.purpose.tool_use_id = "end", "t-1"
        caller = Mock()
        caller.session.calls, caller.session.reports = {"c-1": call}, []
        callers = Mock(**{"of.return_value": caller})
        calls: Any = Ending(asyncio.get_running_loop())
        monkeypatch.setattr(hook_verb, "pidfd_alive", lambda pidfd: False)
        request = Request(packet(["ACG1", "told", "tool_use_id=t-1"]))
        answer = HookVerb(callers, calls).told(Mock(), request)
        assert not isinstance(answer, list)
        begun = asyncio.get_running_loop().time()
        assert await asyncio.ensure_future(answer) == ["OK"]
        return asyncio.get_running_loop().time() - begun

    assert asyncio.run(ask()) < hook_verb.ENDING_S / 2
