"""The policy in force while its files change."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from agentcgroupd.config import PolicyConfig, parse_config
from agentcgroupd.errors import ConfigError
from agentcgroupd.guard.policy_files import PolicyFiles, read_policy
from agentcgroupd.telemetry.audit import Audit
from agentcgroupd.telemetry.feed import Feed
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.notices import Notices

FREEZE = """
[[rulesets]]
name = "freeze"
when = [{ detector = "growing", above = "1M" }]
do = { action = "freeze" }
"""


class Files:
    """A PolicyFiles with a document, and what it told."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "p.toml"
        self.write("one")
        self.metrics = Metrics()
        self.audit_path = directory / "audit.jsonl"
        notices = Notices(Audit(self.audit_path, 1 << 20), self.metrics, Feed())
        config = PolicyConfig(path=self.path, drop_in=directory / "d")
        self.files = PolicyFiles(config, read_policy(config), notices, None)
        self.changes: list[str] = []
        self.files.follow(lambda policy: self.changes.append(policy.name))

    def write(self, name: str) -> None:
        """Replace the file, which is what an editor does."""
        new = self.path.with_suffix(".new")
        new.write_text(f"name = '{name}'\n{FREEZE}")
        os.replace(new, self.path)

    def compare(self) -> str:
        """Twice: once to see it, once to see that it stays."""
        self.files.compare()
        self.files.compare()
        return self.files.policy.name

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"agentcg_policy_{name}", labels)


def test_a_changed_file_is_taken_up_once_it_stays(tmp_path: Path) -> None:
    files = Files(tmp_path)
    assert files.compare() == "one" and files.changes == []
    files.write("two")
    files.files.compare()
    assert files.files.policy.name == "one"
    assert files.compare() == "two"
    assert files.changes == ["two"]
    assert files.compare() == "two" and files.changes == ["two"]
    assert files.value("reloads_total", result="changed") == 1
    (tmp_path / "d").mkdir()
    (tmp_path / "d/1.toml").write_text("name = 'three'")
    assert files.compare() == "three"
    (tmp_path / "d/1.toml").unlink()
    assert files.compare() == "two"
    files.path.touch()
    assert files.compare() == "two" and files.changes == ["two", "three", "two"]
    assert files.value("reloads_total", result="unchanged") == 1


def test_a_wrong_file_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = Files(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        files.write("T W O")
        for _ in range(3):
            assert files.compare() == "one"
        assert f"{files.path}:1: name: 'T W O' cannot be used" in files.files.error
        with pytest.raises(ConfigError, match="T W O"):
            files.files.reload()
    assert len(caplog.records) == 1
    assert files.value("wrong") == 1
    assert files.value("reloads_total", result="refused") == 2
    files.path.unlink()
    assert files.compare() == "one" and "No such file" in files.files.error
    files.write("one")
    assert files.compare() == "one" and files.files.error == ""
    assert files.value("wrong") == 0 and files.changes == []
    files.write("two")
    assert files.files.reload() is True
    assert files.files.reload() is False
    assert files.changes == ["two"]


def test_the_configuration_names_the_policy() -> None:
    assert parse_config({}).policy.path == Path("default")
    config = parse_config({"policy": {"path": "/x.toml", "drop_in": ""}}).policy
    assert (config.path, config.drop_in) == (Path("/x.toml"), None)
    with pytest.raises(ConfigError, match="there is no such policy"):
        read_policy(PolicyConfig(path=Path("nothing-like-it")))
