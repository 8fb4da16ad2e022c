"""How long a command takes that asks one question: its imports are most of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.unit.fake_daemon import FakeDaemon, running

QUERIES = (["sessions"], ["calls"], ["status"], ["report", "--limit", "5"], ["budget"])
LIMIT_S = 0.12
"""What a query may take beside the start of Python itself, in the best of several attempts."""
HEAVY = ("grpc", "asyncio", "multiprocessing", "importlib.metadata", "agentcgroup.aio")
RUN = "import sys; from agentcgroup.cli import main; code = main(sys.argv[1:])"


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    yield from running(monkeypatch)


@pytest.mark.parametrize("argv", QUERIES, ids=" ".join)
def test_a_query_imports_neither_grpc_nor_asyncio(daemon: FakeDaemon, argv: list[str]) -> None:
    code = f"{RUN}; import json; print(json.dumps([code, *sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    status, *modules = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    assert "agentcgroup.packets" in modules
    assert not set(HEAVY) & set(modules)


def _best_s(code: str, *argv: str) -> float:
    """The shortest of several runs, which is the least disturbed by others on this machine."""
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        command = [sys.executable, "-c", code, *argv]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
        best = min(best, time.perf_counter() - began)
    return best


@pytest.mark.full_speed
def test_a_query_takes_little_longer_than_python_itself(daemon: FakeDaemon) -> None:
    bare = _best_s("pass")
    # On a slow machine Python itself is slow as well.
    limit = bare + max(LIMIT_S, 8 * bare)
    for argv in QUERIES:
        took = _best_s(f"{RUN}; sys.exit(code)", *argv)
        assert took < limit, f"agentcg {' '.join(argv)}: {took:.3f} s, Python alone {bare:.3f} s"
