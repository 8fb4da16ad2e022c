"""The configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentcgroupd.config import Config, load_config, parse_config
from agentcgroupd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_defaults_stand_alone() -> None:
    assert load_config(None) == Config() == parse_config({})


def test_the_shipped_file_is_valid() -> None:
    config = load_config(ROOT / "systemd/agentcgroupd.toml")
    assert config.pool.cgroup == "/agentcg.slice/agentcg-pool.service/pool"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"pol": {}}, "pol: no such key; did you mean 'pool'"),
        ({"pool": {"memory_mx": "1G"}}, "pool.memory_mx: no such key; did you mean 'memory_max'"),
        ({"pool": {"memory_max": "lots"}}, "pool.memory_max: 'lots' cannot be used"),
        ({"pool": {"memory_max": -1}}, "pool.memory_max: '-1' cannot be used"),
        ({"calls": {"timeout": "soon"}}, "calls.timeout: 'soon' cannot be used"),
        ({"calls": {"timeout_max": ""}}, "calls.timeout_max"),
        ({"sessions": {"calls_max": 0}}, "sessions.calls_max: 0 cannot be used"),
        ({"sessions": {"priority": "urgent"}}, "sessions.priority: 'urgent' cannot be used"),
        ({"server": {"metrics_address": "0.0.0.0:9464"}}, "server.metrics_address"),
        ({"guard": {"margin_percent": 20.0}}, "guard.margin_percent"),
        ({"guard": {"tick": True}}, "guard.tick"),
        ({"pool": "big"}, "pool: 'big' cannot be used"),
        ({"cpu": {"stall_timeout": "5s"}}, "cpu.stall_timeout: 5 s cannot be used with"),
    ],
)
def test_mistakes_are_named(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "here.toml")
    assert str(caught.value).startswith("here.toml: ")
    assert words in str(caught.value)


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[pool\n")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load_config(path)
    with pytest.raises(ConfigError, match="missing"):
        load_config(tmp_path / "missing.toml")


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    for name, section in Config.model_fields.items():
        model = section.annotation
        assert model is not None
        for key in model.model_fields:
            assert f"`{name}.{key}`" in text, f"{name}.{key} is not in docs/configuration.md"


def test_an_empty_size_of_the_audit_log_is_the_default() -> None:
    assert parse_config({"audit": {"max_bytes": ""}}).audit.max_bytes == 64 << 20
    assert parse_config({"audit": {"max_bytes": "1M"}}).audit.max_bytes == 1 << 20
