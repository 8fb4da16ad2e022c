"""Which call of its session a caller finds by a ticket."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroupd.errors import NotFound
from agentcgroupd.rpc.callers import Caller

TICKET = "0123456789abcdef"


def call(id: str, ticket: str, parent: Any = None) -> Any:
    return SimpleNamespace(id=id, ticket=ticket, parent=parent, observed=False)


def caller(*calls: Any, inside: Any = None) -> Caller:
    session: Any = SimpleNamespace(calls={each.id: each for each in calls})
    return Caller(session, inside, trusted=False)


def test_the_newest_call_of_the_ticket_is_found() -> None:
    first, second, other = call("1", TICKET), call("2", TICKET), call("3", "f" * 16)
    assert caller(first, second, other).find_by_ticket(TICKET) is second


def test_an_agent_is_not_led_into_a_tools_call_by_its_ticket() -> None:
    """A tool can read the ticket from the command line of the launcher."""
    tool = call("tool", "")
    mine, trap = call("mine", TICKET), call("trap", TICKET, tool)
    assert caller(tool, mine, trap).find_by_ticket(TICKET) is mine
    with pytest.raises(NotFound):
        caller(tool, trap).find_by_ticket(TICKET)
    assert caller(tool, mine, trap, inside=tool).find_by_ticket(TICKET) is trap


@pytest.mark.parametrize("ticket", ["", TICKET[:-1], TICKET.upper() + "x" * 1000])
def test_without_such_a_ticket_there_is_no_call(ticket: str) -> None:
    with pytest.raises(NotFound) as refused:
        caller(call("1", ""), call("2", TICKET)).find_by_ticket(ticket)
    assert len(refused.value.value) <= 64
