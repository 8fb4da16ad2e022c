"""A policy whose files change while the daemon runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.harness import SLOW, DaemonProcess, wait_until

POLICY = """\
name = "{name}"

[[rulesets]]
name = "freeze"
when = [{{ detector = "pool_free", below = "6%", until = "{until}" }}]
do = {{ action = "freeze" }}
"""


class Edited(DaemonProcess):
    """A daemon with a policy of its own."""

    def __init__(self, directory: Path) -> None:
        self.policy = directory / "policy.toml"
        self.drop_in = directory / "policy.d"
        self.write("one")
        config = f"[policy]\npath = {str(self.policy)!r}\ndrop_in = {str(self.drop_in)!r}\n"
        super().__init__(directory, config)

    def write(self, name: str, until: str = "12%") -> None:
        """Replace the file by a new one, as editors do."""
        new = self.policy.with_suffix(".new")
        new.write_text(POLICY.format(name=name, until=until))
        os.replace(new, self.policy)

    def state(self) -> pb.PolicyState:
        """What is in force."""
        state: pb.PolicyState = self.admin.GetPolicy(pb.GetPolicyRequest())
        return state


def status(error: Any) -> grpc.StatusCode:
    """Return the details of an error that gRPC raised."""
    code: grpc.StatusCode = error.code()
    return code


@pytest.fixture
def edited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edited]:
    """A running one."""
    running = Edited(tmp_path_factory.mktemp("p"))
    try:
        running.start()
        yield running
    finally:
        running.close()
        print(running.log.read_text())


@pytest.mark.full_speed
def test_an_edited_policy_is_taken_up_and_a_wrong_one_is_not(edited: Edited) -> None:
    state = edited.state()
    assert (state.name, list(state.sources), state.error) == ("one", [str(edited.policy)], "")
    assert state.rulesets[0].action == "freeze"

    edited.write("two")
    wait_until("the new policy is in force", lambda: edited.state().name == "two")

    edited.write("three", until="5%")
    wait_until("the mistake is seen", lambda: edited.state().error != "")
    state = edited.state()
    assert state.name == "two" and 'until = "12%"' in state.document
    assert state.error.startswith(f"{edited.policy}:5: rulesets.freeze.when[0].until: '5%'")

    edited.write("three")
    wait_until("the mended policy is in force", lambda: edited.state().name == "three")
    assert edited.state().error == ""

    edited.drop_in.mkdir()
    (edited.drop_in / "ours.toml").write_text("[headroom]\nlease = '7m'\n")
    wait_until("the drop-in counts", lambda: 'lease = "7m"' in edited.state().document)
    assert len(edited.state().sources) == 2
    log = edited.log.read_text()
    assert log.count("'5%' cannot be used") == 1
    assert log.count("in force:") == 4 + 1  # with the refusal, which says what stays


def test_it_is_read_at_once_when_asked_to(edited: Edited) -> None:
    edited.write("two")
    assert edited.admin.ReloadPolicy(pb.ReloadPolicyRequest()).name == "two"
    edited.write("T H R E E")
    with pytest.raises(grpc.RpcError) as caught:
        edited.admin.ReloadPolicy(pb.ReloadPolicyRequest())
    assert status(caught.value) is grpc.StatusCode.FAILED_PRECONDITION
    assert f"{edited.policy}:1: name: 'T H R E E' cannot be used" in str(caught.value)
    assert edited.state().name == "two"
    edited.write("four")
    assert edited.process is not None
    edited.process.send_signal(signal.SIGHUP)
    wait_until("SIGHUP has been heard", lambda: edited.state().name == "four")
    edited.process.send_signal(signal.SIGHUP)
    assert edited.state().name == "four"
    assert edited.process.poll() is None


def test_a_daemon_does_not_start_with_a_wrong_policy(tmp_path: Path) -> None:
    daemon = Edited(tmp_path)
    daemon.write("one", until="5%")
    for more in ([], ["--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "agentcgroupd", "--config", str(daemon.config), *more],
            capture_output=True,
            text=True,
            timeout=30 * SLOW,
            check=False,
        )
        assert done.returncode == 78, done.stderr
        assert (
            f"{daemon.policy}:5: rulesets.freeze.when[0].until: '5%' cannot be used" in done.stderr
        )
    assert not daemon.cgroup_dir.exists()


def test_a_call_is_explained_where_the_pool_has_a_limit(edited: Edited) -> None:
    agent = edited.open("alpha")
    call_id = agent.run("result = stub.BeginCall(pb.BeginCallRequest(name='tool')).id")
    request = pb.ExplainCallRequest(call_id=call_id)
    if edited.admin.GetPool(pb.GetPoolRequest()).HasField("memory_max_bytes"):
        found = edited.admin.ExplainCall(request)
        assert found.sentence.startswith("'tool' runs with ")
        assert found.numbers["priority"] == 50
        assert len(found.outlook) >= 1
    else:
        with pytest.raises(grpc.RpcError, match="the guard does not run here") as caught:
            edited.admin.ExplainCall(request)
        assert status(caught.value) is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.RpcError, match="no call 'nobody' is open") as caught:
        edited.admin.ExplainCall(pb.ExplainCallRequest(call_id="nobody"))
    assert status(caught.value) is grpc.StatusCode.NOT_FOUND
