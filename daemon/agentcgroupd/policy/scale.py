"""Policies for recordings that are replayed with less memory than they took."""

from __future__ import annotations

from typing import Any

from agentcgroupd.config import Section
from agentcgroupd.policy.lint import CHARGE_LEAST_BYTES
from agentcgroupd.policy.schema import Amount, Policy


def scaled(policy: Policy, factor: float) -> Policy:
    """Return the policy with all sizes in bytes times `factor`, like the memory of what is replayed
    under it. Parts of the pool stay as they are. Raises ValueError unless 0 < factor <= 1."""
    if not 0 < factor <= 1:
        raise ValueError(f"factor is {factor:g}; allowed: above 0, at most 1")
    found: Policy = _scaled(policy, factor)
    return found


def _scaled(value: Any, factor: float) -> Any:
    """Return a value of a policy, or of a table in it, with its sizes scaled."""
    if isinstance(value, Amount) and value.size_bytes is not None:
        # Whole KiB can be written and read again without a loss.
        size_bytes = int(value.size_bytes * factor) >> 10 << 10
        least_bytes = min(CHARGE_LEAST_BYTES, value.size_bytes)
        return Amount(value.percent, max(least_bytes, size_bytes))
    if isinstance(value, Section):
        changes = {name: _scaled(getattr(value, name), factor) for name in type(value).model_fields}
        return value.model_copy(update=changes)
    if isinstance(value, tuple):
        return tuple(_scaled(element, factor) for element in value)
    return value
