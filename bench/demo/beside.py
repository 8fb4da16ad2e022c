"""Two replays that start at the same moment: all sessions under a strategy, and one of them alone.

How much longer a session takes than alone is told from a run of it beside, in a pool of its own,
not from an earlier or later one: whatever else the machine has to do then slows both alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from agentcgroup_lab.replay.engine import EngineOptions, NotTogetherError
from agentcgroup_lab.replay.result import StrategyResult

Run = Callable[[EngineOptions], StrategyResult]


def run_beside(
    watched: Run, watched_how: EngineOptions, other: Run, other_how: EngineOptions
) -> tuple[StrategyResult, StrategyResult]:
    """Run two replays at the same time and return both results.

    `watched` runs in this thread, `other` in one of its own. Raises what either of them raises: of
    two errors the one that made the other replay give up.
    """
    together = threading.Barrier(2)

    def run(one: Run, how: EngineOptions) -> StrategyResult:
        try:
            return one(replace(how, together=together))
        except BaseException:
            together.abort()
            raise

    with ThreadPoolExecutor(1, thread_name_prefix="beside") as pool:
        beside = pool.submit(run, other, other_how)
        try:
            first = run(watched, watched_how)
        except NotTogetherError:
            beside.result()
            raise
        return first, beside.result()
