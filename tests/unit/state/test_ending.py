"""The account of a call's end: what its record keeps, and what another command begins anew."""

from __future__ import annotations

import json

from agentcgroupd.state.ending import FACTS_MOST, GONE_MOST, Account, Gone


def account_of(moves: int, main_moves: int = 0) -> Account:
    """An account of a call of which so many processes were moved out."""
    account = Account(commands=1)
    for is_main, count in ((False, moves), (True, main_moves)):
        for n in range(count):
            if account.count_gone(is_main) <= GONE_MOST:
                gone = Gone(100 + n, "sleep", 1, "systemd", f"/x/{n}", 5 + n)
                account.name_gone(gone, is_main, f"sleep ({100 + n}) was moved", "test")
    return account


def test_what_left_is_in_the_record() -> None:
    account = account_of(moves=7, main_moves=2)
    account.gone_more, account.gone_before = True, 3
    found = Account.from_plain(json.loads(json.dumps(account.plain())))
    assert found == account
    assert (found.gone_count, found.gone_before, found.main_moves) == (7, 3, 2)
    assert [gone.pid for gone in found.gone] == [100, 101, 102, 103]


def test_where_nothing_left_the_record_says_nothing() -> None:
    assert not {"gone", "gone_counts"} & account_of(moves=0).plain().keys()


def test_another_command_begins_anew_and_the_earlier_ones_are_counted() -> None:
    account = account_of(moves=7)
    account.gone_more = True
    account.command_begins(None)
    assert (account.gone, account.gone_count, account.gone_before) == ([], 0, 7)
    assert account.gone_more is False
    account.count_gone(is_main=False)
    account.command_begins(None)
    assert account.gone_before == 8


def test_a_main_process_that_moves_on_and_on_leaves_room_for_other_facts() -> None:
    account = account_of(moves=0, main_moves=10 * FACTS_MOST)
    account.note_victim(9, "hog", "mark_victim", 1)
    assert len(account.facts) == GONE_MOST + 1
    assert account.facts[-1].what == "the kernel's OOM killer chose hog (9)"
