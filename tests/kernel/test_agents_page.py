"""The three lines of docs/agents.md for each agent, run as they are printed, with programs of the
agents' names that look whether the hook is there; tests/agents runs the real ones."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from agentcgroup.cli.agents import AGENTS
from tests.harness import EXEC, ROOT, DaemonProcess

PAGE = (ROOT / "docs/agents.md").read_text()
BIN = Path(EXEC).parent
LINES = re.findall(r"^```sh\n(.*?)^```$", PAGE.partition("\n## The hook")[0], re.M | re.S)
AGENT = """#!/bin/sh
grep -rq 'agentcg' "$HOME/.claude" "$HOME/.codex" "$HOME/.gemini" "$HOME/.config/opencode" \\
    .openhands 2> /dev/null && echo the hook is there
grep -q '/work.*/agent' /proc/self/cgroup && echo in a session
test "$SHELL" = "$(command -v agentcg-sh)" && "$SHELL" -c 'cat /proc/self/cgroup'
exit 0
"""


def test_there_are_three_lines_for_each_agent() -> None:
    assert [block.split()[2] for block in LINES] == list(AGENTS)
    assert all(len(block.strip().split("\n")) == 3 for block in LINES)


@pytest.mark.parametrize("lines", LINES, ids=AGENTS)
def test_the_three_lines_run(daemon: DaemonProcess, tmp_path: Path, lines: str) -> None:
    programs, home = tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    for name in AGENTS:
        (programs / name).write_text(AGENT)
        (programs / name).chmod(0o755)
    # Where the pool is limited, it may have less than what the page gives to a session.
    lines = lines.replace("--memory-max 4G", "--memory-max 400M")
    # Root needs no sudo, and may have none. That takes PATH away, and knows users by name.
    accounts = tmp_path / "passwd"
    accounts.write_text(f"root:x:0:0::/root:/bin/sh\nsomebody:x:0:0::{home}:/bin/sh\n")
    sudo = f'sudo() {{ shift; HOME=/root PATH="{BIN}:/usr/bin:/bin" "$@"; }}\n'
    script = f'mount --bind "{accounts}" /etc/passwd\n{sudo}{lines}'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script],
        env={
            "HOME": str(home),
            "USER": "somebody",
            "AGENTCG_RUN_DIR": str(daemon.run_dir),
            "PATH": f"{programs}:{BIN}:{os.environ['PATH']}",
            "SHELL": "/bin/sh",
        },
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the hook is there" in done.stdout and "in a session" in done.stdout, done.stdout
    assert ("/call-" in done.stdout) == ("agentcg-sh" in lines)
    left = [path for path in home.rglob("*") if path.is_file()]
    assert left == []
