"""Daemons that share a real GPU by time slices and by MPS; a skip says what a host lacks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.harness import AgentProcess, DaemonProcess

TORCH_PYTHON = os.environ.get("AGENTCG_TORCH_PYTHON", "/opt/torch/.venv/bin/python3")


def _missing() -> str:
    if not Path("/dev/nvidiactl").exists():
        return "no GPU here (/dev/nvidiactl)"
    return "" if Path(TORCH_PYTHON).exists() else f"no PyTorch here ({TORCH_PYTHON})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    reason = _missing()
    for item in items:
        if reason and Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=reason))


class Gpu:
    """A daemon, and an agent in a session that may ask for everything."""

    def __init__(self, directory: Path, config: str) -> None:
        self.daemon = DaemonProcess(directory, f"[gpu]\n{config}\n")
        self.daemon.start()
        self.agent: AgentProcess = self.daemon.open("alpha", priority="100")

    def torch(self, code: str, **intent: str) -> tuple[str, pb.Report]:
        """Run a script with PyTorch as a call; returns its stdout and the call's report, and prints
        its stderr, where PyTorch's warnings are."""
        out, err, call = self.agent.run(
            "r = agent.run([python, '-c', script], env=env, capture_output=True, text=True,"
            " **intent)\nresult = (r.stdout, r.stderr, r.call_id)",
            python=TORCH_PYTHON,
            script=code,
            intent=intent,
            env=environment(),
        )
        print(err)
        return out, self.daemon.admin.GetReport(pb.GetReportRequest(call_id=call))


def environment() -> dict[str, str]:
    """The environment without PYTHONPATH and the like, which are for our own Python."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def _gpu(factory: pytest.TempPathFactory, config: str) -> Iterator[Gpu]:
    made = Gpu(factory.mktemp("d"), config)
    try:
        yield made
    finally:
        made.daemon.close()
        print(made.daemon.log.read_text())


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpu]:
    """A daemon that shares by time slices."""
    yield from _gpu(tmp_path_factory, 'share = "turns"')


@pytest.fixture(scope="module")
def mps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpu]:
    """A daemon that shares by MPS."""
    yield from _gpu(tmp_path_factory, 'share = "mps"')
