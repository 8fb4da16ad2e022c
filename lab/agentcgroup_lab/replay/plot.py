"""A picture of a replay: what the sessions held over time, under each strategy, and their calls.

One panel a strategy, all on the same axes, so that they can be compared by eye: memory stacked by
session with the pool's limit, and below it a lane a session with its calls. matplotlib comes with
the extra `lab` and is imported only here, when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentcgroup_lab.replay.progress import MIB
from agentcgroup_lab.replay.result import ReplayResult, SessionResult, StrategyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {
    "none": "no control",
    "static": "static split",
    "high": "memory.high only",
    "oomd": "oomd",
    "ours": "agentcgroup",
}
_IMPORTANT = "#c2410c"
_OTHERS = ("#64748b", "#94a3b8", "#475569", "#a3b1c2", "#7c8ba1")
_LIMIT = "#111827"
_KILLED = "#b91c1c"
_WIDTH_IN, _PANEL_IN, _DPI = 14.0, 3.1, 100
_LANE_SHARE = 0.34
_CALL_PX_MIN = 3.0


def _colours(sessions: Sequence[SessionResult]) -> dict[str, str]:
    others = [session.id for session in sessions if not session.important]
    colours = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}
    return colours | {session.id: _IMPORTANT for session in sessions if session.important}


def _ordered(sessions: Sequence[SessionResult]) -> list[SessionResult]:
    """The important session first: at the bottom of the stack its own shape can be seen."""
    return sorted(sessions, key=lambda session: (not session.important, session.id))


def _draw_memory(axes: Axes, result: StrategyResult, colours: dict[str, str]) -> None:
    sessions = _ordered(result.sessions)
    series = [
        # A session whose cgroup is gone holds nothing.
        [(value or 0) / MIB for value in result.timeline.sessions_bytes[session.id]]
        for session in sessions
    ]
    axes.stackplot(
        result.timeline.at_s,
        series,
        colors=[colours[session.id] for session in sessions],
        linewidth=0.6,
        edgecolor="white",
    )
    axes.axhline(result.limit_bytes / MIB, color=_LIMIT, linewidth=1.6, linestyle=(0, (5, 3)))
    axes.annotate(
        f"pool limit {result.limit_bytes / MIB:.0f} MiB",
        (1.0, result.limit_bytes / MIB),
        xycoords=("axes fraction", "data"),
        xytext=(-6, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=10,
        color=_LIMIT,
    )
    axes.set_ylabel("memory (MiB)")
    axes.set_title(_headline(result), loc="left", fontsize=12.5, fontweight="bold")
    axes.tick_params(labelbottom=False)


def _headline(result: StrategyResult) -> str:
    finished = sum(session.count("finished") for session in result.sessions)
    planned = sum(len(session.calls) for session in result.sessions)
    killed = sum(session.count("killed") for session in result.sessions)
    lost = sum(session.state == "lost" for session in result.sessions)
    parts = [f"{finished} of {planned} calls finished"]
    if killed:
        parts.append(f"{killed} killed")
    if lost:
        parts.append(f"{lost} agent{'s' if lost > 1 else ''} lost")
    parts.append(f"{result.seconds:.0f} s")
    title = _TITLES.get(result.strategy, result.strategy)
    if result.strategy == "static":
        title += f" ({result.limit_bytes / len(result.sessions) / MIB:.0f} MiB each)"
    return f"{title}: {', '.join(parts)}"


def _draw_lanes(axes: Axes, result: StrategyResult, colours: dict[str, str], end_s: float) -> None:
    sessions = _ordered(result.sessions)
    # A call of milliseconds is still to be seen.
    shortest_s = end_s * _CALL_PX_MIN / (_WIDTH_IN * _DPI * 0.85)
    for lane, session in enumerate(sessions):
        colour = colours[session.id]
        axes.plot(
            [session.began_s, session.ended_s], [lane, lane], color=colour, linewidth=1.0, alpha=0.7
        )
        for call in session.calls:
            if call.began_s is None or call.ended_s is None:
                continue
            width_s = max(call.ended_s - call.began_s, shortest_s)
            axes.barh(lane, width_s, 0.62, call.began_s, color=colour, linewidth=0)
            for span in call.frozen:
                axes.barh(
                    lane,
                    max(span.end_s - span.start_s, shortest_s),
                    0.62,
                    span.start_s,
                    facecolor="white",
                    edgecolor=colour,
                    hatch="/////",
                    linewidth=0.8,
                )
            if call.outcome in ("killed", "failed"):
                axes.plot(
                    call.ended_s,
                    lane,
                    marker="X",
                    markersize=10,
                    color=_KILLED,
                    mec="white",
                    mew=0.8,
                )
        if session.state == "lost":
            axes.annotate(
                "agent lost",
                (session.ended_s, lane),
                xytext=(10, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
                color=_KILLED,
                fontweight="bold",
            )
    axes.set_yticks(range(len(sessions)), [_lane_name(session) for session in sessions])
    axes.set_ylim(len(sessions) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for session, label in zip(sessions, axes.get_yticklabels(), strict=True):
        label.set_color(colours[session.id])
        label.set_fontweight("bold" if session.important else "normal")


def _lane_name(session: SessionResult) -> str:
    return f"{session.id} (important)" if session.important else session.id


def _legend(figure: Figure, result: ReplayResult, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    frozen = any(
        call.frozen
        for strategy in result.strategies
        for session in strategy.sessions
        for call in session.calls
    )
    handles: list[Any] = []
    for session in _ordered(result.strategies[0].sessions):
        name = session.recording if len(session.recording) <= 34 else session.recording[:33] + "…"
        label = f"{session.id}: {name}" + (" (important)" if session.important else "")
        handles.append(Patch(color=colours[session.id], label=label))
    if frozen:
        handles.append(
            Patch(facecolor="white", edgecolor="#475569", hatch="/////", label="call frozen")
        )
    handles.append(
        Line2D(
            [],
            [],
            color=_KILLED,
            marker="X",
            linestyle="",
            markersize=9,
            mec="white",
            label="call killed or failed",
        )
    )
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.006, 1 - 0.42 / figure.get_figheight()),
        ncols=len(handles),
        frameon=False,
        fontsize=10,
        handlelength=1.4,
        columnspacing=1.6,
    )


def draw(result: ReplayResult) -> Figure:
    """Draw the picture of a result that has at least one strategy."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e5e7eb",
        "hatch.linewidth": 0.8,
        "svg.hashsalt": "agentcgroup",
    }
    strategies = result.strategies
    colours = _colours(strategies[0].sessions)
    end_s = max(max(strategy.timeline.at_s, default=1.0) for strategy in strategies)
    top_mib = max(
        max(strategy.limit_bytes, *strategy.timeline.pool_bytes) / MIB for strategy in strategies
    )
    with mpl.rc_context(style):
        height_in = 1.6 + _PANEL_IN * len(strategies)
        figure = Figure(figsize=(_WIDTH_IN, height_in), dpi=_DPI)
        # One thin empty row between strategies: the title of the next needs its room.
        ratios = [1.0, _LANE_SHARE, 0.30] * len(strategies)
        grid = figure.add_gridspec(
            len(ratios) - 1,
            1,
            height_ratios=ratios[:-1],
            hspace=0.08,
            left=0.115,
            right=0.985,
            top=1 - 1.15 / height_in,
            bottom=0.75 / height_in,
        )
        for position, strategy in enumerate(strategies):
            memory = figure.add_subplot(grid[3 * position])
            lanes = figure.add_subplot(grid[3 * position + 1], sharex=memory)
            _draw_memory(memory, strategy, colours)
            _draw_lanes(lanes, strategy, colours, end_s)
            memory.set_xlim(0, end_s)
            memory.set_ylim(0, top_mib * 1.14)
            if position + 1 == len(strategies):
                lanes.set_xlabel("seconds")
        title: Any = {"va": "top", "ha": "left", "fontsize": 15, "fontweight": "bold"}
        figure.suptitle(
            "The same recorded agents on the same pool: memory over time, and every tool call",
            x=0.012,
            y=1 - 0.14 / height_in,
            **title,
        )
        _legend(figure, result, colours)
        subtitle = (
            f"memory x{result.memory_scale:.2g}, time x{result.speed:.2g} faster than recorded; "
            f"{result.where}, Linux {result.kernel}"
        )
        figure.text(0.985, 0.1 / height_in, subtitle, ha="right", fontsize=9, color="#6b7280")
    return figure


def save(result: ReplayResult, paths: Sequence[Path]) -> None:
    """Draw into each path; the format follows from its suffix (.png, .svg)."""
    import matplotlib as mpl

    figure = draw(result)
    with mpl.rc_context({"svg.hashsalt": "agentcgroup"}):
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=_DPI, metadata=metadata)
