"""What the verb `told` answers: which reports are told of, how often, and what a hook can read."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import InvalidField
from agentcgroupd.rpc import hook_verb
from agentcgroupd.rpc.hook_verb import ANSWER_BYTES_MAX, SENTENCES_MAX, STOPS_MAX, HookVerb
from agentcgroupd.rpc.packets import Request, packet
from agentcgroupd.state.session import unix_usec


class World:
    """A session with reports, and the verb for a caller who is shown all of it."""

    def __init__(self, *reports: pb.Report) -> None:
        self.session = SimpleNamespace(
            calls={}, reports=[*reports], told=set(), told_of_all=set(), stops_delayed=0
        )
        self.calls = Mock()
        caller = SimpleNamespace(
            session=self.session, sees=lambda call: True, sees_report=lambda report: True
        )
        self.verb = HookVerb(Mock(**{"of.return_value": caller}), self.calls)

    def ask(self, *words: str) -> list[str] | Coroutine[Any, Any, list[str]]:
        return self.verb.told(Mock(), Request(packet(["ACG1", "told", *words])))

    def told(self, *words: str) -> list[str]:
        """What is said; the answer is one that a hook can read."""
        answer = self.ask(*words)
        assert isinstance(answer, list) and len(packet(answer)) <= ANSWER_BYTES_MAX
        says = [word for word in answer if word.startswith("say=")]
        assert answer[: 1 + len(says)] == ["OK", *says]
        return [word.removeprefix("say=") for word in says]


def late(number: int, sentence: str = "It took too long.", **more: Any) -> pb.Report:
    return pb.Report(
        call_id=f"c-{number}",
        command=f"sleep {number}",
        verdict=pb.VERDICT_TIMEOUT,
        sentence=sentence,
        began_unix_usec=unix_usec(),
        **more,
    )


def test_what_does_not_fit_is_counted_and_told_the_next_time() -> None:
    world = World(*map(late, range(SENTENCES_MAX + 2)))
    said = world.told("all=1")
    assert len(said) == SENTENCES_MAX + 1 and said[0].startswith("`sleep 2`: ")
    assert said[-1] == "And 2 more, which `agentcg history` lists."
    assert [text[:9] for text in world.told("all=1")] == ["`sleep 0`", "`sleep 1`"]
    assert world.told("all=1") == []


def test_what_all_has_told_is_left_to_the_hook_of_another_agent() -> None:
    world = World(late(1), late(2))
    assert len(world.told("all=1")) == 2
    assert world.told("command=sleep 1") == ["It took too long."]
    assert world.told("command=sleep 1") == []
    world.session.told_of_all.clear()
    assert [text[:9] for text in world.told("all=1")] == ["`sleep 2`"]


def test_an_agent_is_kept_from_stopping_a_few_times_in_a_row() -> None:
    world = World()
    for number in range(STOPS_MAX):
        world.session.reports.append(late(number))
        assert len(world.told("all=1", "stops=1")) == 1
    world.session.reports.append(late(100))
    assert world.told("all=1", "stops=1") == []
    assert [text[:11] for text in world.told("all=1")] == ["`sleep 100`"]
    world.session.reports.append(late(101))
    assert len(world.told("all=1", "stops=1")) == 1


def test_a_stop_at_which_nothing_is_told_ends_the_row() -> None:
    world = World()
    for number in range(2 * STOPS_MAX):
        world.session.reports.append(late(number))
        assert len(world.told("all=1", "stops=1")) == 1
        assert world.told("all=1", "stops=1") == []


@pytest.mark.parametrize("words", [("all=1",), ("command=sleep 0",)])
def test_a_hook_reads_what_is_said_however_much_there_is(words: tuple[str, ...]) -> None:
    inner = {"in_call_id": "c-0"} if words != ("all=1",) else {}
    reports = [late(n, f"{n} " + 5000 * "\u20ac", **(inner if n else {})) for n in range(2000)]
    said = World(*reports).told(*words)
    assert len(said) == SENTENCES_MAX + 1 and said[-1].startswith("And 1994 more")
    assert all(text.endswith("...") for text in said[:-1])


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ((), "command"),
        (("all=0",), "all"),
        (("all=",), "all"),
        (("all=yes",), "all"),
        (("all=1", "command=make"), "command"),
        (("all=1", "tool_use_id=t"), "tool_use_id"),
        (("all=1", "stops=0"), "stops"),
        (("stops=1",), "stops"),
        (("command=make", "stops=1"), "stops"),
    ],
)
def test_what_asks_for_nothing_or_for_two_things_is_refused(
    words: tuple[str, ...], field: str
) -> None:
    world = World(late(1))
    with pytest.raises(InvalidField) as caught:
        world.ask(*words)
    assert caught.value.field == field and world.told("all=1")


def test_all_waits_for_a_call_whose_command_has_just_ended(monkeypatch: Any) -> None:
    monkeypatch.setattr(hook_verb, "pidfd_alive", lambda pidfd: pidfd == 7)

    def call(pidfd: int, leftovers: str, **more: Any) -> SimpleNamespace:
        return SimpleNamespace(
            main=SimpleNamespace(pidfd=pidfd),
            grant=SimpleNamespace(leftovers=leftovers),
            cgroup=SimpleNamespace(populated=lambda: True),
            **{"held": False, "one_command": False, **more},
        )

    async def ask() -> list[str]:
        world = World()
        ends = call(1, "end")
        stay = [call(7, "end"), call(1, "keep"), call(1, "end", held=True)]
        world.session.calls = dict(enumerate([*stay, ends]))

        async def ended(call: object) -> pb.Report:
            assert call is ends
            report = late(1)
            world.session.reports.append(report)
            return report

        world.calls.ended_report = ended
        answer = world.ask("all=1")
        assert not isinstance(answer, list)
        return await answer

    assert "say=`sleep 1`: It took too long." in asyncio.run(ask())
