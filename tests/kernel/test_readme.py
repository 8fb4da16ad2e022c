"""What the README shows, done against a real daemon."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.harness import EXEC, ROOT, AgentProcess, DaemonProcess

README = (ROOT / "README.md").read_text()
FRONT = str(Path(EXEC).with_name("agentcg"))


def test_the_python_example_runs(agent: AgentProcess) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    code = "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n"
    code += "".join(f"    {line}\n" if line else "\n" for line in blocks[0].splitlines())
    said = agent.run(code + "result = out.getvalue()")
    assert said.startswith("hello\n") and "It ended well." in said


def test_the_tour_of_the_cli_runs(daemon: DaemonProcess) -> None:
    assert "agentcg session run web --memory-max 4G --priority important -- bash" in README
    limits = ["--memory-max", "4G", "--priority", "important"]
    pool = daemon.cgroup_dir / "memory.max"
    if not pool.exists() or int(pool.read_text()) < 4 << 30:
        limits = limits[2:]  # a smaller machine than the reader's
    inside = f"{FRONT} exec --memory-max 2G --timeout 10m -- true && {FRONT} report --json"
    done = subprocess.run(
        [FRONT, "session", "run", "web", *limits, "--", "sh", "-c", f"{inside} && {FRONT} budget"],
        env={**os.environ, "AGENTCG_RUN_DIR": str(daemon.run_dir)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report, end = json.JSONDecoder().raw_decode(done.stdout)
    assert (report["verdict"], report["name"], report["session_id"]) == ("ok", "true", "web")
    assert "cores" in done.stdout[end:]
    assert not (daemon.cgroup_dir / "web").exists(), "the session is closed with its command"


@pytest.mark.parametrize("path", re.findall(r"\((docs/[a-z]+\.md)\)|`([a-z_/]+\.py)`", README))
def test_what_the_readme_points_to_is_there(path: tuple[str, str]) -> None:
    document, module = path
    target = ROOT / document if document else ROOT / "daemon/agentcgroupd" / module
    assert target.is_file()
