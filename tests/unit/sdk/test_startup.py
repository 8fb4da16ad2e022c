"""How long a command takes that asks one question: its imports are most of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.unit.fake_daemon import FakeDaemon, running

QUERIES = (["sessions"], ["calls"], ["status"], ["report", "--limit", "5"], ["budget"])
LIMIT_S = 0.2
"""CPU time that a query may take beside the start of Python itself, in the best of several runs: on
a CPU whose other thread is busy with something else. On an idle machine it takes under 0.12."""
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


def _best_s(enough_s: float, code: str, *argv: str) -> float:
    """The least CPU time of several runs, which is that of the one disturbed least by others on
    this machine; no further run where one took no more than `enough_s`."""
    best = float("inf")
    for _ in range(10):
        with open(os.devnull, "wb") as nothing:
            process = subprocess.Popen([sys.executable, "-c", code, *argv], stdout=nothing)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        best = min(best, usage.ru_utime + usage.ru_stime)
        if best <= enough_s:
            break
    return best


@pytest.mark.full_speed
def test_a_query_takes_little_longer_than_python_itself(daemon: FakeDaemon) -> None:
    bare = _best_s(0.0, "pass")
    # On a slow machine Python itself is slow as well.
    limit = bare + max(LIMIT_S, 8 * bare)
    for argv in QUERIES:
        took = _best_s(limit, f"{RUN}; sys.exit(code)", *argv)
        assert took <= limit, f"agentcg {' '.join(argv)}: {took:.3f} s, Python alone {bare:.3f} s"
