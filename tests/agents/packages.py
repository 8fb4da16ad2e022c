"""The agents' packages at their pinned versions, installed once, and how each is run without a
question to anybody against a scripted model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.containers.root import bootstrap

WHERE = Path(os.environ.get("AGENTCG_AGENTS_DIR") or Path.home() / ".cache/agentcgroup/agents")
FROM_NPM = {
    "claude": "@anthropic-ai/claude-code@2.1.332",
    "codex": "@openai/codex@0.171.0",
    "gemini": "@google/gemini-cli@0.61.0",
    "opencode": "opencode-ai@1.18.33",
}
OPENCODE_PLUGIN = "@opencode-ai/plugin@1.18.33"
"""What opencode installs into a directory of its settings before it loads a plugin from there."""
FROM_PYPI = {
    "mini-swe-agent": "mini-swe-agent==2.4.6",
    "swe-rex": "swe-rex==1.4.0",
    "aider-chat": "aider-chat==0.86.2",
}

OPENHANDS = ("openhands-sdk==1.58.2", "openhands-tools==1.58.2")
"""Packages that need Python 3.12, so they are put into a root of Debian 13, with tmux."""
DEBIAN = ("python3", "python3-venv", "tmux", "git", "ca-certificates", "procps")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
ENTER = """
root=$1 work=$2
shift 2
mount --bind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
while [ "$1" != -- ]; do
    mkdir -p "$root$1"
    mount --bind "$1" "$root$1"
    shift
done
shift
exec chroot "$root" sh -c 'cd "$1" && shift && exec "$@"' sh "$work" "$@"
"""
OPENHANDS_AGENT = """
import os, sys
from openhands.sdk import LLM, Agent, Conversation, Tool
from openhands.sdk.hooks import HookConfig
from openhands.tools.terminal import TerminalTool

llm = LLM(model="openai/scripted", base_url=os.environ["MODEL_URL"] + "/v1", api_key="x")
tool = Tool(name=TerminalTool.name, params={"terminal_type": sys.argv[1]})
here = os.getcwd()
conversation = Conversation(
    agent=Agent(llm=llm, tools=[tool]),
    workspace=here,
    hook_config=HookConfig.load(working_dir=here),
    visualizer=None,
)
conversation.send_message("go")
conversation.run()
for event in conversation.state.events:
    if event.__class__.__name__ == "HookExecutionEvent":
        print("hook:", event.exit_code, event.stdout)
"""


def from_npm() -> Path:
    """Return the directory of the agents' programs from npm."""
    _install(WHERE, *FROM_NPM.values())
    return WHERE / "node_modules/.bin"


def _install(where: Path, *packages: str) -> None:
    """Install packages from npm, unless they are there."""
    found = where / "node_modules"
    if any(_npm_version(found / name) != version for name, version in map(_parts, packages)):
        where.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(where)]
        subprocess.run([*command, *packages], check=True, timeout=380)


def _parts(package: str) -> tuple[str, str]:
    name, _, version = package.rpartition("@")
    return name, version


def _npm_version(package: Path) -> str:
    try:
        return str(json.loads((package / "package.json").read_text())["version"])
    except FileNotFoundError:
        return ""


def from_pypi(name: str) -> Path:
    """Return the directory of an agent's programs from PyPI, in an environment of its own."""
    where = WHERE / "py" / name
    done = where / "installed"
    if not done.exists() or done.read_text() != FROM_PYPI[name]:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(where)], check=True)
        pip = [str(where / "bin/pip"), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, FROM_PYPI[name]], check=True, timeout=380)
        done.write_text(FROM_PYPI[name])
    return where / "bin"


def openhands(
    terminal: str, home: Path, work: Path, url: str, *seen: Path
) -> tuple[list[str], dict[str, str]]:
    """Return the command line of OpenHands with one of its terminals, `tmux` or `subprocess`, and
    the variables that it needs. `seen`: directories that it sees besides these two."""
    root = WHERE / "trixie"
    done = root / "opt/openhands/installed"
    if not done.exists() or done.read_text() != " ".join(OPENHANDS):
        if not (root / "usr/bin/tmux").exists():
            WHERE.mkdir(parents=True, exist_ok=True)
            bootstrap("trixie", root, DEBIAN)
        for file in (Path("/etc/resolv.conf"), CERTIFICATES):
            shutil.copy(file, root / file.relative_to("/"))
        inside = ["chroot", str(root)]
        subprocess.run([*inside, "python3", "-m", "venv", "--clear", "/opt/openhands"], check=True)
        pip = ["/opt/openhands/bin/pip", "install", "--quiet", "--disable-pip-version-check", "uv"]
        subprocess.run([*inside, *pip], check=True, timeout=180)
        # It finds versions that fit each other in seconds, where pip takes more than six minutes.
        uv = ["/opt/openhands/bin/uv", "pip", "install", "--quiet"]
        python = ["--python", "/opt/openhands/bin/python3"]
        subprocess.run([*inside, *uv, *python, *OPENHANDS], check=True, timeout=380)
        done.write_text(" ".join(OPENHANDS))
    places = [str(path) for path in (home, work, *seen)]
    argv = ["unshare", "--mount", "sh", "-ec", ENTER, "sh", str(root), str(work), *places, "--"]
    argv += ["/opt/openhands/bin/python", "-c", OPENHANDS_AGENT, terminal]
    env = {"MODEL_URL": url, "TMUX_TMPDIR": str(work), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return argv, env


def command_line(
    agent: str, programs: Path, home: Path, url: str
) -> tuple[list[str], dict[str, str]]:
    """Return the command line of an agent from npm, and the variables that it needs; writes its
    settings below `home`."""
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
    if agent == "opencode":
        return [program, "run", "go"], _opencode(home, url)
    (home / ".gemini").mkdir()
    settings = {"security": {"auth": {"selectedType": "gemini-api-key"}}}
    (home / ".gemini/settings.json").write_text(json.dumps(settings))
    env = {
        "GEMINI_API_KEY": "x",
        "GOOGLE_GEMINI_BASE_URL": url,
        "GEMINI_CLI_TRUST_WORKSPACE": "true",
    }
    return [program, "-m", "gemini-2.5-flash", "--yolo", "-p", "go"], env


def _opencode(home: Path, url: str) -> dict[str, str]:
    _install(WHERE / "opencode", OPENCODE_PLUGIN)
    shutil.copytree(WHERE / "opencode", home / ".config/opencode", symlinks=True)
    config: dict[str, Any] = {
        "model": "scripted/m",
        "small_model": "scripted/m",
        "autoupdate": False,
        "share": "disabled",
        "permission": "allow",
    }
    provider: dict[str, Any] = {"npm": "@ai-sdk/openai-compatible", "name": "scripted"}
    provider["options"] = {"baseURL": f"{url}/v1", "apiKey": "x"}
    provider["models"] = {"m": {"name": "m", "tool_call": True}}
    config["provider"] = {"scripted": provider}
    file = home / "opencode.json"
    file.write_text(json.dumps(config))
    return {"OPENCODE_CONFIG": str(file), "OPENCODE_DISABLE_MODELS_FETCH": "1"}
