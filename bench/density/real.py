"""The real half of `density`: recorded sessions replayed under the daemon, and simulated."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agentcgroup import tables
from agentcgroup_lab.replay import engine
from agentcgroup_lab.replay.result import StrategyResult
from agentcgroup_lab.simulate.plans import compile_plan
from agentcgroup_lab.simulate.run import Result, Setup, SimulatedSession, simulate_once
from agentcgroup_lab.trace import format as trace_format
from agentcgroup_lab.trace import plan
from agentcgroupd.policy.load import load_policy
from agentcgroupd.policy.scale import scaled
from agentcgroupd.policy.schema import Policy
from bench.report import Target, quantile

EMULATED = os.environ.get("AGENTCG_EMULATED") == "1"
MEMORY_SHARE = 0.5
"""Share of this machine's free memory that the pool may have: first the same replay takes place on
one of twice its size, which is never filled."""
WINDOW_S = 240.0
"""Recorded seconds of each session, from a random point on."""
PLAN_S = 60.0
CALLS_MOST = 4 if EMULATED else None
"""Calls of a session: starting one takes a tenth of a second in an emulated guest."""
USE = 0.92
"""Share of the pool that the plans hold on average: near what the simulation says it carries."""
SESSIONS_MOST = 16 if EMULATED else 280
SCALE_LEAST = 0.12
"""Below it an agent's part is smaller than the process that plays it."""
NEAR = 0.05
"""The pool's mean use, replayed and simulated, may be so far apart."""
LATE_MOST = 1.05
"""An important session may take so many times as long as undisturbed."""


def _free_bytes() -> int:
    fields = dict(line.split(":", 1) for line in open("/proc/meminfo", encoding="ascii"))
    return int(fields["MemAvailable"].split()[0]) * 1024


def _quiet(one: plan.Plan) -> plan.Plan:
    """Return the plan without CPU."""
    return replace(
        one,
        agent=tuple(replace(step, cpu_pct=0) for step in one.agent),
        calls=tuple(
            replace(call, steps=tuple(replace(step, cpu_pct=0) for step in call.steps))
            for call in one.calls
        ),
    )


def _specs(paths: Sequence[Path], count: int, scale: float) -> list[engine.SessionSpec]:
    """Windows of the recordings, from seeded points; every tenth session is important."""
    choice = random.Random("density")
    order = list(paths)
    choice.shuffle(order)
    recorded = {path: trace_format.read(path) for path in order[:count]}
    specs = []
    for number in range(count):
        path = order[number % len(order)]
        one = recorded[path]
        length_s = min(WINDOW_S, one.duration_s)
        start_s = choice.random() * (one.duration_s - length_s)
        options = plan.Options(
            memory_scale=scale,
            speed=WINDOW_S / PLAN_S,
            max_calls=CALLS_MOST,
            window_s=(start_s, start_s + length_s),
        )
        spec = engine.SessionSpec(
            f"s{number + 1}",
            path.name.split(".jsonl")[0],
            _quiet(plan.make_plan(one, options)),
            important=number % 10 == 0,
            delay_s=0.02 * number,
        )
        specs.append(spec)
    return specs


def _simulated(
    specs: Sequence[engine.SessionSpec],
    begun: StrategyResult,
    pool_bytes: int,
    policy: Policy,
    beside_bytes: int = 0,
) -> Result:
    """Simulate the same sessions, each begun when it was in a replay: starting many takes a machine
    a while. `beside_bytes`: what a session holds more, or less, than its plan says."""
    began_s = {session.id: session.began_s for session in begun.sessions}
    sessions = []
    for spec in specs:
        profile = compile_plan(_with(spec.plan, beside_bytes))
        sessions.append(SimulatedSession(profile, spec.important, began_s[spec.id]))
    return simulate_once(policy, sessions, Setup(pool_bytes, len(specs)))


def _with(one: plan.Plan, beside_bytes: int) -> plan.Plan:
    agent = tuple(
        replace(step, memory_bytes=max(0, step.memory_bytes + beside_bytes)) for step in one.agent
    )
    return replace(one, agent=agent)


def _held_replayed(result: StrategyResult) -> float:
    """Bytes that a session holds on average: sessions begin and end one after the other."""
    used = result.timeline.pool_bytes
    return sum(used) / len(used) * result.seconds / sum(s.seconds for s in result.sessions)


def _held_simulated(result: Result) -> float:
    return result.use_mean * result.pool_bytes * result.seconds / result.sessions_s


def _seen(result: StrategyResult, roomy: StrategyResult) -> dict[str, Any]:
    """Give a replay's numbers the names that a simulation's have. `roomy`: the same replay on a
    pool that is never short: it says how long sessions take on this machine undisturbed."""
    calls = [call for session in result.sessions for call in session.calls]
    alone = {session.id: session.seconds for session in roomy.sessions}
    finished = [session for session in result.sessions if session.state == "finished"]
    ratios = [(session.important, session.seconds / alone[session.id]) for session in finished]
    use = [used / result.limit_bytes for used in result.timeline.pool_bytes]
    return {
        "calls_finished": sum(call.outcome == "finished" for call in calls),
        "calls_killed": sum(call.outcome in ("killed", "failed") for call in calls),
        "sessions_lost": sum(session.state == "lost" for session in result.sessions),
        "pauses": sum(len(call.frozen) for call in calls),
        "paused_s": sum(span.end_s - span.start_s for call in calls for span in call.frozen),
        "use_mean": _held_replayed(result) * len(result.sessions) / result.limit_bytes,
        "use_p95": quantile(use, 0.95),
        "use_most": max(use),
        "important_most": max((ratio for important, ratio in ratios if important), default=0.0),
        "everyone_p50": quantile([ratio for _, ratio in ratios] or [0.0], 0.5),
        "seconds": result.seconds,
        "seconds_roomy": roomy.seconds,
        "leaks": len(result.leaks) + len(roomy.leaks),
    }


def _expected(result: Result, count: int) -> dict[str, Any]:
    return {
        "calls_finished": result.calls_finished,
        "calls_killed": result.calls_killed + result.calls_oom,
        "sessions_lost": result.sessions_lost,
        "pauses": result.actions.get("freeze", 0),
        "use_mean": _held_simulated(result) * count / result.pool_bytes,
        "use_p95": result.use_p95,
        "important_most": result.important.most,
        "everyone_p50": result.everyone.p50,
        "seconds": result.seconds,
    }


def _show(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    rows = [
        (name, f"{value:.3f}", f"{expected[name]:.3f}" if name in expected else "")
        for name, value in seen.items()
    ]
    for line in tables.table(["", ">replayed", ">simulated"], rows):
        print(line, file=sys.stderr)


def compare(paths: Sequence[Path], policy: Path, at_most: int, carried: int) -> dict[str, Any]:
    """Replay under the daemon, simulate the same plans, and say how far apart they are.
    `at_most`: sessions, 0: what this machine carries. `carried`: what the simulation says that a
    pool of 64 GB does; no more are replayed. Raises ReplayError."""
    count = min(at_most or SESSIONS_MOST, carried or SESSIONS_MOST)
    whole = sum(spec.plan.mean_bytes for spec in _specs(paths, count, 1.0))
    scale = min(1.0, _free_bytes() * MEMORY_SHARE * USE / whole)
    if scale < SCALE_LEAST:
        count = max(4, int(count * scale / SCALE_LEAST))
        scale = SCALE_LEAST
    specs = _specs(paths, count, scale)
    scaled_policy = scaled(load_policy(policy).policy, scale)
    room_bytes = int(2 * sum(spec.plan.mean_bytes for spec in specs))
    how = engine.EngineOptions(memory_scale=scale)
    roomy = engine.run_strategy("ours", specs, room_bytes, how)
    # Page tables are not in the plan, and what processes share is not the session's.
    beside_bytes = int(
        _held_replayed(roomy) - _held_simulated(_simulated(specs, roomy, room_bytes, scaled_policy))
    )
    held = _held_replayed(roomy) * count
    # One call at its peak has to fit beside the others, or no policy could let it finish.
    highest = max(call.peak_bytes for spec in specs for call in spec.plan.calls)
    pool_bytes = int(max(held / USE, (held + highest) * 1.03))
    print(
        f"{count} sessions, memory x{scale:.2f}, on {pool_bytes / 1e6:.0f} MB; a session holds "
        f"{beside_bytes / 1e6:.1f} MB beside its plan",
        file=sys.stderr,
    )
    replayed = engine.run_strategy("ours", specs, pool_bytes, how)
    simulated = _simulated(specs, replayed, pool_bytes, scaled_policy, beside_bytes)
    expected = _expected(simulated, count)
    seen = _seen(replayed, roomy)
    _show(seen, expected)
    where = "emulated guest" if EMULATED else "this machine"
    off = abs(seen["use_mean"] - expected["use_mean"])
    killed = seen["calls_killed"] + seen["sessions_lost"]
    late = seen["important_most"]
    survival = f"replayed: calls killed, {count} sessions on {pool_bytes / 1e9:.2f} GB"
    delay = "replayed: important session, time over undisturbed"
    distance = "pool's mean use, replayed less simulated"
    targets = [
        Target(survival, float(killed), "", "0", killed == 0),
        Target(delay, late, "x", f"<= {LATE_MOST}", late <= LATE_MOST),
        Target(distance, off, "", f"<= {NEAR}", off <= NEAR),
    ]
    return {
        "where": where,
        "sessions": count,
        "memory_scale": scale,
        "pool_bytes": pool_bytes,
        "beside_bytes": beside_bytes,
        "replayed": seen,
        "simulated": expected,
        "targets": [asdict(t) for t in targets],
        "notes": list(replayed.notes),
    }
