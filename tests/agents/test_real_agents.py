"""The real agents, at pinned versions, against a scripted model: what `agentcg setup` writes makes
the model hear what became of its command. Opt-in, because the packages are large:

    make test-integrations AGENTS=1
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents.model import Model
from tests.agents.packages import FROM_NPM, command_line, from_npm, openhands
from tests.harness import EXEC, DaemonProcess

FRONT = str(Path(EXEC).with_name("agentcg"))
RUN = """
done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=cwd, timeout=150,
                      stdin=subprocess.DEVNULL)
result = (done.returncode, done.stdout[-3000:], done.stderr[-3000:])
"""

pytestmark = [
    pytest.mark.full_speed,
    pytest.mark.timeout(300),
    pytest.mark.skipif("AGENTCG_AGENTS" not in os.environ, reason="set AGENTCG_AGENTS=1"),
]


@pytest.fixture(scope="module")
def programs() -> Path:
    """The directory of the agents' programs from npm."""
    return from_npm()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    running = DaemonProcess(tmp_path_factory.mktemp("d"))
    try:
        running.start()
        yield running
    finally:
        running.close()


@pytest.mark.parametrize("agent", FROM_NPM)
def test_the_model_hears_what_became_of_its_command(
    daemon: DaemonProcess, programs: Path, tmp_path: Path, agent: str
) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    base = {"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "dumb", "LANG": "C.UTF-8"}
    base["AGENTCG_RUN_DIR"] = str(daemon.run_dir)
    with Model(f"{FRONT} exec --quiet --timeout 300ms -- sleep 1000; echo over") as model:
        argv, env = command_line(agent, programs, home, model.url)
        subprocess.run([FRONT, "setup", agent], env=base, check=True, cwd=work, stdout=2)
        session = daemon.open(f"real-{agent}")
        done = session.run(RUN, argv=argv, env={**base, **env}, cwd=str(work))
    assert model.told, (done, model.tools)
    said = json.loads(model.told[-1])
    heard = said.get("contents") or said.get("messages") or said.get("input")
    assert "was ended at its timeout of 300 ms" in json.dumps(heard), json.dumps(heard)[-3000:]
    log = home / ".local/state/agentcgroup/hook.log"
    assert not log.exists(), log.read_text()


AFTER_A_TOOL = """
import json
print(json.dumps({"additionalContext": "heard after a tool", "reason": "heard after a tool"}))
"""


def test_openhands_model_hears_before_it_stops_what_it_does_not_after_a_tool(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    base = {"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "dumb", "LANG": "C.UTF-8"}
    base["AGENTCG_RUN_DIR"] = str(daemon.run_dir)
    setup = [FRONT, "setup", "openhands", "--project"]
    subprocess.run(setup, env=base, check=True, cwd=work, stdout=2)
    # What any hook says after a tool goes nowhere: if that changes, ours is to be one of them.
    script = work / "after.py"
    script.write_text(AFTER_A_TOOL)
    settings = work / ".openhands/hooks.json"
    hooks = json.loads(settings.read_text())
    after = {"type": "command", "command": f"python3 {script}", "timeout": 10}
    hooks["hooks"]["PostToolUse"] = [{"matcher": "*", "hooks": [after]}]
    settings.write_text(json.dumps(hooks))
    with Model(f"{FRONT} exec --quiet --timeout 300ms -- sleep 1000; echo over") as model:
        seen = (Path(FRONT).parent, daemon.run_dir)
        argv, env = openhands("tmux", home, work, model.url, *seen)
        session = daemon.open("real-openhands")
        done = session.run(RUN, argv=argv, env={**base, **env}, cwd=str(work))
    assert "hook: 0 " in done[1] and "heard after a tool" in done[1], done
    assert not any("heard after a tool" in told for told in model.told), "docs/agents.md says so"
    heard = ["was ended at its timeout of 300 ms" in told for told in model.told]
    assert len(heard) >= 2 and heard[-1] and not heard[0], (heard, done)
    log = home / ".local/state/agentcgroup/hook.log"
    assert not log.exists(), log.read_text()
