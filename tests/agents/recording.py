"""Records what SWE-ReX and aider, the real packages, start, byte by byte, for tests/trees to play:

    .venv/bin/python -m tests.agents.recording

writes tests/trees/recordings.json anew, a tree for each way in which they start commands.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.agents.from_pypi import CASES, EDIT, agent_of
from tests.agents.model import Model
from tests.agents.packages import WHERE
from tests.trees.recorded import RECORDINGS
from tests.trees.strace import Step, steps_of

ENVIRONMENT = {"TERM": "dumb", "LANG": "C.UTF-8", "SHELL": "/bin/bash"}


def recorded(package: str, way: str) -> dict[str, Any]:
    """Run an agent once, and return its steps and the calls that are to be found in them, both
    without what is of this machine."""
    with tempfile.TemporaryDirectory() as directory, Model(says=EDIT) as model:
        home, work = Path(directory) / "home", Path(directory) / "work"
        home.mkdir()
        work.mkdir()
        agent = agent_of(package, way, home, work, model.url)
        env = {**ENVIRONMENT, "HOME": str(home), **agent.env}
        null = subprocess.DEVNULL
        steps, done = steps_of(agent.argv, env=env, cwd=work, stdin=null, timeout=200)
        assert done.returncode == 0, done
        own = {str(WHERE / "py" / package / "bin"): "/x/bin", str(home): "/home/u", str(work): "/w"}
        if way == "server":
            own[agent.argv[2]] = "8000"
    return {"what": f"{package}: {way}", "steps": _without(steps, own), "calls": agent.calls}


def _without(steps: list[Step], own: dict[str, str]) -> list[Step]:
    text = json.dumps(steps)
    for word, other in own.items():
        text = text.replace(word, other)
    found: list[Step] = json.loads(text)
    return found


def _all() -> list[dict[str, Any]]:
    return [recorded(package, way) for package, ways in CASES.items() for way in ways]


if __name__ == "__main__":
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in _all())
    RECORDINGS.write_text(f"[\n{rows}\n]\n")
