"""The configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentcgroupd import settings
from agentcgroupd.check import check
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
        ({"limits": {"answer_bytes": "65M"}}, "limits.answer_bytes_all: 64 MiB cannot be used"),
        ({"limits": {"answer_bytes_all": "1G"}}, "limits.answer_bytes_all: 1 GiB cannot be used"),
        ({"limits": {"memory": "100M"}}, "limits.answer_bytes_all: 64 MiB cannot be used"),
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


LINES = """\
[pool]
cgroup = "/../x"
memory_mx = "1G"

[guard]
enabled = "yes"
tick = true

[sessions]
calls_max = "5"
reports_kept = true

[[boundaries.rules]]
progam = ["sh"]

[server]
run_dir = "run"
metrics_address = "127.0.0.1"
"""


def test_every_mistake_is_named_with_its_line_and_in_plain_words(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(LINES)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    said = str(caught.value).replace(str(path), "c").split("\n")
    assert said == [
        "c:2: pool.cgroup: '/../x' cannot be used; allowed is a path below the cgroup2 mount, such "
        "as /agentcg",
        "c:3: pool.memory_mx: no such key; did you mean 'memory_max'?",
        "c:6: guard.enabled: 'yes' cannot be used; allowed is true or false, without quotes",
        "c:7: guard.tick: 'True' cannot be used; allowed is text or a number",
        "c:10: sessions.calls_max: '5' cannot be used; allowed is a whole number, without quotes",
        "c:11: sessions.reports_kept: 'True' cannot be used; allowed is a whole number, without "
        "quotes",
        "c:14: boundaries.rules[0].progam: no such key; did you mean 'program'?",
        "c:17: server.run_dir: 'run' cannot be used; allowed is an absolute path without `..`",
        "c:18: server.metrics_address: '127.0.0.1' cannot be used; allowed is a loopback address "
        "with a port, such as 127.0.0.1:9464, or nothing",
    ]


@pytest.mark.parametrize("cgroup", ["", "/", "/a/../b", "..", "a//b", "/./a"])
def test_a_pool_outside_of_the_mount_is_refused(cgroup: str) -> None:
    with pytest.raises(ConfigError, match=r"pool\.cgroup"):
        parse_config({"pool": {"cgroup": cgroup}})


@pytest.mark.parametrize(("text", "usec"), [("off", 0), ("1ms", 1000), ("1s", 1_000_000)])
def test_how_long_a_program_waits_at_its_exec(text: str, usec: int) -> None:
    assert parse_config({"cpu": {"exec_hold": text}}).cpu.exec_hold == usec


@pytest.mark.parametrize("text", ["1.1s", "0", "on", "20"])
def test_other_times_at_an_exec_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"cpu\.exec_hold"):
        parse_config({"cpu": {"exec_hold": text}})


def test_a_contradiction_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[cpu]\nwait_max = "10s"\nstall_timeout = "5s"\n')
    with pytest.raises(ConfigError, match=r"c\.toml:3: cpu\.stall_timeout: 5 s cannot be used"):
        load_config(path)


# As text


LINES_GOOD = """\
pool.memory_max = "4G"
gpu.libraries = ["/a \\"b\\"/libcuda.so.1"]

[guard]
enabled = false

[[boundaries.rules]]
program = ["sh", "ba*"]
shell_command = true
"""


def test_every_key_is_shown_with_the_default_that_it_has() -> None:
    assert settings.missing() == []
    assert parse_config(settings.as_dict(None)) == Config()
    text = settings.show(None)
    assert "\n# memory_max = (default: 85 % of the" in text
    assert "# the budget of all sessions together, adopted ones among them" in text
    assert 'timeout_max = "1d"' in text
    assert "](" not in text and "see below" not in text


def test_what_a_file_sets_is_shown_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(LINES_GOOD)
    text = settings.show(path)
    assert 'memory_max = "4G"  # default: 85 % of the memory above it' in text
    shown = tmp_path / "shown.toml"
    shown.write_text(text)
    assert load_config(shown) == load_config(path) != Config()


# What a start would refuse


def test_check_refuses_what_a_start_would(tmp_path: Path) -> None:
    def refused(data: dict[str, Any], words: str) -> None:
        base = {"server": {"run_dir": str(tmp_path / "run")}, "audit": {"path": str(audit)}}
        with pytest.raises(ConfigError, match=words):
            check(parse_config({**base, **data}))

    audit = tmp_path / "log/audit.jsonl"
    refused({"pool": {"cgroup": "/no-such/pool"}}, "its parent .*; make it with mkdir")
    refused({"policy": {"path": str(tmp_path / "none.toml")}}, r"none\.toml: cannot be read")
    (tmp_path / "link").symlink_to(tmp_path)
    refused({"server": {"run_dir": str(tmp_path / "link/run")}}, "is a symbolic link")
    refused({"audit": {"path": str(tmp_path)}}, r"audit\.path: .* it is no regular file")
    assert {path.name for path in tmp_path.iterdir()} == {"link"}, "nothing is made"


def test_check_takes_what_a_start_would(tmp_path: Path) -> None:
    run_dir, audit = tmp_path / "run", tmp_path / "log/audit.jsonl"
    check(parse_config({"server": {"run_dir": str(run_dir)}, "audit": {"path": str(audit)}}))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_size_of_the_audit_log_is_the_default() -> None:
    assert parse_config({"audit": {"max_bytes": ""}}).audit.max_bytes == 64 << 20
    assert parse_config({"audit": {"max_bytes": "1M"}}).audit.max_bytes == 1 << 20
