"""`agentcg hook` against a daemon that answers as a test wants it to, and against any input."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentcgroup.cli.agents import HOOKED
from tests.hook_inputs import AGENTS, after_tool, before_stop, before_tool, text
from tests.unit.sdk.test_launcher import Daemon, Handler, daemon, reply

BIN = Path(__file__).resolve().parents[3] / "build/bin"
CLI = Path(sys.executable).with_name("agentcg-cli")
SAID = b'OK\0call=c1\0verdict=timeout\0say=It was too "slow".\0say=Do less.\0'
WORTH_A_CALL = "make all"


class Hook:
    """The hook with a directory of its own for the daemon's socket and its log."""

    def __init__(self, directory: Path) -> None:
        self.run_dir, self.log = directory, directory / "log"
        self.socket = directory / "agent/attach.sock"

    def run(self, agent: str, said: dict[str, Any] | bytes, **env: str) -> bytes:
        """Run it with an input; returns what it wrote to the model. It never fails."""
        data = said if isinstance(said, bytes) else text(said).encode()
        given = {"AGENTCG_RUN_DIR": str(self.run_dir), "AGENTCG_HOOK_LOG": str(self.log), **env}
        done = subprocess.run(
            [BIN / "agentcg", "hook", agent],
            input=data,
            capture_output=True,
            env={**os.environ, **given},
            timeout=30,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    return Hook(tmp_path)


def keys(it: Daemon) -> dict[bytes, bytes]:
    return it.keys


@pytest.mark.parametrize("agent", AGENTS)
def test_what_became_of_a_tool_is_told(hook: Hook, agent: str) -> None:
    with daemon(hook.socket, reply(SAID)) as it:
        out = json.loads(hook.run(agent, after_tool(agent, WORTH_A_CALL, "id-7")))
    event = "AfterTool" if agent == "gemini" else "PostToolUse"
    told = 'agentcgroup: It was too "slow". Do less.'
    assert out == {"hookSpecificOutput": {"hookEventName": event, "additionalContext": told}}
    assert it.requests[0][:2] == [b"ACG1", b"told"]
    expected = {b"command": WORTH_A_CALL.encode()}
    if agent != "gemini":
        expected[b"tool_use_id"] = b"id-7"
    assert keys(it) == expected


def test_a_failure_of_claude_has_an_event_of_its_own(hook: Hook) -> None:
    with daemon(hook.socket, reply(SAID)):
        out = json.loads(hook.run("claude", after_tool("claude", "x", failed=True)))
    assert out["hookSpecificOutput"]["hookEventName"] == "PostToolUseFailure"


@pytest.mark.parametrize("agent", AGENTS)
def test_nothing_is_in_the_way_before_a_tool(hook: Hook, agent: str) -> None:
    with daemon(hook.socket, reply(SAID)) as it:
        assert hook.run(agent, before_tool(agent, "rm -rf /")) == b""
    assert it.requests == []


def test_tools_without_a_command_and_in_the_background_are_not_asked_about(hook: Hook) -> None:
    read = {**after_tool("claude", ""), "tool_name": "Read", "tool_input": {"file_path": "/x"}}
    started = after_tool("claude", "sleep 30")
    started["tool_response"]["backgroundTaskId"] = "b1"
    with daemon(hook.socket, reply(SAID)) as it:
        assert hook.run("claude", read) == hook.run("claude", started) == b""
    assert it.requests == []


@pytest.mark.parametrize("answer", [b"OK\0", b"ERR\0PERMISSION_DENIED\0no session\0", b"?", b""])
def test_where_there_is_nothing_to_tell_it_is_silent(hook: Hook, answer: bytes) -> None:
    with daemon(hook.socket, reply(answer) if answer else lambda conn, request: None):
        assert hook.run("codex", after_tool("codex", "true")) == b""


def test_without_a_daemon_it_is_silent_and_logs_nothing(hook: Hook) -> None:
    assert hook.run("claude", after_tool("claude", "true")) == b""
    assert not hook.log.exists()


def test_a_daemon_that_does_not_answer_holds_nobody_up(hook: Hook) -> None:
    def wait(conn: socket.socket, request: bytes) -> None:
        conn.settimeout(10)
        conn.recv(1)  # until the hook hangs up

    began = time.monotonic()
    with daemon(hook.socket, wait):
        assert hook.run("claude", after_tool("claude", "true")) == b""
    assert time.monotonic() - began < 5
    assert "did not answer" in hook.log.read_text()


def test_text_of_any_kind_arrives(hook: Hook) -> None:
    command = 'echo "\\u00e9 \U0001f600 \x01" \t é \u2028'
    with daemon(hook.socket, reply(SAID)) as it:
        hook.run("claude", after_tool("claude", command))
        hook.run("claude", after_tool("claude", "x" * 100_000))
        raw = json.dumps(after_tool("claude", command), ensure_ascii=False)
        hook.run("claude", raw.encode())
    sent = [dict(w.split(b"=", 1) for w in r[2:])[b"command"] for r in it.requests]
    assert sent == [command.encode(), b"x" * 8192, command.encode()]


BROKEN = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b'{"hook_event_name":7}',
    b'{"hook_event_name":"PostToolUse"}',
    b'{"hook_event_name":"PostToolUse","tool_input":"x"}',
    b'{"hook_event_name":"PostToolUse","tool_input":{"command":["a"]}}',
    b'{"hook_event_name":"PostToolUse","tool_input":{"command":"a"}} and more',
    b'{"hook_event_name":"PostToolUse","tool_input":{"command":"\\ud800"}',
    b'{"a":' * 100_000,
    b"[" * 1_000_000,
    b'{"a":"\\u12"}',
    b'{"a" 1}',
    b"\xff\xfe\x00",
    b'"' + b"x" * (9 << 20),
)


@pytest.mark.parametrize("agent", HOOKED)
@pytest.mark.parametrize("data", BROKEN, ids=range(len(BROKEN)))
def test_broken_input_never_breaks_the_tool(hook: Hook, agent: str, data: bytes) -> None:
    assert hook.run(agent, data) == b""


def test_broken_input_is_logged_and_the_log_is_bounded(hook: Hook) -> None:
    hook.run("claude", b"{")
    assert "no JSON object, of 1 bytes" in hook.log.read_text()
    hook.log.write_bytes(b"x" * (300 << 10))
    hook.run("claude", b"{")
    assert hook.log.stat().st_size < 300 << 10
    target = hook.run_dir / "precious"
    target.write_text("kept")
    hook.log.unlink()
    hook.log.symlink_to(target)
    hook.run("claude", b"{")
    assert target.read_text() == "kept"


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda c: (
            st.lists(c)
            | st.dictionaries(
                st.sampled_from(["hook_event_name", "tool_input", "command", "tool_response", "x"]),
                c,
            )
        ),
        max_leaves=20,
    ).map(lambda v: json.dumps(v).encode())
)
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_input_at_all_is_survived(hook: Hook, data: bytes) -> None:
    assert hook.run("claude", data) == b""


def test_a_full_disk_is_named(hook: Hook, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", full], check=True)
    try:
        said = after_tool("claude", "cp a b", failed=True, cwd=str(full))
        out = json.loads(hook.run("claude", said))
        assert (
            f"The file system of {full} is full" in out["hookSpecificOutput"]["additionalContext"]
        )
        assert hook.run("claude", after_tool("claude", "cp a b", cwd=str(full))) == b""
    finally:
        subprocess.run(["umount", full], check=True)


@pytest.mark.parametrize("event", ["Stop", "UserPromptSubmit"])
def test_openhands_is_told_of_all_and_goes_on_where_it_was_about_to_stop(
    hook: Hook, event: str
) -> None:
    with daemon(hook.socket, reply(SAID)) as it:
        out = json.loads(hook.run("openhands", before_stop(event)))
    assert out.pop("decision", "") == ("deny" if event == "Stop" else "")
    assert out == {"additionalContext": 'agentcgroup: It was too "slow". Do less.'}
    assert keys(it) == {b"all": b"1"} | ({b"stops": b"1"} if event == "Stop" else {})


def test_openhands_stops_where_there_is_nothing_to_tell(hook: Hook) -> None:
    with daemon(hook.socket, reply(b"OK\0")):
        assert hook.run("openhands", before_stop("Stop")) == b""
        assert hook.run("openhands", before_stop("PostToolUse")) == b""
    assert hook.run("openhands", b"{") == hook.run("openhands", before_stop("Stop")) == b""


@pytest.mark.parametrize(
    "arguments", [["vim"], [], ["claude", "codex"], ["--frob", "claude"]], ids=" ".join
)
@pytest.mark.parametrize("front", ["agentcg", "agentcg-hook"])
def test_wrong_usage_is_no_word_to_the_model_and_stops_nothing(
    front: str, arguments: list[str]
) -> None:
    words = ["hook"] if front == "agentcg" else []
    done = run([BIN / front, *words, *arguments])
    assert (done.returncode, done.stdout) == (1, "") and "|".join(HOOKED) in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["hook"],
        ["hook", "vim"],
        ["hook", "claude", "codex"],
        ["hook", "--frob", "claude"],
        ["--json", "hook", "claude"],
        ["--frob", "hook", "openhands"],
    ],
    ids=" ".join,
)
def test_the_python_command_stops_nothing_either(arguments: list[str]) -> None:
    done = run([CLI, *arguments])
    assert (done.returncode, done.stdout) == (1, "") and done.stderr


@pytest.mark.parametrize("agent", HOOKED)
def test_the_python_command_knows_the_same_agents(hook: Hook, agent: str) -> None:
    said = before_stop("Stop") if agent == "openhands" else after_tool(agent, WORTH_A_CALL)
    with daemon(hook.socket, reply(SAID)):
        env = {"AGENTCG_RUN_DIR": str(hook.run_dir), "AGENTCG_HOOK_LOG": str(hook.log)}
        done = run([CLI, "hook", agent], text(said), **env)
    assert (done.returncode, done.stderr) == (0, "") and "Do less." in done.stdout


def run(argv: list[str | Path], said: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command; how it ended and what it wrote."""
    env = {**os.environ, **env}
    return subprocess.run(argv, input=said, capture_output=True, text=True, env=env, check=False)


def serve(handle: Handler, hook: Hook) -> float:
    """Median seconds of a hook with an answer of the daemon."""
    took = []
    with daemon(hook.socket, handle):
        for _ in range(20):
            began = time.monotonic()
            hook.run("claude", after_tool("claude", WORTH_A_CALL))
            took.append(time.monotonic() - began)
    return statistics.median(took)


@pytest.mark.full_speed
def test_it_takes_less_than_20_ms(hook: Hook) -> None:
    assert serve(reply(SAID), hook) < 0.020
