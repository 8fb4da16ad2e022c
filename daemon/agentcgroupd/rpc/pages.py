"""Lists in pages, whose size and whose time on the loop are bounded."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import TypeVar

from google.protobuf import message

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import CgroupGone, InvalidField
from agentcgroupd.state.session import Session
from agentcgroupd.turns import Slices

PAGE_ITEMS_MAX = 500
PAGE_BYTES = 256 << 10
"""A page is full when it is larger than that."""
REPORTS_DEFAULT = 20
TOKEN_CHARS_MAX = 200

M = TypeVar("M", bound=message.Message)
Key = tuple[int, str]
"""Place of an item in its list: a time or a number, and the item's id."""


def key_of(token: str) -> Key | None:
    """Read the token that `token_of` made; None for an empty one. Raises InvalidField."""
    if not token:
        return None
    number, _, item_id = token.partition(".")
    if len(token) <= TOKEN_CHARS_MAX and number.removeprefix("-").isascii():
        try:
            return int(number), item_id
        except ValueError:
            pass  # refused below
    raise InvalidField("page_token", token, "the next_page_token of the page before")


def token_of(key: Key) -> str:
    return f"{key[0]}.{key[1]}"


async def page(
    items: Iterable[tuple[Key, Callable[[], M]]],
    most: int,
    token: str,
    slices: Slices,
    newest_first: bool = False,
) -> tuple[list[M], str]:
    """The next page of a list, and the token of the one after; empty: there is none.

    `items`: by their keys, in ascending order or, with `newest_first`, in descending order, each
    with what makes its message. One whose cgroup is gone is left out. `most`: items at most; 0: as
    many as fit. Raises InvalidField for a token that is none.
    """
    after = key_of(token)
    most = min(most or PAGE_ITEMS_MAX, PAGE_ITEMS_MAX)
    found: list[M] = []
    last, size = (0, ""), 0
    for key, make in items:
        if after is not None and (key >= after if newest_first else key <= after):
            continue
        if len(found) >= most or size > PAGE_BYTES:
            return found, token_of(last)
        await slices.breathe()
        try:
            made = make()
        except CgroupGone:
            continue
        found.append(made)
        size += made.ByteSize()
        last = key
    return found, ""


def _place(report: pb.Report) -> Key:
    return report.began_unix_usec + report.wall_usec, report.call_id


async def list_reports(
    sessions: list[Session],
    request: pb.ListReportsRequest,
    slices: Slices,
    sees: Callable[[pb.Report], bool] = lambda _: True,
) -> pb.ListReportsResponse:
    """The newest reports of some sessions that the caller `sees`, newest first."""
    newest = [
        sorted(filter(sees, session.reports), key=_place, reverse=True) for session in sessions
    ]
    merged = heapq.merge(*newest, key=_place, reverse=True)
    items = ((_place(report), lambda report=report: report) for report in merged)
    most = request.limit or REPORTS_DEFAULT
    found, token = await page(items, most, request.page_token, slices, newest_first=True)
    return pb.ListReportsResponse(reports=found, next_page_token=token)
