"""`agentcg setup`: what it writes, and that it takes nothing else along."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.cli.agents import AGENTS, HOOKED, CannotSetUp, settings_of

FRONT = Path("/opt/agentcgroup/bin/agentcg")
HOME, PROJECT = Path("/home/u"), Path("/src/p")
JSON_AGENTS = ("claude", "codex", "gemini", "openhands")
OTHERS = {"matcher": "Write", "hooks": [{"type": "command", "command": "prettier hook claude"}]}


def write(agent: str, text: str, wanted: bool = True, scope: str = "user") -> str:
    return settings_of(agent, scope, FRONT, HOME, PROJECT).write(text, wanted)


@pytest.mark.parametrize("agent", AGENTS)
def test_the_second_time_changes_nothing_and_removing_leaves_nothing(agent: str) -> None:
    once = write(agent, "")
    assert once and write(agent, once) == once
    assert write(agent, once, False) == ""
    assert write(agent, "", False) == ""


@pytest.mark.parametrize("agent", AGENTS)
def test_the_hook_that_is_put_there_is_one_that_there_is(agent: str) -> None:
    dialects = re.findall(r"""agentcg(?:", \["hook", "| hook )(\w+)""", write(agent, ""))
    assert dialects and set(dialects) <= set(HOOKED)


@pytest.mark.parametrize("agent", JSON_AGENTS)
def test_what_was_there_stays_as_it_was(agent: str) -> None:
    before = {"theme": "é", "hooks": {"PostToolUse": [OTHERS], "AfterTool": []}, "last": [1, 2]}
    text = json.dumps(before, indent=4, ensure_ascii=False) + "\n"
    after = write(agent, text)
    added = json.loads(after)
    assert list(added) == list(before) and added["hooks"]["PostToolUse"][0] == OTHERS
    removed = [line for line in text.splitlines() if line.rstrip(",") not in after]
    assert removed in ([], ['        "AfterTool": []'])
    assert write(agent, after, False).replace(" ", "") in (
        text.replace(" ", ""),
        text.replace(',\n        "AfterTool": []', "").replace(" ", ""),
    )


@pytest.mark.parametrize("agent", JSON_AGENTS)
def test_a_hook_of_ours_in_another_place_is_replaced(agent: str) -> None:
    old = write(agent, "").replace("/opt/agentcgroup/bin/agentcg", "/usr/local/bin/agentcg")
    assert write(agent, old) == write(agent, "")


@pytest.mark.parametrize("text", ["{", "[]", "// x\n{}", '{"hooks": 3}', '{"hooks": {"a": {}}}'])
def test_settings_that_cannot_be_kept_are_left_alone(text: str) -> None:
    with pytest.raises(CannotSetUp):
        write("claude", text)


def hooks_of(settings: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (event, entry["matcher"], hook["command"])
        for event, entries in settings["hooks"].items()
        for entry in entries
        for hook in entry["hooks"]
    ]


def test_each_agent_is_told_in_its_own_words() -> None:
    bash = "Bash|mcp__.*"
    assert hooks_of(json.loads(write("claude", ""))) == [
        ("PostToolUse", bash, f"{FRONT} hook claude"),
        ("PostToolUseFailure", bash, f"{FRONT} hook claude"),
    ]
    assert hooks_of(json.loads(write("codex", ""))) == [
        ("PostToolUse", bash, f"{FRONT} hook codex")
    ]
    assert hooks_of(json.loads(write("gemini", ""))) == [
        ("AfterTool", "run_shell_command", f"{FRONT} hook gemini")
    ]


def test_openhands_is_told_where_its_model_hears_it() -> None:
    before = json.dumps(
        {
            "hooks": {
                "PostToolUse": [
                    {
                        "matcher": "*",
                        "hooks": [
                            {"type": "command", "command": f"{FRONT} hook claude", "timeout": 10}
                        ],
                    }
                ]
            }
        }
    )
    assert hooks_of(json.loads(write("openhands", before))) == [
        ("Stop", "*", f"{FRONT} hook openhands"),
        ("UserPromptSubmit", "*", f"{FRONT} hook openhands"),
    ]


def test_files_are_where_the_agents_look() -> None:
    found = {
        (agent, scope): str(settings_of(agent, scope, FRONT, HOME, PROJECT).path)
        for agent in ("claude", "codex", "gemini")
        for scope in ("managed", "user", "project")
    }
    assert found == {
        ("claude", "managed"): "/etc/claude-code/managed-settings.json",
        ("claude", "user"): "/home/u/.claude/settings.json",
        ("claude", "project"): "/src/p/.claude/settings.json",
        ("codex", "managed"): "/etc/codex/requirements.toml",
        ("codex", "user"): "/home/u/.codex/hooks.json",
        ("codex", "project"): "/src/p/.codex/hooks.json",
        ("gemini", "managed"): "/etc/gemini-cli/settings.json",
        ("gemini", "user"): "/home/u/.gemini/settings.json",
        ("gemini", "project"): "/src/p/.gemini/settings.json",
    }
    for agent in ("opencode", "openhands"):
        with pytest.raises(CannotSetUp):
            settings_of(agent, "managed", FRONT, HOME, PROJECT)


def test_codex_requirements_keep_their_comments() -> None:
    tomllib = pytest.importorskip("tomllib")
    before = '# ours alone\nallowed_approval_policies = ["never"]\n'
    after = write("codex", before, scope="managed")
    assert after.startswith(before) and write("codex", after, scope="managed") == after
    hook = tomllib.loads(after)["hooks"]["PostToolUse"][0]["hooks"][0]
    assert hook == {"type": "command", "command": f"{FRONT} hook codex", "timeout": 10}
    assert write("codex", after, False, "managed") == before


def test_a_plugin_of_somebody_elses_stays() -> None:
    with pytest.raises(CannotSetUp):
        write("opencode", "export const X = 1\n")


def run(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    cli = Path(sys.executable).parent / "agentcg-cli"
    return subprocess.run(
        [cli, "setup", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(home)},
        cwd=home,
        check=False,
    )


def test_the_command_shows_a_diff_writes_and_removes(tmp_path: Path) -> None:
    path = tmp_path / ".claude/settings.json"
    shown = run(tmp_path, "claude", "--dry-run")
    assert shown.returncode == 0 and "+++ " in shown.stdout and not path.exists()
    assert "hook claude" in run(tmp_path, "claude").stdout
    assert "as it should be" in run(tmp_path, "claude").stdout
    command = json.loads(path.read_text())["hooks"]["PostToolUse"][0]["hooks"][0]["command"]
    assert Path(command.split()[0]).exists()
    removed = run(tmp_path, "claude", "--remove").stdout
    assert '-  "hooks": {' in removed and not path.exists()
    assert removed.endswith(f"{path}: removed\n")


def test_mode_and_links_are_kept(tmp_path: Path) -> None:
    (tmp_path / ".gemini").mkdir()
    real, link = tmp_path / "real.json", tmp_path / ".gemini/settings.json"
    real.write_text("{}\n")
    real.chmod(0o600)
    link.symlink_to(real)
    assert run(tmp_path, "gemini", "--json").returncode == 0
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o600
    assert "AfterTool" in real.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a link to another user")
def test_root_follows_no_link_of_others(tmp_path: Path) -> None:
    (tmp_path / ".claude").mkdir()
    link, target = tmp_path / ".claude/settings.json", tmp_path / "target.json"
    link.symlink_to(target)
    os.lchown(link, 1000, 1000)
    refused = run(tmp_path, "claude")
    assert refused.returncode != 0 and not target.exists()
    os.lchown(link, 0, 0)
    assert run(tmp_path, "claude").returncode == 0 and target.exists()


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / ".claude").mkdir()
    path = tmp_path / ".claude/settings.json"
    path.write_text("{ // no\n}")
    refused = run(tmp_path, "claude")
    assert refused.returncode != 0 and str(path) in refused.stderr
    assert path.read_text() == "{ // no\n}"
