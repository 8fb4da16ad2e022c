"""What an agent's hook is told of the calls of its session, by a real daemon: the right call, once,
whatever else is running."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.features import load
from tests.harness import EXEC, AgentProcess, DaemonProcess, wait_until
from tests.hook_inputs import AGENTS, after_tool, before_stop, text, wrapped

FRONT = str(Path(EXEC).with_name("agentcg"))
RUN = """
env = {**os.environ, **more}
done = subprocess.run(argv, capture_output=True, text=True, env=env, input=said)
result = (done.returncode, done.stdout, done.stderr)
"""


def run(agent: AgentProcess, *argv: str, said: str = "", **env: str) -> tuple[int, str, str]:
    """Run a command as a child of the agent."""
    status, out, error = agent.run(RUN, argv=list(argv), more=env, said=said)
    return int(status), str(out), str(error)


def told(agent: AgentProcess, dialect: str, command: str, tool_use_id: str = "") -> str:
    """What the hook tells the model of a command; empty: nothing."""
    said: dict[str, Any] = after_tool(dialect, command, tool_use_id)
    status, out, error = run(agent, FRONT, "hook", dialect, said=text(said))
    assert (status, error) == (0, "")
    return str(json.loads(out)["hookSpecificOutput"]["additionalContext"]) if out else ""


def declared(agent: AgentProcess, script: str, *options: str, **env: str) -> int:
    """Run a script in a call that is declared, without a word on stderr."""
    return run(agent, FRONT, "exec", "--quiet", *options, "--", "bash", "-c", script, **env)[0]


def report(daemon: DaemonProcess, session: str = "alpha") -> pb.Report:
    """The newest report of a session."""
    wait_until("all calls have ended", lambda: not daemon.call_dirs())
    return daemon.admin.ListReports(pb.ListReportsRequest(session_id=session, limit=1)).reports[0]


@pytest.mark.parametrize("dialect", AGENTS)
def test_the_command_finds_its_report_and_it_is_told_once(
    agent: AgentProcess, dialect: str
) -> None:
    command = f"sleep 1000 # {dialect}"
    declared(agent, command, "--timeout", "200ms")
    declared(agent, "true")
    said = told(agent, dialect, command)
    assert "was ended at its timeout of 200 ms" in said and "timeout=1s" in said
    assert "agentcg exec --timeout 1s -- COMMAND" in said
    assert told(agent, dialect, command) == ""


def told_of_all(agent: AgentProcess, event: str) -> dict[str, Any]:
    """What OpenHands' hook says at one of its events; empty: nothing."""
    status, out, error = run(agent, FRONT, "hook", "openhands", said=text(before_stop(event)))
    assert (status, error) == (0, "")
    return dict(json.loads(out)) if out else {}


def test_an_agent_that_hears_nothing_after_a_tool_hears_of_all_before_it_stops(
    agent: AgentProcess,
) -> None:
    told_of_all(agent, "UserPromptSubmit")
    declared(agent, "exit 3")
    for number in range(2):
        declared(agent, f"sleep 200{number}", "--timeout", "200ms")
    assert told_of_all(agent, "PostToolUse") == {}
    said = told_of_all(agent, "Stop")
    assert said["decision"] == "deny"
    first, _, second = said["additionalContext"].partition("sleep 2001")
    assert "sleep 2000`: " in first and "its timeout of 200 ms" in first and "exit 3" not in first
    assert "its timeout of 200 ms" in second
    assert told_of_all(agent, "Stop") == told_of_all(agent, "UserPromptSubmit") == {}
    declared(agent, "sleep 2002", "--timeout", "200ms")
    said = told_of_all(agent, "UserPromptSubmit")
    assert said.keys() == {"additionalContext"} and "sleep 2002" in said["additionalContext"]


def test_what_was_told_after_a_tool_is_not_told_again_with_all(agent: AgentProcess) -> None:
    declared(agent, "sleep 2003", "--timeout", "200ms")
    assert told(agent, "claude", "sleep 2003") != ""
    assert told_of_all(agent, "Stop") == {}


def test_what_went_well_and_what_failed_by_itself_is_not_spoken_of(agent: AgentProcess) -> None:
    declared(agent, "exit 3")
    declared(agent, "echo all is well")
    for command in ("exit 3", "echo all is well", "never run"):
        assert told(agent, "claude", command) == ""


def test_the_tool_calls_id_goes_before_the_command(agent: AgentProcess) -> None:
    for number in (1, 2):
        options = ("--timeout", f"{number}00ms")
        declared(agent, "sleep 1001", *options, CODEX_TOOL_CALL_ID=f"call_{number}")
    assert "timeout of 100 ms" in told(agent, "codex", "sleep 1001", "call_1")
    assert "timeout of 200 ms" in told(agent, "codex", "sleep 1001", "call_2")
    assert told(agent, "codex", "sleep 1001", "call_1") == ""


def test_a_call_that_goes_on_is_not_told_of(agent: AgentProcess) -> None:
    code = (
        "process = subprocess.Popen([front, 'exec', '--quiet', '--', 'bash', '-c', 'sleep 1002'])\n"
        "while not agent.calls() or str(agent.calls()[-1].state) != 'running': time.sleep(0.01)\n"
        "result = agent.calls()[-1].id"
    )
    call_id = agent.run(code, front=FRONT)
    assert told(agent, "claude", "sleep 1002") == ""
    agent.run("agent.end_call(call); process.wait()", call=call_id)
    assert "ended while running: its agent ended the call" in told(agent, "claude", "sleep 1002")


def test_a_hook_of_another_session_is_told_nothing(
    agent: AgentProcess, other: AgentProcess
) -> None:
    declared(agent, "sleep 1003", "--timeout", "100ms")
    assert told(other, "claude", "sleep 1003") == ""
    assert told(agent, "claude", "sleep 1003") != ""


def test_a_tool_hears_only_of_calls_inside_its_own(agent: AgentProcess) -> None:
    declared(agent, "sleep 1004", "--timeout", "100ms")
    hook = (
        f"printf %s {json.dumps(text(after_tool('claude', 'sleep 1004')))!r} | {FRONT} hook claude"
    )
    inside = run(agent, FRONT, "exec", "--quiet", "--", "bash", "-c", hook)
    assert inside == (0, "", "")
    assert told(agent, "claude", "sleep 1004") != ""


def test_an_old_report_is_not_taken_for_a_new_one(
    daemon: DaemonProcess, agent: AgentProcess
) -> None:
    declared(agent, "sleep 1005", "--timeout", "100ms")
    declared(agent, "sleep 1005", "--timeout", "200ms")
    assert "200 ms" in told(agent, "claude", "sleep 1005")


def test_outside_of_any_session_it_is_silent(daemon: DaemonProcess) -> None:
    done = subprocess.run(
        [FRONT, "hook", "claude"],
        input=text(after_tool("claude", "true")),
        capture_output=True,
        text=True,
        env={"AGENTCG_RUN_DIR": str(daemon.run_dir)},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.programs
@pytest.mark.parametrize("dialect", AGENTS)
def test_a_call_that_nobody_declared_is_found_by_the_models_own_words(
    daemon: DaemonProcess, agent: AgentProcess, dialect: str
) -> None:
    if load("lifecycle")[0] is None:
        pytest.skip("no lifecycle program here")
    command = f"{sys.executable} -c 'import time; time.sleep(1000)' # {dialect} " + "x" * 300
    code = (
        "process = subprocess.Popen(argv, env={**os.environ, 'CODEX_TOOL_CALL_ID': 'call_9'})\n"
        "while not agent.calls() or str(agent.calls()[-1].state) != 'running': time.sleep(0.01)\n"
        "agent.end_call(agent.calls()[-1].id); process.wait()"
    )
    agent.run(code, argv=wrapped(dialect, command))
    ended = report(daemon)
    assert (ended.tool_use_id, ended.observed) == ("call_9", True)
    # Of what Codex starts only the last of three programs may be there when it is looked at.
    assert ended.command == command or dialect == "codex"
    assert "its agent ended the call" in told(agent, dialect, command, "call_9")


@pytest.mark.programs
def test_a_declared_call_inside_a_shell_that_is_observed_is_told_with_it(
    agent: AgentProcess,
) -> None:
    if load("lifecycle")[0] is None:
        pytest.skip("no lifecycle program here")
    command = f"{FRONT} exec --quiet --timeout 1s -- sleep 1006; sleep 0.2; exit 9"
    run(agent, *wrapped("claude", command))
    assert "was ended at its timeout of 1 s" in told(agent, "claude", command)
