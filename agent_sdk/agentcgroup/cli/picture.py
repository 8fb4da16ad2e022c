"""A session's calls over time as a picture: SVG, made with the standard library alone.

Above, what its calls held at most; below, a bar for each call, with its time in the queue, its
pauses, and a mark for each thing that happened. Whoever points at something reads its sentence.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from agentcgroup.text import printable
from agentcgroup.types import Report, Step, Story, Verdict

from .output import duration, size

WIDTH, LEFT, RIGHT = 1000, 190, 20
TOP, MEMORY_HEIGHT, GAP, LANE = 46, 120, 34, 20
NAME_CHARS = 26
_PAUSES = {"freeze": "thaw", "hold": "unhold"}
"""What begins a pause, and what ends it."""
_MARKS = frozenset(
    {"deny", "kill", "oom_victim", "throttle", "denied", "urgent", "left_call", "process_left"}
)
_COLOURS = {Verdict.OK: "#4c8c4a", Verdict.FAILED: "#b7791f", Verdict.SIGNALED: "#b7791f"}
_ENDED_BY_OTHERS = "#b23b3b"
_STYLE = (
    "text{font:12px sans-serif;fill:#222}.t{font-size:15px;font-weight:bold}.s{fill:#666}"
    ".wait{fill:#ddd;stroke:#999}.pause{fill:#fff;opacity:.75}.mem{fill:#9db8d9;stroke:#476a99}"
    ".grid{stroke:#e4e4e4}.mark{fill:#111;stroke:#fff;stroke-width:1.5}"
)
_STEPS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)


@dataclass(frozen=True)
class Row:
    """A call in the picture."""

    report: Report
    steps: Sequence[Step] = ()

    @property
    def asked_usec(self) -> int:
        """Return when it was asked for."""
        return self.report.began_unix_usec - self.report.waited_usec

    @property
    def ended_usec(self) -> int:
        """Return when it had ended."""
        return self.report.began_unix_usec + self.report.wall_usec

    def pauses(self) -> Iterator[tuple[int, int, str]]:
        """Give the beginning, the end and the sentence of each time for which it was paused."""
        since: dict[str, Step] = {}
        for step in self.steps:
            if step.what in _PAUSES:
                since.setdefault(step.what, step)
            for begins, ends in _PAUSES.items():
                if step.what == ends and begins in since:
                    begun = since.pop(begins)
                    yield begun.at_unix_usec, step.at_unix_usec, begun.sentence
        for begun in since.values():
            yield begun.at_unix_usec, self.ended_usec, begun.sentence


def row_of(report: Report, story: Story | None) -> Row:
    """Make a row of a report and, where there is one, its story."""
    return Row(report, () if story is None else story.steps)


class _Scale:
    """The picture's x for a time."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.start = min(row.asked_usec for row in rows)
        self.end = max(max(row.ended_usec for row in rows), self.start + 1000)

    def x(self, unix_usec: float) -> float:
        share = (unix_usec - self.start) / (self.end - self.start)
        return LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Give x and text of the lines of time."""
        span_s = (self.end - self.start) / 1e6
        step = next((s for s in _STEPS_S if span_s / s <= 8), _STEPS_S[-1])
        for number in range(math.floor(span_s / step) + 1):
            text = duration(int(number * step * 1e6)).replace(".00", "")
            yield self.x(self.start + number * step * 1e6), text if number else "0"


def svg(session: str, rows: Sequence[Row], memory_max_bytes: int | None = None) -> str:
    """Draw calls, at least one, the one that began first on top."""
    rows = sorted(rows, key=lambda row: row.asked_usec)
    scale, lanes = _Scale(rows), TOP + MEMORY_HEIGHT + GAP
    height = lanes + LANE * len(rows) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}"><style>{_STYLE}</style>'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        _text(10, 22, f"session {session}: {len(rows)} calls in {_span(scale)}", "t"),
        _text(10, 38, f"from {_date(scale.start)}", "s"),
        *_grid(scale, height - 26),
        *_memory(rows, scale, memory_max_bytes),
        *(part for n, row in enumerate(rows) for part in _lane(row, scale, lanes + n * LANE)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def page(session: str, picture: str) -> str:
    """Put a picture into a page that needs nothing else."""
    title = _safe(f"session {session}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{title}</title></head>\n<body>\n{picture}</body></html>\n"
    )


def _safe(text: str) -> str:
    return html.escape(printable(text))


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{_safe(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, look: str, title: str = "") -> str:
    told = f"<title>{_safe(title)}</title>" if title else ""
    where = f'x="{x:.1f}" y="{y:.1f}" width="{max(1.5, width):.1f}" height="{height}"'
    return f"<rect {where} {look}>{told}</rect>"


def _span(scale: _Scale) -> str:
    return duration(scale.end - scale.start)


def _date(unix_usec: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_usec / 1e6))


def _grid(scale: _Scale, bottom: int) -> Iterator[str]:
    for x, text in scale.ticks():
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>'
        yield _text(x + 2, bottom + 16, text, "s")


def held_over_time(rows: Iterable[Row]) -> list[tuple[int, int]]:
    """Give the times at which what calls held at most together changed, and to what: each call
    counts with its peak from its beginning to its end. Calls inside others are a part of those."""
    changes: dict[int, int] = {}
    for row in rows:
        report = row.report
        if not report.parent_call_id and report.memory_peak_bytes is not None:
            peak = report.memory_peak_bytes
            changes[report.began_unix_usec] = changes.get(report.began_unix_usec, 0) + peak
            changes[row.ended_usec] = changes.get(row.ended_usec, 0) - peak
    held, found = 0, []
    for at, change in sorted(changes.items()):
        held += change
        found.append((at, held))
    return found


def _memory(rows: Sequence[Row], scale: _Scale, most: int | None) -> Iterator[str]:
    bottom = TOP + MEMORY_HEIGHT
    yield _text(10, TOP + 14, "memory at most")
    held = held_over_time(rows)
    top = max((value for _, value in held), default=0)
    if not top:
        yield _text(10, TOP + 30, "not measured", "s")
        return
    roof = max(top, most or 0)
    yield _text(10, TOP + 30, f"peak {size(top)}", "s")
    points, y = [f"{scale.x(held[0][0]):.1f},{bottom}"], float(bottom)
    for at, value in held:
        x = scale.x(at)
        points.append(f"{x:.1f},{y:.1f}")
        y = bottom - MEMORY_HEIGHT * value / roof
        points.append(f"{x:.1f},{y:.1f}")
    yield f'<polygon class="mem" points="{" ".join(points)}"/>'
    if most:
        y = bottom - MEMORY_HEIGHT * most / roof
        yield _text(10, TOP + 46, f"limit {size(most)}", "s")
        yield (
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="#b23b3b" stroke-dasharray="4 3"/>'
        )


def _lane(row: Row, scale: _Scale, y: int) -> Iterator[str]:
    report = row.report
    name = printable(report.name)
    shown = name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS - 1]}~"
    inside = "  " if report.parent_call_id else ""
    yield _text(10 + (10 if inside else 0), y + 14, shown)
    began, ended = scale.x(report.began_unix_usec), scale.x(row.ended_usec)
    if report.waited_usec:
        asked = scale.x(row.asked_usec)
        title = f"waited {duration(report.waited_usec)} in the queue"
        yield _rect(asked, y + 6, began - asked, LANE - 12, 'class="wait"', title)
    colour = _COLOURS.get(report.verdict, _ENDED_BY_OTHERS)
    yield _rect(began, y + 3, ended - began, LANE - 6, f'fill="{colour}"', _told(report))
    for start, end, sentence in row.pauses():
        x = scale.x(start)
        title = f"paused for {duration(max(0, end - start))}: {sentence}"
        yield _rect(x, y + 4, scale.x(end) - x, LANE - 8, 'class="pause"', title)
    for step in row.steps:
        if step.what in _MARKS and step.at_unix_usec:
            x = scale.x(step.at_unix_usec)
            yield (
                f'<circle class="mark" cx="{x:.1f}" cy="{y + LANE / 2}" r="4">'
                f"<title>{_safe(step.sentence)}</title></circle>"
            )


def _told(report: Report) -> str:
    """Say what stands in the box over a call's bar."""
    lines = [
        f"{report.call_id}: {' '.join(report.argv) or report.name}",
        f"{report.verdict}: {report.sentence}",
        f"{duration(report.wall_usec)}, memory peak {size(report.memory_peak_bytes)}, "
        f"CPU {duration(report.cpu_usage_usec)}",
    ]
    return " | ".join(lines)
