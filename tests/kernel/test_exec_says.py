"""What `agentcg exec` says of a call that got less than was asked for, or did not end by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import EXEC, AgentProcess, DaemonProcess

FRONT = str(Path(EXEC).with_name("agentcg"))
HOG = "held = bytearray(b'x' * (150 << 20)); print(len(held))"
KEPT = "sleep 1000 > /dev/null 2>&1 & exit 3"
RUN = """
done = subprocess.run([front, "exec", *argv], capture_output=True, text=True, env={**os.environ})
result = (done.returncode, done.stderr.splitlines())
"""


def run(agent: AgentProcess, *argv: str, **env: str) -> tuple[int, list[str]]:
    """Run `agentcg exec argv...` in the agent; returns its status, and what it said."""
    code = "".join(f"os.environ[{name!r}] = {value!r}\n" for name, value in env.items()) + RUN
    status, lines = agent.run(code, front=FRONT, argv=argv)
    return int(status), list(lines)


def test_a_timeout_is_said(agent: AgentProcess) -> None:
    status, (line,) = run(agent, "--timeout", "300ms", "sleep", "1000")
    assert status == -15
    assert line.startswith("agentcg exec: call ") and "was ended at its timeout of 300 ms" in line


def test_a_command_that_ends_by_itself_is_not_spoken_of(agent: AgentProcess) -> None:
    assert run(agent, "sh", "-c", "exit 3") == (3, [])
    assert run(agent, "sh", "-c", "kill -TERM $$") == (-15, [])
    assert run(agent, "true") == (0, [])


def test_an_end_by_others_is_said(daemon: DaemonProcess, agent: AgentProcess) -> None:
    code = (
        "process = subprocess.Popen([front, 'exec', 'sleep', '1000'], stderr=-1, text=True)\n"
        "while not agent.calls() or str(agent.calls()[-1].state) != 'running': time.sleep(0.01)\n"
        "agent.end_call(agent.calls()[-1].id)\n"
        "error = process.communicate()[1]\n"
        "result = (process.returncode, error)"
    )
    status, said = agent.run(code, front=FRONT)
    assert status == -9
    assert "was ended while running: its agent ended the call" in said


def test_quiet_says_nothing(agent: AgentProcess) -> None:
    assert run(agent, "--quiet", "--timeout", "300ms", "sleep", "1000") == (-15, [])


def test_a_call_inside_another_one_is_said_too(agent: AgentProcess) -> None:
    inner = f"{FRONT} exec --timeout 300ms sleep 1000; exit 5"
    status, lines = run(agent, "sh", "-c", inner)
    assert status == 5
    said = [line for line in lines if line.startswith("agentcg exec: call ")]
    assert len(said) == 1 and "timeout of 300 ms" in said[0]


def test_a_call_that_keeps_what_it_leaves_is_not_waited_for(agent: AgentProcess) -> None:
    status, lines = run(agent, "--leftovers", "keep", "sh", "-c", KEPT)
    assert (status, lines) == (3, [])
    agent.run("for call in agent.calls(): agent.end_call(call.id)")


def test_less_than_was_asked_for_is_said(agent: AgentProcess) -> None:
    status, lines = run(agent, "--priority", "important", "true")
    assert status == 0
    said = "priority: you asked for 80; this session has 50, which is what the call got."
    assert lines == [f"agentcg exec: warning: --{said}"]
    assert run(agent, "--quiet", "--priority", "important", "true") == (0, [])


def test_a_mistake_names_its_option_or_its_variable(agent: AgentProcess) -> None:
    status, (line,) = run(agent, "--memory-max", "lots", "true")
    assert status == 125 and line.startswith("agentcg exec: --memory-max: 'lots' cannot be used")
    code = "os.environ['AGENT_RESOURCE_HINT'] = 'memory:lots'\n" + RUN
    code += "del os.environ['AGENT_RESOURCE_HINT']"
    status, (line,) = agent.run(code, front=FRONT, argv=["true"])
    assert status == 125 and line.startswith("agentcg exec: $AGENT_RESOURCE_HINT: 'memory:lots' ")


def test_nobody_asks_how_calls_of_others_ended(agent: AgentProcess, other: AgentProcess) -> None:
    call_id = other.run("result = agent.tool_call('x').begin().id")
    answer = agent.run(f"result = packet('report', 'call={call_id}')")
    assert answer[:2] == ["ERR", "NOT_FOUND"]
    other.run(f"agent.end_call('{call_id}')")
    answer = agent.run(f"result = packet('report', 'call={call_id}')")
    assert answer[:2] == ["ERR", "NOT_FOUND"]
    assert other.run(f"result = packet('report', 'call={call_id}')")[0] == "OK"


@pytest.mark.controllers
def test_a_call_that_ran_out_of_memory_is_said(daemon: DaemonProcess) -> None:
    agent = daemon.open("hungry", memory_max="300M")
    status, lines = run(agent, "--memory-max", "60M", "python3", "-c", HOG)
    assert status == -9
    assert any("out of memory" in line or "memory" in line for line in lines), lines
    assert lines[-1].startswith("agentcg exec: call ")
    # A shell survives its child, and only passes on its status.
    status, lines = run(agent, "--memory-max", "60M", "sh", "-c", f'python3 -c "{HOG}"; exit $?')
    assert status != 0
    assert lines[-1].startswith("agentcg exec: call ") and "memory" in lines[-1]


@pytest.mark.controllers
def test_a_refused_process_is_said(daemon: DaemonProcess) -> None:
    agent = daemon.open("crowded")
    status, lines = run(
        agent, "--pids-max", "3", "sh", "-c", "for i in 1 2 3 4; do sleep 9 > /dev/null 2>&1 & done"
    )
    assert status != 0
    assert "Starting a process or thread was refused" in lines[-1]
