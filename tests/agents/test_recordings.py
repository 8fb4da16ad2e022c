"""SWE-ReX and aider, the real packages, start what tests/trees plays. Opt-in, because the packages
are large:

    make test-integrations AGENTS=1
"""

from __future__ import annotations

import json
import os
import shutil

import pytest

from tests.agents.from_pypi import CASES
from tests.agents.recording import recorded
from tests.trees.recorded import RECORDINGS

pytestmark = [
    pytest.mark.full_speed,
    pytest.mark.timeout(400),
    pytest.mark.skipif("AGENTCG_AGENTS" not in os.environ, reason="set AGENTCG_AGENTS=1"),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not here"),
]
WAYS = [(package, way) for package, ways in CASES.items() for way in ways]


@pytest.mark.parametrize(("package", "way"), WAYS)
def test_an_agent_starts_what_was_recorded_byte_by_byte(package: str, way: str) -> None:
    rows = {row["what"]: row for row in json.loads(RECORDINGS.read_text())}
    assert json.loads(json.dumps(recorded(package, way))) == rows[f"{package}: {way}"]
