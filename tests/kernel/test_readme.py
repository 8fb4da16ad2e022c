"""What the README shows, done against a real daemon."""

from __future__ import annotations

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


@pytest.mark.controllers
def test_the_tour_runs_as_it_is_printed(daemon: DaemonProcess) -> None:
    (tour,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    path = f"{Path(FRONT).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", f'sudo() {{ "$@"; }}\n{tour}'],  # root needs none, and may have none
        env={**os.environ, "AGENTCG_RUN_DIR": str(daemon.run_dir), "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    verdicts = re.findall(r"\b(timeout|oom_call|ok)\b", done.stdout)
    assert sorted(set(verdicts)) == ["ok", "oom_call", "timeout"], done.stdout
    assert not (daemon.cgroup_dir / "demo").exists(), "the session is closed with its command"


@pytest.mark.parametrize("path", re.findall(r"\((docs/[a-z]+\.md)\)|`([a-z_/]+\.py)`", README))
def test_what_the_readme_points_to_is_there(path: tuple[str, str]) -> None:
    document, module = path
    target = ROOT / document if document else ROOT / "daemon/agentcgroupd" / module
    assert target.is_file()
