"""A policy for memory at a scale."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.policy.load import load_policy, parse_policy
from agentcgroupd.policy.scale import scaled
from agentcgroupd.policy.toml import diff, to_toml

DEFAULT = load_policy(Path("default")).policy


def test_sizes_follow_and_parts_of_the_pool_stay() -> None:
    changes = {c.key: c.after for c in diff(DEFAULT, scaled(DEFAULT, 0.5))}
    assert changes["headroom.prior"] == "1G"
    assert changes["headroom.small"] == '"2%, at most 32M"'
    assert changes["rulesets.freeze.when[0].below"] == '"4%, at most 256M"'
    assert changes["admission.small"] == "32M"
    assert "headroom.leader_most" not in changes and "headroom.lease" not in changes


@given(st.floats(0.001, 1.0))
def test_the_document_says_the_same(factor: float) -> None:
    found = scaled(DEFAULT, factor)
    assert parse_policy(to_toml(found)) == found


def test_at_full_scale_nothing_changes() -> None:
    assert scaled(DEFAULT, 1.0) == DEFAULT


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.5, float("nan")])
def test_only_smaller(factor: float) -> None:
    with pytest.raises(ValueError, match="allowed: above 0, at most 1"):
        scaled(DEFAULT, factor)
