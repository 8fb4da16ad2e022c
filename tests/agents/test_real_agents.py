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
from tests.harness import EXEC, DaemonProcess

PACKAGES = {
    "claude": "@anthropic-ai/claude-code@2.1.332",
    "codex": "@openai/codex@0.171.0",
    "gemini": "@google/gemini-cli@0.61.0",
}
WHERE = Path(os.environ.get("AGENTCG_AGENTS_DIR") or Path.home() / ".cache/agentcgroup/agents")
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
    """The directory of the agents' programs, installed once."""
    WHERE.mkdir(parents=True, exist_ok=True)
    found = WHERE / "node_modules"
    if not all((found / package.rpartition("@")[0]).exists() for package in PACKAGES.values()):
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(WHERE)]
        subprocess.run([*command, *PACKAGES.values()], check=True, timeout=280)
    return found / ".bin"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    running = DaemonProcess(tmp_path_factory.mktemp("d"))
    try:
        running.start()
        yield running
    finally:
        running.close()


def command_line(
    agent: str, programs: Path, home: Path, url: str
) -> tuple[list[str], dict[str, str]]:
    """How an agent is run without a question to anybody, and the variables that it needs."""
    program = str(programs / agent)
    if agent == "claude":
        env = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "x", "IS_SANDBOX": "1"}
        env |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
        return [program, "-p", "go", "--dangerously-skip-permissions"], env
    if agent == "codex":
        (home / ".codex").mkdir(exist_ok=True)
        (home / ".codex/config.toml").write_text(
            'model = "gpt-5-codex"\nmodel_provider = "scripted"\napproval_policy = "never"\n'
            f'[model_providers.scripted]\nname = "scripted"\nbase_url = "{url}/v1"\n'
            'wire_api = "responses"\nenv_key = "OPENAI_API_KEY"\nrequest_max_retries = 1\n'
        )
        options = ["--skip-git-repo-check", "--dangerously-bypass-hook-trust"]
        full = ["-s", "danger-full-access"]
        return [program, "exec", *options, *full, "go"], {"OPENAI_API_KEY": "x"}
    env = {
        "GEMINI_API_KEY": "x",
        "GOOGLE_GEMINI_BASE_URL": url,
        "GEMINI_CLI_TRUST_WORKSPACE": "true",
    }
    return [program, "-m", "gemini-2.5-flash", "--yolo", "-p", "go"], env


@pytest.mark.parametrize("agent", PACKAGES)
def test_the_model_hears_what_became_of_its_command(
    daemon: DaemonProcess, programs: Path, tmp_path: Path, agent: str
) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    base = {"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "dumb", "LANG": "C.UTF-8"}
    base["AGENTCG_RUN_DIR"] = str(daemon.run_dir)
    if agent == "gemini":
        settings = {"security": {"auth": {"selectedType": "gemini-api-key"}}}
        (home / ".gemini").mkdir()
        (home / ".gemini/settings.json").write_text(json.dumps(settings))
    subprocess.run([FRONT, "setup", agent], env=base, check=True, cwd=work, stdout=2)
    with Model(f"{FRONT} exec --quiet --timeout 300ms -- sleep 1000; echo over") as model:
        argv, env = command_line(agent, programs, home, model.url)
        session = daemon.open(f"real-{agent}")
        done = session.run(RUN, argv=argv, env={**base, **env}, cwd=str(work))
    assert model.told, (done, model.tools)
    said = json.loads(model.told[-1])
    heard = said.get("contents") or said.get("messages") or said.get("input")
    assert "was ended at its timeout of 300 ms" in json.dumps(heard), json.dumps(heard)[-3000:]
    log = home / ".local/state/agentcgroup/hook.log"
    assert not log.exists(), log.read_text()
