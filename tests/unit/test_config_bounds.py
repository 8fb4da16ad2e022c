"""Values of the configuration that could be read and never be used are refused by their key."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentcgroupd.config import load_config
from agentcgroupd.errors import ConfigError
from agentcgroupd.policy.load import parse_policy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[audit]\npath = ""', "audit.path"),
        ('[audit]\npath = "log"', "audit.path"),
        ('[audit]\npath = "/"', "audit.path"),
        ('[audit]\npath = "/var/../log"', "audit.path"),
        ("[guard]\nfaults_per_s = 99999999999999999999", "guard.faults_per_s"),
        ("[guard]\nrefaults_per_s = 99999999999999999999", "guard.refaults_per_s"),
        (f'[[boundaries.rules]]\nprogram = ["{"*a" * 40}"]', "boundaries.rules"),
        ('[[boundaries.rules]]\nprogram = [""]', "boundaries.rules"),
        (f"[sessions]\npids_max = {'9' * 5000}", "thousands of digits"),
    ],
)
def test_it_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "agentcgroupd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert "sys.set_int_max_str_digits" not in str(caught.value)


def test_what_is_near_the_bounds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "agentcgroupd.toml"
    path.write_text(
        '[audit]\npath = "/tmp/log.jsonl"\n[guard]\nfaults_per_s = 1000000000\n'
        f'[[boundaries.rules]]\nprogram = ["{"[aA]" * 15}"]\n'
    )
    config = load_config(path)
    assert config.audit.path == Path("/tmp/log.jsonl")
    assert config.guard.faults_per_s == 1_000_000_000


def test_a_policy_with_a_number_that_is_too_long() -> None:
    with pytest.raises(ConfigError, match="thousands of digits"):
        parse_policy(f"tick = {'9' * 5000}")
