"""Recorded process trees of agents, played by real processes: which calls are found in them, and
where each process is."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.conftest import StartDaemon
from tests.harness import EXEC, PATIENCE, DaemonProcess, wait_until
from tests.trees import Note, Player, notes_in
from tests.trees.recorded import AGENTS, RECORDED, WAYS, Tree, started

pytestmark = [pytest.mark.programs, pytest.mark.usefixtures("lifecycle_program")]


@pytest.fixture(scope="module")
def player(tmp_path_factory: pytest.TempPathFactory) -> Player:
    """The compiled player."""
    return Player(tmp_path_factory.mktemp("trees"))


@pytest.fixture(scope="module")
def daemon(start_module_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with the rules that hold without configuration."""
    return start_module_daemon("[boundaries]\nenabled = true\n")


def play(daemon: DaemonProcess, player: Player, tree: Tree) -> tuple[list[pb.Report], list[Note]]:
    """Play a tree in a session of its own: the reports of its calls, and what its processes say of
    where they were."""
    program, variables, notes = player.prepare(tree.tree)
    daemon.admin.OpenSession(pb.OpenSessionRequest(spec=pb.SessionSpec(id="tree")))
    environment = {**os.environ, **variables, "AGENTCG_RUN_DIR": str(daemon.run_dir)}
    try:
        argv = [EXEC, "--session", "tree", "--", program]
        subprocess.run(argv, env=environment, check=True, timeout=20 * PATIENCE)
        procs = daemon.cgroup_dir / "tree/agent/cgroup.procs"
        wait_until("all of it has ended", lambda: not procs.read_text(), 30)
        wait_until("all calls have ended", lambda: not daemon.call_dirs(), 30)
        time.sleep(0.1)  # what ended before it could be moved is reported by its exit event
        request = pb.ListReportsRequest(session_id="tree", limit=500)
        return list(daemon.admin.ListReports(request).reports), notes_in(notes)
    finally:
        daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="tree"))


def check(daemon: DaemonProcess, player: Player, tree: Tree) -> None:
    """Play a tree, and compare what was found with what it says."""
    reports, notes = play(daemon, player, tree)
    assert sorted((report.name, report.argv[-1]) for report in reports) == sorted(tree.calls)
    names = {report.call_id: report.name for report in reports}
    assert {report.observed for report in reports} <= {True}
    for note in notes:
        assert names.get(note.call_id, "") == note.expected, note


@pytest.mark.parametrize("tree", RECORDED, ids=[tree.what for tree in RECORDED])
def test_every_call_of_a_recorded_tree_is_found_and_no_other(
    daemon: DaemonProcess, player: Player, tree: Tree
) -> None:
    check(daemon, player, tree)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("agent", AGENTS)
def test_a_tool_is_one_call_in_whatever_way_an_agent_starts_it(
    daemon: DaemonProcess, player: Player, agent: str, way: str
) -> None:
    check(daemon, player, started(agent, way))
