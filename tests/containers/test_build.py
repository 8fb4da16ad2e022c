"""What `docker build` from a call does: the engine's daemon starts what is built, outside of the
call and its session, unless it is told to do so inside."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.containers.host import Host
from tests.containers.runtimes import IMAGE, documented
from tests.harness import AgentProcess, wait_until

BUILDERS = {"the old builder": "0", "BuildKit": "1"}
# The step's own cgroup is looked at from outside: inside it has a namespace.
FILE = f"FROM {IMAGE}\nRUN {{}}\n"
MARK = "4821"
STAYS = f"sleep {MARK}"
HOG = "dd if=/dev/zero of=/dev/null bs=200M count=1"
BUILDS = "docker build ."
(IN_SESSION,) = (block for block in documented("sh") if "docker build" in block)
BUILD = """
argv = [EXEC, "--name", "build", "--", "sh", "-ec", script]
process = subprocess.Popen(argv, env={**os.environ, **env}, cwd=directory)
"""


@pytest.fixture(params=BUILDERS)
def builder(request: pytest.FixtureRequest) -> str:
    """Both builders of Docker, as far as they are there."""
    if request.param == "BuildKit":
        done = subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("docker-buildx is not here")
    return str(request.param)


@pytest.fixture
def agent(host: Host) -> Iterator[AgentProcess]:
    """An agent on the host that may ask Docker, in a session of 100 MiB."""
    process = host.daemon.open("builds", memory_max="100M")
    yield process
    host.daemon.admin.CloseSession(pb.CloseSessionRequest(session_id="builds"))


def begin(
    host: Host, agent: AgentProcess, builder: str, directory: Path, step: str, script: str = BUILDS
) -> None:
    """Have an agent build an image in a call."""
    (directory / "Dockerfile").write_text(FILE.format(step))
    env = {"HOME": str(directory), "DOCKER_BUILDKIT": BUILDERS[builder]}
    env["DOCKER_HOST"] = f"unix://{host.services['docker'].socket}"
    # No network is needed, and no step may be taken from the one before.
    script = script.replace("docker build", "docker build --network=none --no-cache")
    agent.run(BUILD, script=script, env=env, directory=str(directory))


def places_of_step() -> list[str]:
    """The cgroups of steps that stay."""
    paths = []
    for entry in Path("/proc").iterdir():
        try:
            if (entry / "cmdline").read_bytes() == f"sleep\0{MARK}\0".encode():
                paths.append((entry / "cgroup").read_text().partition("0::")[2].strip())
        except OSError:
            continue
    return paths


def place_of_step() -> str:
    """The cgroup of the step that stays, when it runs."""
    wait_until("the step runs", lambda: bool(places_of_step()), 60)
    return places_of_step()[0]


def report_of(host: Host) -> pb.Report:
    """The report of the newest build, when there is one."""

    def reports() -> list[pb.Report]:
        request = pb.ListReportsRequest(session_id="builds", limit=5)
        return list(host.daemon.admin.ListReports(request).reports)

    wait_until("it is reported", lambda: bool(reports()), 60)
    return reports()[0]


def test_what_a_build_starts_is_outside_of_the_call_and_the_session(
    host: Host, agent: AgentProcess, builder: str, tmp_path: Path
) -> None:
    begin(host, agent, builder, tmp_path, STAYS)
    assert "/builds/" not in place_of_step()
    agent.run("process.terminate(); process.wait()")
    report = report_of(host)
    assert "left the call's cgroup" not in report.sentence  # it never was there
    wait_until("the build has ended with its client", lambda: not places_of_step(), 30)
    # More than the session may have, which does not hold there.
    begin(host, agent, builder, tmp_path, HOG)
    assert agent.run("result = process.wait()") == 0
    wait_until("it is reported", lambda: report_of(host).call_id != report.call_id)
    assert report_of(host).sentence == "It ended well."


def test_a_build_that_is_given_the_session_as_its_parent_has_the_sessions_limits(
    host: Host, agent: AgentProcess, builder: str, tmp_path: Path
) -> None:
    begin(host, agent, builder, tmp_path, STAYS, IN_SESSION)
    assert "/builds/" in place_of_step()
    agent.run("process.terminate(); process.wait()")
    begin(host, agent, builder, tmp_path, HOG, IN_SESSION)
    status = agent.run("result = process.wait()")
    wait_until("both are reported", lambda: not host.daemon.call_dirs())
    assert status != 0
    assert "this session together reached its limit of 100 MiB" in report_of(host).sentence
    assert agent.run("result = 1 + 1") == 2
