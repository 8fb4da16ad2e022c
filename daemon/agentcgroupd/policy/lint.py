"""What is legal in a policy and still hardly meant."""

from __future__ import annotations

from collections.abc import Iterator

from agentcgroupd.policy.schema import Policy, PoolFree
from agentcgroupd.units import show_bytes


def doubts(policy: Policy, limit_bytes: int | None = None) -> Iterator[str]:
    """One sentence each. `limit_bytes`: the pool's size, where it is known."""
    enabled = [r for r in policy.rulesets if r.enabled]
    if not policy.rulesets:
        yield "rulesets: there are none: nothing is done when memory runs short"
    elif not enabled:
        yield "rulesets: all are disabled: nothing is done when memory runs short"
    else:
        actions = {r.do.action for r in enabled}
        if "freeze" not in actions:
            yield ("rulesets: none freezes calls: growth is not held up before the pool is full, "
                   "unless it is denied")  # fmt: skip
        if "kill" not in actions:
            yield ("rulesets: none ends a call: when calls that wait hold what the most important "
                   "one needs, the kernel's OOM killer chooses")  # fmt: skip
    if limit_bytes is None:
        return
    for ruleset in enabled:
        for index, detector in enumerate(ruleset.when):
            if isinstance(detector, PoolFree):
                key = f"rulesets.{ruleset.name}.when[{index}]"
                yield from _pool_free(key, detector, limit_bytes)


def _pool_free(key: str, detector: PoolFree, limit_bytes: int) -> Iterator[str]:
    """Amounts in bytes and in percent can be compared only once the pool's size is known."""
    pool = f"the pool of {show_bytes(limit_bytes)}"
    below, until = detector.below.of(limit_bytes), detector.until.of(limit_bytes)
    if below >= limit_bytes:
        yield f"{key}.below: {detector.below} is all of {pool}: it holds always"
    elif until >= limit_bytes:
        yield f"{key}.until: {detector.until} is all of {pool}: once it holds, it holds for ever"
    elif until < below:
        yield (f"{key}.until: {detector.until} is less than below ({detector.below}) in {pool}: "
               "it ends and begins at every look")  # fmt: skip
    elif below < 1 << 20:
        yield (f"{key}.below: {detector.below} is {show_bytes(below)} in {pool}, less than what is "
               "charged at a time: it is not seen in time")  # fmt: skip
