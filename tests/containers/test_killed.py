"""A runtime or a daemon that is killed in the middle of a call: nothing stays paused, and nothing
is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import docker.errors
import grpc
import pytest
import requests

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.containers.host import CGROUPS, RUNTIMES, TRUE, Host, Made, is_none, sessions
from tests.harness import wait_until

CUT_OFF = (docker.errors.DockerException, requests.RequestException, grpc.RpcError, OSError)
TICK = "while :; do sleep 0.1; done"


@pytest.fixture(params=RUNTIMES)
def made(host: Host, request: pytest.FixtureRequest) -> Iterator[Made]:
    """A container of each runtime with a call in it that does something again and again."""
    container = host.run(request.param, f"killed-{request.param}", TRUE)
    caller = threading.Thread(target=_call, args=(host, container), daemon=True)
    caller.start()
    wait_until(
        "a call is open", lambda: sessions(host.daemon)[container.session].calls_open == 1, 60
    )
    yield container
    host.remove(container)
    wait_until("no cgroup is left", lambda: not host.leftovers(), 30)


def _call(host: Host, made: Made) -> None:
    """Have a call run; whoever executed it for us may be killed meanwhile."""
    try:
        host.execute(made, "agentcg-exec", "--", "sh", "-c", TICK)
    except CUT_OFF as error:
        print(f"{made.name}: {type(error).__name__}")


def open_call(host: Host, made: Made) -> pb.Call:
    request = pb.ListCallsRequest(session_id=made.session)
    (call,) = host.daemon.admin.ListCalls(request, wait_for_ready=True).calls
    return call


def frozen(host: Host, made: Made) -> list[str]:
    """Cgroups of a session that are frozen, or are to be."""
    top = CGROUPS / sessions(host.daemon)[made.session].cgroup_path.strip("/")
    found = []
    for path in (top, *(path for path in top.rglob("*") if path.is_dir())):
        if (path / "cgroup.freeze").read_text() != "0\n":
            found.append(f"{path} is to be frozen")
        elif "frozen 1" in (path / "cgroup.events").read_text():
            found.append(f"{path} is frozen")
    return found


def stop_runtime(host: Host, made: Made, number: signal.Signals) -> None:
    runtime = host.services.get(made.way) or (host.nri if made.way == "nri" else host.cri)
    runtime.stop(number)
    runtime.start()
    if made.way == "nri":
        wait_until("it is a plugin again", host.is_plugin, 60, every_s=0.1)


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_a_runtime_that_is_killed(host: Host, made: Made, paused: bool) -> None:
    call = open_call(host, made)
    if paused:
        host.daemon.admin.PauseCall(pb.PauseCallRequest(call_id=call.id))
        assert len(frozen(host, made)) == 1
    stop_runtime(host, made, signal.SIGKILL)
    assert host.runs(made)
    if paused:
        assert len(frozen(host, made)) == 1, "only the operator's, as before"
        host.daemon.admin.ResumeCall(pb.ResumeCallRequest(call_id=call.id))
    wait_until("nothing is paused", lambda: frozen(host, made) == [])


@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGKILL])
def test_a_daemon_that_ends_while_a_call_is_paused(
    host: Host, made: Made, ended: signal.Signals
) -> None:
    """A daemon that is stopped lets it go; after one that was killed, the next daemon does."""
    call = open_call(host, made)
    host.daemon.admin.PauseCall(pb.PauseCallRequest(call_id=call.id))
    top = CGROUPS / sessions(host.daemon)[made.session].cgroup_path.strip("/")
    leaf = next(path for path in top.iterdir() if path.name.startswith("call-"))
    if ended == signal.SIGKILL:
        host.daemon.kill()
    else:
        host.daemon.stop()
        assert (leaf / "cgroup.freeze").read_text() == "0\n"
    stop_runtime_meanwhile(host, made)
    host.daemon.start()
    wait_until("nothing is paused", lambda: frozen(host, made) == [], 30)
    assert host.runs(made)


def stop_runtime_meanwhile(host: Host, made: Made) -> None:
    """Kill the runtime as well, and start it, while there is no daemon."""
    runtime = host.services.get(made.way) or (host.nri if made.way == "nri" else host.cri)
    runtime.stop(signal.SIGKILL)
    runtime.start()


def test_a_container_is_removed_while_its_call_is_paused(host: Host, made: Made) -> None:
    call = open_call(host, made)
    host.daemon.admin.PauseCall(pb.PauseCallRequest(call_id=call.id))
    path = Path(sessions(host.daemon)[made.session].cgroup_path)
    host.remove(made)
    is_none(host.daemon, made.session)
    wait_until("its cgroup is gone", lambda: not (CGROUPS / str(path).strip("/")).exists(), 30)


@pytest.mark.parametrize("name", ["docker", "podman"])
def test_a_container_that_its_runtime_has_paused(host: Host, name: str) -> None:
    """Docker and podman pause a container as a whole. That is theirs, and what they let go goes on,
    whoever was killed meanwhile."""
    made = host.run(name, f"held-{name}", TRUE)
    container = host.services[name].client.containers.get(made.name)
    container.pause()
    host.services[name].stop(signal.SIGKILL)
    host.daemon.kill()
    host.daemon.start()
    host.services[name].start()
    container = host.services[name].client.containers.get(made.name)
    container.unpause()
    wait_until("nothing is paused", lambda: frozen(host, made) == [], 30)
    code, text = host.execute(made, "cat", "/proc/self/cgroup")
    assert (code, text.strip()[-6:]) == (0, "/agent")
    host.remove(made)
