"""Warnings about what is legal in a policy and hardly meant."""

from __future__ import annotations

from collections.abc import Iterator

from agentcgroupd.policy.schema import Policy, PoolFree
from agentcgroupd.units import show_bytes

CHARGE_LEAST_BYTES = 1 << 20
"""Sizes below this are not seen in time: memory is charged in batches."""


def lint(policy: Policy, limit_bytes: int | None = None) -> Iterator[str]:
    """Yield a sentence for each doubt. `limit_bytes`: the pool's size, where it is known."""
    enabled = [r for r in policy.rulesets if r.enabled]
    actions = {r.do.action for r in enabled}
    if not policy.rulesets:
        yield "rulesets: there are none: nothing is done when memory runs short"
    elif not enabled:
        yield "rulesets: all are disabled: nothing is done when memory runs short"
    elif "freeze" not in actions:
        yield (
            "rulesets: none freezes calls: with guard.credit, calls that have to wait sleep in the "
            "kernel where they are; without it, growth is held up by denial alone"
        )
    if enabled and "kill" not in actions:
        yield (
            "rulesets: none ends a call: when calls that wait hold what the most important one "
            "needs, the kernel's OOM killer chooses"
        )
    if limit_bytes is None:
        return
    for ruleset in enabled:
        for index, detector in enumerate(ruleset.when):
            if isinstance(detector, PoolFree):
                key = f"rulesets.{ruleset.name}.when[{index}]"
                yield from _pool_free(key, detector, limit_bytes)


def _pool_free(key: str, detector: PoolFree, limit_bytes: int) -> Iterator[str]:
    """Yield what makes no sense in a pool of this size: only then can bytes be compared with
    percent."""
    pool = f"the pool of {show_bytes(limit_bytes)}"
    below, until = detector.below.of(limit_bytes), detector.until.of(limit_bytes)
    if below >= limit_bytes:
        yield f"{key}.below: {detector.below} is all of {pool}: it holds always"
    elif until >= limit_bytes:
        yield f"{key}.until: {detector.until} is all of {pool}: once it holds, it holds for ever"
    elif until < below:
        yield (
            f"{key}.until: {detector.until} is less than below ({detector.below}) in {pool}: it "
            "ends and begins at every look"
        )
    elif below < CHARGE_LEAST_BYTES:
        yield (
            f"{key}.below: {detector.below} is {show_bytes(below)} in {pool}, less than what is "
            "charged at a time: it is not seen in time"
        )
