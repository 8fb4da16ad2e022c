"""A policy for recordings that are replayed with less memory than they took."""

from __future__ import annotations

from typing import Any

from agentcgroupd.config import Section
from agentcgroupd.policy.schema import Amount, Policy

LEAST_BYTES = 1 << 20
"""Less is not seen: memory is charged in batches."""


def scaled(policy: Policy, factor: float) -> Policy:
    """The same policy with all sizes in bytes times `factor`, as the memory of what is replayed
    under it; parts of the pool stay as they are. Raises ValueError unless 0 < factor <= 1."""
    if not 0 < factor <= 1:
        raise ValueError(f"factor is {factor:g}; allowed: above 0, at most 1")
    found: Policy = _scaled(policy, factor)
    return found


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, Amount) and value.size_bytes is not None:
        # Whole KiB, so that the document says the same.
        size = max(min(LEAST_BYTES, value.size_bytes), int(value.size_bytes * factor) >> 10 << 10)
        return Amount(value.percent, size)
    if isinstance(value, Section):
        changes = {name: _scaled(getattr(value, name), factor) for name in type(value).model_fields}
        return value.model_copy(update=changes)
    if isinstance(value, tuple):
        return tuple(_scaled(element, factor) for element in value)
    return value
