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
