"""The pool at one moment, as small as a page needs it and with no text that could be more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentcgroup.cli.live import (
    NO_RATE,
    Look,
    Rates,
    advice,
    is_paused,
    is_waiting,
    memory_of,
    reason,
)
from agentcgroup.cli.output import labels_text
from agentcgroup.text import printable
from agentcgroup.types import CallInfo, SessionInfo, Story

SESSIONS_MOST = 200
STUCK_MOST = 100
TEXT_MOST = 300
STEPS_MOST = 400


def text(value: str, most: int = TEXT_MOST) -> str:
    """Return text of others, fit to be shown and not longer than `most` characters."""
    shown = printable(value[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 1]}\u2026"


def command(argv: Sequence[str], name: str) -> str:
    """Return a command line as text; the name where there is none."""
    return text(" ".join(argv[:64]) or name)


def now(look: Look, rates: Rates, at_unix_usec: int) -> dict[str, Any]:
    """Return who uses the pool, who is paused or waits and why, and what would help: the sessions
    that hold most, and of the calls those that do not run."""
    calls: dict[str, list[CallInfo]] = {}
    for call in look.calls:
        calls.setdefault(call.session_id, []).append(call)
    largest = sorted(look.sessions, key=lambda each: (-memory_of(each), each.id))[:SESSIONS_MOST]
    stuck = _stuck(look.calls)
    pool = look.pool
    paused, waits = sum(map(is_paused, look.calls)), sum(map(is_waiting, look.calls))
    return {
        "at_unix_usec": at_unix_usec,
        "pool": {
            "memory_current_bytes": pool.memory_current_bytes,
            "memory_max_bytes": pool.memory_max_bytes,
            "cpu_millicores": pool.cpu_millicores,
            "memory_some_percent": pool.memory_some_percent,
            "cpu_some_percent": pool.cpu_some_percent,
            "io_some_percent": pool.io_some_percent,
            "rate": rates.pool.to_dict(),
            "sessions": len(look.sessions),
            "calls": len(look.calls),
            "calls_running": len(look.calls) - paused - waits,
            "calls_paused": paused,
            "calls_waiting": waits,
            "version": text(pool.version),
            "kernel": text(pool.kernel),
            "started_unix_usec": pool.started_unix_usec,
        },
        "sessions": [_session(each, calls.get(each.id, []), rates) for each in largest],
        "sessions_left_out": len(look.sessions) - len(largest),
        "stuck": stuck[:STUCK_MOST],
        "stuck_left_out": max(0, len(stuck) - STUCK_MOST),
        "advice": [text(sentence) for sentence in advice(look, rates)],
    }


def _session(each: SessionInfo, calls: list[CallInfo], rates: Rates) -> dict[str, Any]:
    paused, waits = sum(map(is_paused, calls)), sum(map(is_waiting, calls))
    return {
        "id": text(each.id),
        "labels": text(labels_text(each.labels)) if each.labels else "",
        "priority": each.priority,
        "memory_bytes": memory_of(each),
        "memory_max_bytes": each.memory_max_bytes,
        "rate": rates.sessions.get(each.id, NO_RATE).to_dict(),
        "calls_running": len(calls) - paused - waits,
        "calls_paused": paused,
        "calls_waiting": waits,
        "calls_ended": each.calls_ended,
    }


def _stuck(calls: Sequence[CallInfo]) -> list[dict[str, Any]]:
    """Give the calls that are paused, the one that is so longest first, and then the queue."""
    paused = sorted(filter(is_paused, calls), key=lambda call: -call.frozen_usec)
    waiting = sorted(
        filter(is_waiting, calls), key=lambda call: call.place.position if call.place else 0
    )
    return [
        {
            "call_id": text(call.id),
            "session_id": text(call.session_id),
            "name": text(call.name, 60),
            "command": command(call.argv, call.name),
            "state": call.state.value,
            "held": call.held,
            "for_usec": call.place.waited_usec if call.place else call.frozen_usec,
            "why": text(reason(call)),
            "memory_bytes": memory_of(call),
        }
        for call in (*paused, *waiting)
    ]


def story(found: Story) -> dict[str, Any]:
    """Return what happened to a call."""
    report = found.report
    steps = found.steps[-STEPS_MOST:]
    return {
        "call_id": text(found.call_id),
        "session_id": text(found.session_id),
        "name": text(found.name, 60),
        "command": command(report.argv, found.name) if report else text(found.name),
        "state": found.state.value if report is None else report.verdict.value,
        "sentence": text(report.sentence, 1000) if report else "",
        "steps": [
            {"at_unix_usec": step.at_unix_usec, "what": step.what, "sentence": text(step.sentence)}
            for step in steps
        ],
        "steps_left_out": found.steps_left_out + len(found.steps) - len(steps),
        "advice": [text(sentence, 1000) for sentence in found.advice],
    }
