"""`agentcg policy`: files without a daemon, and the policy in force at a fake daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.cli import policy as group
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.policy.explain import policy_state
from agentcgroupd.policy.load import load_policy
from tests.unit.fake_daemon import FakeDaemon, running
from tests.unit.sdk.test_cli import Cli

WRONG = '[[rulesets]]\nname = "a"\nwhen = [{ detector = "growing", abov = "1M" }]\ndo = 1\n'


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run commands without a daemon, and without this machine's configuration."""
    monkeypatch.setenv("AGENTCG_RUN_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(group, "CONFIG", tmp_path / "agentcgroupd.toml")
    return Cli(capsys)


@pytest.fixture
def daemon(run: Cli, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """Run a fake daemon with the default policy in force."""
    state = policy_state(load_policy(None), loaded_unix_usec=1_700_000_000_000_000)
    state.rulesets[0].holds, state.rulesets[0].decisions = True, 7
    state.rulesets[0].acted_usec_ago = 1_500_000
    for fake in running(monkeypatch):
        fake.policy = state
        yield fake


def test_check(run: Cli, tmp_path: Path) -> None:
    assert "policy default: ok" in run("policy", "check", "default")
    path = tmp_path / "p.toml"
    path.write_text(WRONG)
    assert run("policy", "check", str(path), code=1) == ""
    assert run.err.splitlines() == [
        f"{path}:3: rulesets.a.when[0].abov: no such key; did you mean 'above'?",
        f"{path}:4: rulesets.a.do: 1 cannot be used; allowed is a table",
    ]
    found = run.json("policy", "check", str(path), code=1)
    assert found["ok"] is False and found["error"]["sentence"].startswith(f"{path}:3: ")
    assert found["mistakes"][0] == {
        "file": str(path),
        "line": 3,
        "key": "rulesets.a.when[0].abov",
        "sentence": "no such key; did you mean 'above'?",
    }
    run("policy", "check", "defalt", code=1)
    assert "did you mean 'default'?" in run.err


def test_check_warns(run: Cli, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text("name = 'empty'")
    assert "warning: rulesets: there are none" in run("policy", "check", str(path))
    found = run.json("policy", "check", "default", "--pool", "16M")
    assert found["ok"] is True and any("kill.when[0].below: 1%" in w for w in found["warnings"])
    run("policy", "check", "default", "--pool", "much", code=2)
    assert "--pool: 'much' cannot be used" in run.err


def test_check_with_drop_ins(run: Cli, tmp_path: Path) -> None:
    drop_in = tmp_path / "d"
    run("policy", "check", "default", "--drop-in", str(drop_in), code=2)
    assert "no such directory" in run.err
    drop_in.mkdir()
    (drop_in / "a.toml").write_text("name = 'ours'")
    found = run.json("policy", "check", "default", "--drop-in", str(drop_in))
    assert found["name"] == "ours" and found["sources"][1] == str(drop_in / "a.toml")


def test_check_of_a_file_says_which_drop_ins_it_left_out(run: Cli, tmp_path: Path) -> None:
    drop_in = tmp_path / "policy.d"
    config = tmp_path / "agentcgroupd.toml"
    config.write_text(f"[policy]\ndrop_in = '{drop_in}'\n")
    assert "--drop-in" not in run("policy", "check", "default")
    drop_in.mkdir()
    (drop_in / "a.toml").write_text("name = 1")
    assert f"--drop-in {drop_in}" in run("policy", "check", "default")
    run("policy", "check", "default", "--drop-in", str(drop_in), code=1)
    config.write_text("no = 'such table'")
    assert "policy default: ok" in run("policy", "check", "default")


def test_check_without_a_file_is_not_ok_where_the_daemon_s_files_are_broken(
    run: Cli, daemon: FakeDaemon
) -> None:
    assert "policy default: ok" in run("policy", "check")
    daemon.policy.error = "/etc/elsewhere/a.toml:3: no such key"
    assert run("policy", "check", code=1) == ""
    assert "the running daemon cannot use its files" in run.err
    assert "/etc/elsewhere/a.toml:3: no such key" in run.err
    found = run.json("policy", "check", code=1)
    assert found["ok"] is False and "a.toml:3" in found["error"]["sentence"]
    assert "policy default: ok" in run("policy", "check", "default")


def test_check_without_a_file_is_what_the_daemon_would_read(run: Cli, tmp_path: Path) -> None:
    config = tmp_path / "agentcgroupd.toml"
    config.write_text("[policy]\npath = 'workstation'\ndrop_in = ''\n")
    assert run.json("policy", "check")["name"] == "workstation"
    config.write_text("[policy]\npaht = 'workstation'\n")
    run("policy", "check", code=1)
    assert "policy.paht: no such key; did you mean 'path'?" in run.err


def test_show_a_file(run: Cli) -> None:
    text = run("policy", "show", "workstation")
    assert "deny (deny): pool_free: less than 20% free beside the room kept" in text
    assert "DECISIONS" not in text
    assert run("policy", "show", "workstation", "--toml") == load_policy(Path("workstation")).text
    names = [r["name"] for r in run.json("policy", "show", "default")["rulesets"]]
    assert names[-3:] == ["kill-stalled", "share-disks", "hold-disks"]


def test_show_needs_the_daemon(run: Cli) -> None:
    run("policy", "show", code=3)
    assert "cannot be reached" in run.err


def test_show_the_policy_in_force(daemon: FakeDaemon, run: Cli) -> None:
    text = run("policy", "show")
    first = load_policy(None).policy.rulesets[0].name
    row = next(line for line in text.splitlines() if line.startswith(first))
    assert row.split()[2:] == ["holds", "7", "1.50", "s", "ago"]
    assert "does not hold" in text and "loaded" in text
    assert run("policy", "show", "--toml") == load_policy(None).text
    assert run.json("policy", "show")["rulesets"][0]["acted_usec_ago"] == 1_500_000


def test_diff(daemon: FakeDaemon, run: Cli, tmp_path: Path) -> None:
    drop_in = tmp_path / "mine.toml"
    text = load_policy(None).text.replace('until = "30%"', 'until = "31%"')
    drop_in.write_text(text)
    out = run("policy", "diff", str(drop_in))
    assert out.splitlines() == [
        f"from {drop_in} to the policy in force:",
        "  rulesets.reclaim-waiting.when[0].until: 31% -> 30%",
    ]
    assert run.json("policy", "diff", "default", str(drop_in)) == [
        {"key": "rulesets.reclaim-waiting.when[0].until", "before": "30%", "after": "31%"}
    ]
    assert "no difference" in run("policy", "diff", "default")


def test_explain(daemon: FakeDaemon, run: Cli) -> None:
    daemon.calls["c1"] = pb.Call(id="c1")
    lines = run("policy", "explain", "c1").splitlines()
    assert lines[0] == "It runs." and lines[-1] == "  freeze: soon"
    assert "frozen: Paused." in lines[2]
    assert run.json("policy", "explain", "c1")["numbers"] == {"memory_bytes": 5.0}
    run("policy", "explain", "c2", code=5)
    assert "no call 'c2' is open" in run.err


def test_reload(daemon: FakeDaemon, run: Cli) -> None:
    assert run("policy", "reload").startswith("policy default in force, from ")
    daemon.policy.error = "f.toml:3: nme: no such key"
    found = run.json("policy", "reload", code=4)
    assert found["error"]["sentence"] == "f.toml:3: nme: no such key"
    assert "f.toml:3: nme: no such key" in run.err
    assert "f.toml:3" in run("policy", "show")
