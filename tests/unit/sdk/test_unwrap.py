"""Commands out of the command lines that agents make of them."""

from __future__ import annotations

import shlex
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcgroup.unwrap import COMMAND_CHARS_MAX, CUT, command_of, is_same, kept
from tests.hook_inputs import AGENTS, wrapped

COMMANDS = (
    "pytest -x tests/a.py",
    "echo 'it''s'; grep \"a b\" < in | wc -l",
    "python3 - <<'E'\nprint(\"it's\")\nE",
    "bash -c 'echo \"$HOME\"'",
    "cd /x && eval 'ls -l' && exec 'y' -c 'z'",
    'printf "%s\\n" \\$HOME $(date) `id` é',
)


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_comes_out_as_it_went_in(agent: str, command: str) -> None:
    assert command_of(wrapped(agent, command)) == command


@pytest.mark.parametrize("command", COMMANDS)
def test_a_sandbox_is_seen_through(command: str) -> None:
    inner = wrapped("claude", command)
    srt = (
        "{ socat TCP6-LISTEN:3128,fork UNIX-CONNECT:/tmp/x.sock; } >/dev/null 2>&1 &\n"
        "trap 'rc=$?; exit $rc' EXIT\nARGV0=apply-seccomp /proc/self/fd/3 /bin/bash -c "
        + shlex.quote("exec 3<&- || exit 126; " + inner[2])
    )
    bwrap = ["bwrap", "--new-session", "--unshare-pid", "--", "/bin/bash", "-c", srt]
    assert command_of(["/bin/bash", "-c", srt]) == command
    assert command_of(bwrap) == command
    assert command_of(["/bin/sh", "-c", shlex.join(bwrap)]) == command


def test_a_shell_that_the_model_asked_for_stays() -> None:
    assert command_of(["sh", "-lc", "bash -c 'echo a'"]) == "bash -c 'echo a'"
    assert command_of(["python3", "-c", "print(1)"]) == "python3 -c 'print(1)'"
    assert command_of(["bash", "script.sh", "-c"]) == "bash script.sh -c"
    assert command_of([]) == ""


@given(st.lists(st.text(), max_size=6))
@settings(max_examples=300)
def test_no_command_line_is_too_strange(argv: list[str]) -> None:
    assert isinstance(command_of(argv), str)


@given(st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8")))
@settings(max_examples=300)
def test_any_command_comes_out_of_what_claude_and_codex_make(command: str) -> None:
    stripped = command.strip()
    for agent in ("claude", "codex"):
        assert command_of(wrapped(agent, stripped or ":")) == (stripped or ":")


def test_a_long_command_is_known_by_its_head() -> None:
    long = "echo " + "x" * (2 * COMMAND_CHARS_MAX)
    assert kept(long).endswith(CUT) and is_same(long, kept(long))
    assert not is_same("echo " + "y" * (2 * COMMAND_CHARS_MAX), kept(long))
    assert not is_same("echo", kept(long))


def test_a_short_command_is_known_as_a_whole() -> None:
    assert is_same(" make all\n", "make all")
    assert not is_same("make all", "make")
    assert not is_same("make", "make" + CUT)


@pytest.mark.parametrize(
    "script",
    [
        "apply-seccomp " + "'/" * 32_000,
        "apply-seccomp " + "''" * 32_000,
        "_bgpids_file=" * 5_000,
        "shell-snapshots/; eval " + '"' + "\\\\" * 32_000,
        "shell-snapshots/; eval " + "a''" * 20_000,
    ],
)
def test_no_script_takes_long(script: str) -> None:
    began_s = time.thread_time()
    command_of(["bash", "-c", script])
    command_of(["'"] * 32_000)
    assert time.thread_time() - began_s < 0.1


def test_sandboxes_in_one_another_without_end() -> None:
    assert command_of(["bwrap", "--"] * 7_000).startswith("bwrap -- bwrap")
