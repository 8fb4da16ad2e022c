"""What real agents start, and which of it is a call: recorded command lines against the rules that
hold without configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.unwrap import SCRIPT_CHARS_MAX, command_of, unwrapped, word_at
from agentcgroupd.boundaries.rules import Rules, Started, continues
from agentcgroupd.config_boundaries import BoundariesConfig
from agentcgroupd.intents.command import tool_name
from agentcgroupd.intents.script import reads_commands
from agentcgroupd.intents.wrapped import user_command
from tests.trees.wraps import WRAPS, claude, claude_sandbox, codex, gemini

ROWS: list[list[Any]] = json.loads(Path(__file__).with_name("agents.json").read_text())["rows"]
DEFAULT = Rules(BoundariesConfig())


def expanded(word: str) -> str:
    """A word with what an agent wraps around its command."""
    for name, wrap in WRAPS.items():
        head, found, command = word.partition(f"{name}(")
        if found and not head.endswith("_"):
            return head + wrap(command.removesuffix(")"))
    return word


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}: {row[3][-1][:40]!r}" for row in ROWS])
def test_what_agents_start(row: list[Any]) -> None:
    _, parent, comm, argv, name, command, job = [*row, None, None][:7]
    argv = [expanded(word) for word in argv]
    started = Started(comm, argv, parent, is_job=lambda: job == "job")
    assert DEFAULT.of(started).begins_call is (name is not None)
    if name is None:
        return
    shown = user_command(argv)
    assert tool_name(comm, shown) == name
    assert (shown[2] if command is not None else None) == command


def test_every_agent_is_there() -> None:
    agents = {row[0].split(" ")[0] for row in ROWS}
    expected = {"Claude", "Codex", "Gemini", "OpenHands", "SWE-ReX", "mini-swe-agent", "aider"}
    assert expected <= agents


def test_what_a_quiet_shell_goes_on_as_is_no_call() -> None:
    """`bash -c env` becomes env, which is the same process."""
    assert DEFAULT.of(Started("make", ["make"], "claude")).begins_call
    assert not DEFAULT.of(Started("env", ["env"], "claude", is_first=False)).begins_call


@pytest.mark.parametrize("argv", [["bash", "-c", "make"], ["make"], ["sudo", "make"], ["bash"]])
def test_what_startup_files_start_is_quiet(argv: list[str]) -> None:
    started = Started(argv[0], argv, "bash", is_job=lambda: True, at_startup=True)
    assert DEFAULT.of(started).is_quiet and not DEFAULT.of(started).begins_call


@pytest.mark.parametrize("parent", ["bash", "zsh", "", "python3", "claude", "node"])
def test_only_a_shell_has_startup_files(parent: str) -> None:
    """Any program can ignore the stop of its terminal; a parent that is not known may be one."""
    started = Started("make", ["make"], parent, at_startup=True)
    assert DEFAULT.of(started).begins_call is (parent in ("python3", "claude", "node"))


@pytest.mark.parametrize(
    ("comm", "argv", "quiet"),
    [
        ("lsb_release", ["/bin/sh", "/usr/bin/lsb_release", "-a"], True),
        ("git", ["git", "-c", "a=b", "ls-remote", "https://example.org/x"], True),
        ("git", ["git", "push"], False),
        ("bash", ["/bin/bash", "-c", "env"], True),
        ("gcc", ["gcc", "--version"], True),
        ("sh", ["sh", "-c", "nice -n 10 /bin/bash"], False),
        ("bash", ["bash", "-i"], False),
        ("python3", ["python3", "-m", "mcp_server_x"], False),
        ("claude", ["claude", "-p", "x"], False),
        ("bwrap", ["bwrap", "--", "make"], False),
        ("pytest", ["pytest"], False),
    ],
)
def test_only_what_asks_something_is_quiet(comm: str, argv: list[str], quiet: bool) -> None:
    """What a server, another agent, a sandbox or a terminal starts may be a tool."""
    assert DEFAULT.of(Started(comm, argv, "python3")).is_quiet is quiet


@pytest.mark.parametrize("wrap", [claude, claude_sandbox, codex, gemini])
@pytest.mark.parametrize(
    "command",
    [
        "true",
        "echo 'a' \"b\" it\\'s $(x)",
        "cat <<'E'\n a && eval 'x'\nE",
        "x" * 9000,
        "eval 'pwd' && pwd -P >| f",
        "\n)\n",
        "echo \u00e9",
    ],
)
def test_a_wrapped_command_comes_back_as_it_was(wrap: Callable[[str], str], command: str) -> None:
    argv = ["bash", "-c", wrap(command)]
    assert user_command(argv) == ["bash", "-c", command]
    # What a hook looks for is what the report has.
    assert command_of(argv) == unwrapped(command)


@pytest.mark.parametrize(
    "argv",
    [
        ["bash", "-c", "make"],
        ["bash", "-c", "echo /shell-snapshots/snapshot-1"],
        ["bash", "-c", "__CODEX_SNAPSHOT_ is cut"],
        ["python3", "-c", "eval('x')"],
        ["bash", "script.sh"],
        ["bash"],
        [],
    ],
)
def test_what_no_agent_wrapped_stays(argv: list[str]) -> None:
    assert user_command(argv) == argv


def test_a_command_that_wraps_itself_has_an_end() -> None:
    script = "make"
    for _ in range(8):
        script = claude(script)
    assert user_command(["bash", "-c", script])[:2] == ["bash", "-c"]
    endless = "source /shell-snapshots/snapshot- && eval '" + "x" * (2 * SCRIPT_CHARS_MAX)
    assert len(user_command(["bash", "-c", endless])[2]) <= SCRIPT_CHARS_MAX


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("'a b' c", "a b"),
        ("a'b'\"c\"\\d e", "abcd"),
        ("'it'\"'\"'s'", "it's"),
        ("'it'\\''s' x", "it's"),
        ('"\\$x\\a"', "$x\\a"),
        ("a;b", "a"),
        ("", ""),
        ("'never closed", "never closed"),
    ],
)
def test_a_word_without_its_quotes(text: str, word: str) -> None:
    assert word_at(text, 0) == word


@pytest.mark.parametrize(
    ("argv", "reads"),
    [
        (["bash"], True),
        (["-bash"], True),
        (["bash", "-i"], True),
        (["bash", "-l", "-i"], True),
        (["bash", "--norc", "--noprofile"], True),
        (["bash", "--rcfile", "x"], True),
        (["bash", "-o", "pipefail"], True),
        (["bash", "-s", "a"], True),
        (["sh", "-"], True),
        (["bash", "-c", "ls"], False),
        (["bash", "-lc", "ls"], False),
        (["bash", "script.sh"], False),
        (["bash", "-x", "script.sh"], False),
        (["bash", "--", "script.sh"], False),
        (["/usr/bin/env", "bash"], True),
        (["nice", "-n", "10", "/bin/bash", "-l"], True),
        (["nice", "-n", "10", "make"], False),
        (["python3"], False),
        ([], False),
    ],
)
def test_a_shell_that_reads_its_commands(argv: list[str], reads: bool) -> None:
    assert reads_commands(argv) is reads


@pytest.mark.parametrize(
    ("argv", "head", "found"),
    [
        (["sh", "-c", "abc"], ["sh", "-c", "ab"], True),
        (["sh", "-c", "abc", "d"], ["sh", "-c", "abc"], True),
        (["sh", "-c", "xbc"], ["sh", "-c", "ab"], False),
        (["sh"], ["sh", "-c"], False),
        (["a", "\u00e9"], ["a", "\ufffd"], True),
        ([], ["a"], False),
        (["a"], [], False),
    ],
)
def test_a_head_is_that_of_these_arguments(argv: list[str], head: list[str], found: bool) -> None:
    assert continues(argv, head) is found
