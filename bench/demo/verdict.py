"""What the demo has shown, in three sentences and a table, and whether it is what it claims."""

from __future__ import annotations

from collections.abc import Iterator

from agentcgroup import tables
from agentcgroup_lab.replay.meeting import HELD
from agentcgroup_lab.replay.progress import MIB
from agentcgroup_lab.replay.result import ReplayResult, SessionResult, StrategyResult

MOST_OF_ALONE = 1.05
"""How long the important session may take, of its time without the others."""
TITLES = {"none": "no control", "static": "static split", "ours": "agentcgroup"}


def lost(session: SessionResult) -> int:
    """Number of calls that did not come to their end."""
    return sum(call.outcome != "finished" for call in session.calls)


def all_lost(result: StrategyResult) -> int:
    """The same for all sessions."""
    return sum(map(lost, result.sessions))


def important(result: StrategyResult) -> SessionResult:
    """The important session."""
    return next(session for session in result.sessions if session.important)


def _by_name(result: ReplayResult) -> tuple[StrategyResult, StrategyResult, StrategyResult]:
    named = {one.strategy: one for one in result.strategies}
    return named["none"], named["static"], named["ours"]


def seconds_of_important(result: StrategyResult) -> float:
    """How long the important session took, without the time for which its largest call held its
    peak for others that were late: that is the agreement's doing, and the machine's."""
    return important(result).seconds - result.meeting_waited_s


def ratio(among_others: StrategyResult, alone: StrategyResult) -> float:
    """How long the important session took among others, of its time alone."""
    return seconds_of_important(among_others) / seconds_of_important(alone)


def of_alone(result: ReplayResult) -> float:
    """How long the important session took under the daemon, of its time alone."""
    assert result.alone is not None
    return ratio(_by_name(result)[2], result.alone)


def failures(result: ReplayResult) -> list[str]:
    """What does not hold, a sentence each; empty where all does."""
    none, static, _ = _by_name(result)
    assert result.alone is not None
    wrong = [text for one in (result.alone, *result.strategies) for text in _broken(one)]
    for one in (none, static):
        if HELD in one.met.values():
            wrong.append(f"{TITLES[one.strategy]}: a call was held back, and nobody did so")
    return [*wrong, *_no_contrast(result)]


def _broken(one: StrategyResult) -> Iterator[str]:
    """What must not happen under any strategy."""
    title = TITLES[one.strategy]
    if one.leaks:
        yield f"{title}: {len(one.leaks)} cgroups were left behind"
    for session in one.sessions:
        if session.state == "timed out":
            yield f"{title}: session {session.id} did not end in time"
    if len(one.met) < len(one.sessions):
        yield f"{title}: the calls that were to hold their peaks together never all did"


def _no_contrast(result: ReplayResult) -> Iterator[str]:
    none, static, ours = _by_name(result)
    assert result.alone is not None
    if all_lost(result.alone):
        yield "the important session loses calls even alone"
    if not lost(important(none)):
        yield "without control the important session lost no call"
    if all_lost(static) <= all_lost(none):
        yield (
            f"the static split lost {all_lost(static)} calls, no more than no control "
            f"({all_lost(none)})"
        )
    if all_lost(ours):
        yield f"agentcgroup lost {all_lost(ours)} calls"
    if of_alone(result) > MOST_OF_ALONE:
        yield (
            f"under agentcgroup the important session took {of_alone(result):.3f} times its time "
            f"alone; at most {MOST_OF_ALONE} was promised"
        )


def sentences(result: ReplayResult) -> list[str]:
    """Three sentences, one a strategy."""
    none, static, ours = _by_name(result)
    assert result.alone is not None
    calls = sum(len(session.calls) for session in none.sessions)
    agents = sum(session.state == "lost" for session in static.sessions)
    part = f"{static.limit_bytes / len(static.sessions) / MIB:.0f} MiB"
    paused_s = sum(
        span.end_s - span.start_s
        for session in ours.sessions
        for call in session.calls
        for span in call.frozen
    )
    mine_s, alone_s = seconds_of_important(ours), seconds_of_important(result.alone)
    return [
        f"Without control {all_lost(none)} of {calls} calls were lost, "
        f"{lost(important(none))} of them the important session's.",
        f"With an even part of {part} for each, {all_lost(static)} were lost"
        + (f", and {agents} agent{'s' if agents > 1 else ''} with them." if agents else "."),
        f"agentcgroup lost {all_lost(ours) or 'none'}: calls of the others were paused for "
        f"{paused_s:.1f} s in all, and the important session took {mine_s:.1f} s, "
        f"{of_alone(result):.2f} times its {alone_s:.1f} s alone at the same time.",
    ]


_COLUMNS = ("", ">finished", ">lost", ">important lost", ">important took", ">all took")


def table(result: ReplayResult) -> str:
    """A line for each strategy, and one for the important session alone."""
    rows = []
    for one in result.strategies:
        calls = sum(len(session.calls) for session in one.sessions)
        rows.append(
            (
                TITLES[one.strategy],
                f"{calls - all_lost(one)} of {calls}",
                str(all_lost(one)),
                str(lost(important(one))),
                f"{seconds_of_important(one):.1f} s",
                f"{one.seconds:.1f} s",
            )
        )
    if result.alone is not None:
        alone = important(result.alone)
        done = f"{len(alone.calls) - lost(alone)} of {len(alone.calls)}"
        row = ("important alone", done, str(lost(alone)), str(lost(alone)))
        rows.append((*row, f"{seconds_of_important(result.alone):.1f} s", ""))
    return "\n".join(tables.table(_COLUMNS, rows, rule=True))
