"""Completion, run in bash, and the manual pages, made from the parsers as they are now."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agentcgroup import __version__
from agentcgroup.cli import completion
from agentcgroup.cli.commands import build_parser
from agentcgroup.cli.summaries import ALIASES, COMMANDS
from tools import shell_files


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("share")
    assert shell_files.main([str(directory), __version__]) == 0
    return directory


def _complete(share: Path, *words: str, cwd: Path | None = None) -> set[str]:
    """What bash offers for the last of the words."""
    script = (
        'source "$1"; shift; COMP_WORDS=(agentcg "$@"); COMP_CWORD=$#; '
        "complete -p agentcg > /dev/null || exit 9; "
        "function=$(complete -p agentcg | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
        '"$function" agentcg "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    file = str(share / shell_files.NAMES["bash"])
    command = ["bash", "--norc", "-c", script, "bash", file, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return {word.strip() for word in done.stdout.splitlines() if word.strip()}


def test_bash_offers_commands_and_options(share: Path) -> None:
    assert _complete(share, "ses") == {"session", "sessions"}
    assert _complete(share, "session", "") >= {"open", "adopt", "set", "close", "list", "run"}
    assert _complete(share, "session", "set", "--mem") == {
        "--memory-low",
        "--memory-high",
        "--memory-max",
    }
    assert "--timeout" in _complete(share, "exec", "--t")
    assert _complete(share, "audit", "") >= {"show", "verify"}
    assert _complete(share, "completion", "") >= {"bash", "zsh"}
    every = {*COMMANDS} | {alias for words in ALIASES.values() for alias in words}
    assert _complete(share, "") >= every


def test_bash_offers_files_where_one_is_wanted(share: Path, tmp_path: Path) -> None:
    (tmp_path / "my-policy.toml").touch()
    assert "my-policy.toml" in _complete(share, "policy", "check", "my-", cwd=tmp_path)
    assert "my-policy.toml" in _complete(share, "config", "show", "my-", cwd=tmp_path)


@pytest.fixture
def with_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `agentcg` that knows of some sessions and calls."""
    program = tmp_path / "agentcg"
    program.write_text(
        '#!/bin/sh\n[ "$1" = completion ] || exit 2\n'
        'case $2 in sessions) printf "%s\\n" alpha beta alps ;; calls) echo 0a1b2c ;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@pytest.mark.usefixtures("with_open")
def test_bash_offers_what_is_open(share: Path) -> None:
    assert _complete(share, "session", "close", "al") == {"alpha", "alps"}
    assert _complete(share, "session", "set", "b") == {"beta"}
    assert _complete(share, "calls", "--session", "") == {"alpha", "beta", "alps"}
    assert _complete(share, "record", "be") == {"beta"}
    assert _complete(share, "end", "") >= {"0a1b2c"}
    assert _complete(share, "explain", "0a") == {"0a1b2c"}
    # A session that is opened has a name that is not taken yet.
    assert not _complete(share, "session", "open", "al")


def test_bash_offers_nothing_where_no_daemon_answers(share: Path) -> None:
    assert not _complete(share, "session", "close", "al")


def test_zsh_has_the_same_commands(share: Path) -> None:
    text = (share / shell_files.NAMES["zsh"]).read_text()
    assert text.startswith("#compdef agentcg")
    for name in COMMANDS:
        assert name in text


@pytest.mark.parametrize("page", ["man/man1/agentcg.1", "man/man8/agentcgroupd.8"])
def test_manual_pages_are_without_warnings(share: Path, page: str) -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("no groff here")
    command = [groff, "-man", "-Tutf8", "-ww", "-P-cbou", str(share / page)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout
    assert "SYNOPSIS" in shown and "OPTIONS" in shown


def test_the_manual_names_every_command_and_the_exit_codes(share: Path) -> None:
    text = (share / "man/man1/agentcg.1").read_text()
    for name in COMMANDS:
        assert f"agentcg {name}" in text.replace("\\", ""), name
    assert "\\-\\-memory\\-max" in text
    assert "the daemon is away" in text


def test_two_builds_are_the_same(share: Path) -> None:
    made = {name: (share / name).read_text() for name in shell_files.files(__version__)}
    assert made == shell_files.files(__version__)


def test_the_command_prints_what_the_build_made(capsys: pytest.CaptureFixture[str]) -> None:
    for shell, name in completion.FILES.items():
        assert name == f"share/{shell_files.NAMES[shell]}"
        assert completion.find(shell).is_file()


def test_the_help_has_the_commands_in_their_order() -> None:
    text = build_parser().format_help()
    shown = re.findall(r"^    ([a-z]+)(?: \([a-z]+\))?(?: |$)", text, re.MULTILINE)
    assert shown == [*COMMANDS]
