"""What `top` shows, as lines of text for a screen of some size."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from agentcgroup.text import printable
from agentcgroup.types import CallInfo, CallState, SessionInfo

from .live import (
    NO_RATE,
    Look,
    Rate,
    Rates,
    advice,
    is_paused,
    is_waiting,
    memory_of,
    priority_of,
    reason,
)
from .output import NONE, clock, cores, duration, labels_text, size

PLAIN, BOLD, CHOSEN = "", "bold", "reverse"
Line = tuple[str, str]
"""Text and its style."""

WIDTH_LEAST, HEIGHT_LEAST = 40, 10
SORTS = ("memory", "cpu", "io", "net", "priority", "name")
KEYS = {
    "pool": "arrows, enter  s sort  / filter  p pause  r resume  l limits  e close  q quit",
    "session": "arrows, enter  esc back  s sort  p pause  r resume  l limits  e end  q quit",
    "call": "arrows scroll  esc back  p pause  r resume  e end  q quit",
}
Row = TypeVar("Row", SessionInfo, CallInfo)
_STATES = {CallState.FROZEN: "paused", CallState.WAITING: "waits", CallState.ENDING: "ends"}


@dataclass
class View:
    """What the person at the keyboard has chosen to see."""

    mode: str = "pool"
    sort: str = SORTS[0]
    wanted: str = ""
    """Only what has this in its name."""
    chosen: int = 0
    """The line of the table, from 0."""
    session_id: str = ""
    call_id: str = ""
    story: list[str] = field(default_factory=list)
    prompt: str = ""
    """A question that waits for an answer; empty: none does."""
    message: str = ""


def sessions_of(look: Look, rates: Rates, view: View) -> list[SessionInfo]:
    """Give the sessions to show, in order."""
    found = [each for each in look.sessions if view.wanted in each.id]
    by: dict[str, Callable[[SessionInfo], float]] = {
        "memory": lambda each: -memory_of(each),
        "priority": lambda each: -each.priority,
    }
    return _sorted(found, rates.sessions, view.sort, by)


def calls_of(look: Look, rates: Rates, view: View) -> list[CallInfo]:
    """Give the calls to show of the chosen session, in order."""
    found = [
        each
        for each in look.calls
        if each.session_id == view.session_id and view.wanted in f"{each.id} {each.name}"
    ]
    by: dict[str, Callable[[CallInfo], float]] = {
        "memory": lambda each: -memory_of(each),
        "priority": lambda each: -priority_of(each),
    }
    return _sorted(found, rates.calls, view.sort, by)


def _sorted(
    found: list[Row], rates: dict[str, Rate], sort: str, by: dict[str, Callable[[Row], float]]
) -> list[Row]:
    if sort in ("cpu", "io", "net"):
        name = {"cpu": "cores", "io": "io_bytes", "net": "net_bytes"}[sort]
        return sorted(found, key=lambda each: -(getattr(rates.get(each.id, NO_RATE), name) or 0))
    chosen = by.get(sort)
    return sorted(found, key=lambda each: (0.0 if chosen is None else chosen(each), each.id))


def frame(
    look: Look, rates: Rates, view: View, width: int, height: int, at_unix_usec: int
) -> list[Line]:
    """Make the lines of a screen, at most `height`, none longer than `width`."""
    width, height = max(width, WIDTH_LEAST), max(height, HEIGHT_LEAST)
    head = _head(look, rates, width, at_unix_usec)
    body = {"pool": _pool, "session": _session, "call": _call}[view.mode]
    lines = [*head, *body(look, rates, view, width, height - len(head) - 1)]
    lines = lines[: height - 1]
    lines += [("", PLAIN)] * (height - 1 - len(lines))
    lines.append((view.prompt or view.message or KEYS[view.mode], BOLD if view.prompt else PLAIN))
    return [(printable(text)[:width], style) for text, style in lines]


def _head(look: Look, rates: Rates, width: int, at_unix_usec: int) -> list[Line]:
    pool, calls = look.pool, look.calls
    used, most = pool.used_bytes, pool.memory_max_bytes
    of = f" of {size(most)}" if most is not None else ", no limit"
    share = f" ({used / most:.0%})" if used is not None and most else ""
    busy = "-" if rates.pool.cores is None else f"{rates.pool.cores:.1f}"
    first = (
        f"agentcg {clock(at_unix_usec)}   memory {size(used)}{of}{share}   "
        f"{busy} of {cores(pool.cpu_millicores)} cores"
    )
    paused, waiting = sum(map(is_paused, calls)), sum(map(is_waiting, calls))
    second = (
        f"{len(look.sessions)} sessions   {len(calls)} calls: "
        f"{len(calls) - paused - waiting} run, {paused} paused, {waiting} wait"
    )
    waits = [
        (name, percent)
        for name, percent in (
            ("memory", pool.memory_some_percent),
            ("cpu", pool.cpu_some_percent),
            ("disks", pool.io_some_percent),
        )
        if percent is not None
    ]
    third = "tasks wait for: " + ", ".join(f"{name} {percent:.0f} %" for name, percent in waits)
    lines = [(first, BOLD)]
    if used is not None and most:
        lines.append((_bar(used / most, width), PLAIN))
    lines.append((second, PLAIN))
    return [*lines, (third, PLAIN), ("", PLAIN)] if waits else [*lines, ("", PLAIN)]


def _bar(share: float, width: int) -> str:
    inside = width - 2
    full = round(min(1.0, max(0.0, share)) * inside)
    return "[" + "#" * full + "." * (inside - full) + "]"


def rate_text(value: float | None) -> str:
    """Write bytes a second: "1.2 MiB"; "-" where it is not known."""
    return NONE if value is None else size(int(value))


def _cores_text(rate: Rate) -> str:
    return NONE if rate.cores is None else f"{rate.cores:.2f}"


def _window(lines: Sequence[Line], chosen: int, room: int) -> list[Line]:
    """Cut a table to the lines around the chosen one; its first line is the header."""
    if len(lines) <= room:
        return list(lines)
    rows = max(1, room - 1)
    start = min(max(0, chosen - rows // 2), len(lines) - 1 - rows)
    return [lines[0], *lines[1 + start : 1 + start + rows]]


def _cell(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 1]}~"


# The pool


def _pool(look: Look, rates: Rates, view: View, width: int, room: int) -> list[Line]:
    table, stuck = _sessions_table(look, rates, view, width), _stuck(look, width)
    helps = _helps(look, rates, width)
    # A third for each; what one does not need is the next one's.
    third = max(4, room // 3)
    rows = min(len(table), third)
    advised = _whole(helps, max(4, min(third, room - rows - _lines(stuck) - 2)))
    told = _cut(stuck, max(2, room - rows - _lines(advised) - 2)) if len(stuck) > 1 else []
    rest = [line for part in (told, advised) if part for line in [("", PLAIN), *_flat(part)]]
    return [*_window(table, view.chosen, max(rows, room - len(rest))), *rest]


Item = list[Line]
"""Lines that belong together."""


def _flat(items: list[Item]) -> list[Line]:
    return [line for item in items for line in item]


def _lines(items: list[Item]) -> int:
    return sum(map(len, items))


def _whole(items: list[Item], room: int) -> list[Item]:
    """Keep as many items as fit, the first two at least: a title and what stands below it."""
    kept = items[:2]
    for item in items[2:]:
        if _lines(kept) + len(item) > room:
            break
        kept.append(item)
    return kept


def _cut(items: list[Item], room: int) -> list[Item]:
    """Keep as many items as fit, and say how many are left out."""
    if _lines(items) <= room:
        return items
    kept = _whole(items, room - 1)
    left = len(items) - len(kept)
    return [*kept, [(f"  and {left} more", PLAIN)]] if left else kept


def _wrapped(text: str, width: int, most: int = 3) -> Item:
    """Break a sentence into lines, the further ones set in."""
    parts = textwrap.wrap(printable(text), width, initial_indent="  ", subsequent_indent="    ")
    return [(part, PLAIN) for part in parts[:most]]


def _sessions_table(look: Look, rates: Rates, view: View, width: int) -> list[Line]:
    wide = max(8, width - 62)
    head = f"  {'SESSION':<{wide}} {'PRI':>3} {'MEMORY':>9} {'LIMIT':>9} {'CORES':>6} "
    head += f"{'DISK/S':>9} {'NET/S':>9} {'RUN':>3} {'PSD':>3}"
    lines: list[Line] = [(head, BOLD)]
    shown = sessions_of(look, rates, view)
    own: dict[str, list[CallInfo]] = {}
    for call in look.calls:
        own.setdefault(call.session_id, []).append(call)
    for number, each in enumerate(shown):
        calls, rate = own.get(each.id, []), rates.sessions.get(each.id, NO_RATE)
        paused = sum(map(is_paused, calls))
        runs = len(calls) - paused - sum(map(is_waiting, calls))
        text = (
            f"{'>' if number == view.chosen else ' '} {_cell(each.id, wide):<{wide}} "
            f"{each.priority:>3} {size(memory_of(each)):>9} {size(each.memory_max_bytes):>9} "
            f"{_cores_text(rate):>6} {rate_text(rate.io_bytes):>9} {rate_text(rate.net_bytes):>9} "
            f"{runs:>3} {paused:>3}"
        )
        lines.append((text, CHOSEN if number == view.chosen else PLAIN))
    if not shown:
        lines.append(("  no session is open" if not view.wanted else "  none is like that", PLAIN))
    return lines


def _stuck(look: Look, width: int) -> list[Item]:
    """Name the calls that are paused or wait, those that wait longest first, each with its
    reason."""
    items: list[Item] = [[("PAUSED AND WAITING", BOLD)]]
    paused = sorted(filter(is_paused, look.calls), key=lambda call: -call.frozen_usec)
    waiting = sorted(
        filter(is_waiting, look.calls), key=lambda call: call.place.position if call.place else 0
    )
    for call in paused:
        since = f"paused for {duration(call.frozen_usec)}"
        items.append(_wrapped(f"{_who(call)} {since}: {reason(call)}", width))
    for call in waiting:
        since = f"waits {duration(call.place.waited_usec if call.place else None)}"
        items.append(_wrapped(f"{_who(call)} {since}: {reason(call)}", width))
    return items


def _who(call: CallInfo) -> str:
    return f"{_cell(call.name, 20)} of {_cell(call.session_id, 24)}"


def _helps(look: Look, rates: Rates, width: int) -> list[Item]:
    title: Item = [("WHAT WOULD HELP", BOLD)]
    return [title, *(_wrapped(sentence, width) for sentence in advice(look, rates))]


# One session


def _session(look: Look, rates: Rates, view: View, width: int, room: int) -> list[Line]:
    calls = calls_of(look, rates, view)
    session = next((each for each in look.sessions if each.id == view.session_id), None)
    if session is None:
        return [(f"Session {view.session_id} is closed.", BOLD)]
    held = size(memory_of(session))
    if session.memory_max_bytes is not None:
        held += f" of {size(session.memory_max_bytes)}"
    facts = [f"priority {session.priority}", held]
    if session.memory_low_bytes is not None:
        facts.append(f"{size(session.memory_low_bytes)} guaranteed")
    if session.cpu_max_millicores is not None:
        facts.append(f"{cores(session.cpu_max_millicores)} cores")
    facts.append(f"{session.calls_ended} ended")
    if session.labels:
        facts.append(labels_text(session.labels))
    title = f"session {session.id}: {', '.join(facts)}"
    about = _about(calls, view.chosen, width)
    table = _calls_table(calls, rates, view, width)
    rows = _window(table, view.chosen, max(2, room - len(about) - 2))
    return [(title, BOLD), *rows, ("", PLAIN), *about]


def _calls_table(calls: list[CallInfo], rates: Rates, view: View, width: int) -> list[Line]:
    wide = max(6, width - 75)
    head = f"  {'CALL':<12} {'TOOL':<{wide}} {'STATE':<7} {'MEMORY':>8} {'CREDIT':>8} {'LIMIT':>8} "
    head += f"{'CORES':>5} {'DISK/S':>8} {'NET/S':>8}"
    lines: list[Line] = [(head, BOLD)]
    for number, call in enumerate(calls):
        rate = rates.calls.get(call.id, NO_RATE)
        limit = call.grant.memory_max_bytes if call.grant is not None else None
        state = _STATES.get(call.state, "runs")
        text = (
            f"{'>' if number == view.chosen else ' '} {call.id:<12} "
            f"{_cell(call.name, wide):<{wide}} {state:<7} {_short(memory_of(call)):>8} "
            f"{_short(call.memory_high_bytes):>8} {_short(limit):>8} {_cores_text(rate):>5} "
            f"{_short(_rounded(rate.io_bytes)):>8} {_short(_rounded(rate.net_bytes)):>8}"
        )
        lines.append((text, CHOSEN if number == view.chosen else PLAIN))
    if not calls:
        lines.append(("  no call is open", PLAIN))
    return lines


def _rounded(value: float | None) -> int | None:
    return None if value is None else int(value)


def _short(value: int | None) -> str:
    """Write a size in at most 8 characters: "1.5G"."""
    return size(value).replace("iB", "").replace(" ", "")


def _about(calls: list[CallInfo], chosen: int, width: int) -> list[Line]:
    """Tell of the chosen call what does not fit into the table."""
    if not 0 <= chosen < len(calls):
        return []
    call = calls[chosen]
    lines = [" ".join(call.argv) or call.name]
    if is_paused(call) or is_waiting(call):
        lines.append(reason(call))
    grant = call.grant
    if grant is not None and (grant.gpu_percent or grant.gpu_memory_bytes):
        part = f"{grant.gpu_percent or 0} % and {size(grant.gpu_memory_bytes)}"
        lines.append(f"GPU: {part} of {', '.join(grant.gpu_devices)}")
    wrapped = [part for line in lines for part in textwrap.wrap(printable(line), width - 2)[:3]]
    return [(f"  {part}", PLAIN) for part in wrapped]


# One call


def _call(look: Look, rates: Rates, view: View, width: int, room: int) -> list[Line]:
    lines = [part for line in view.story for part in textwrap.wrap(printable(line), width) or [""]]
    start = min(max(0, view.chosen), max(0, len(lines) - room))
    return [(line, PLAIN) for line in lines[start : start + room]]
