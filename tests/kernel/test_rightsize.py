"""Programs in a call are told how much they get, and what a user has set stays."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import EXEC, AgentProcess, DaemonProcess, controllers

CONFIG = '[bpf]\nenabled = false\n[calls]\nrightsize = ["caps", "jobs", "affinity"]\n'
LOOK = "import json, os; print(json.dumps([dict(os.environ), sorted(os.sched_getaffinity(0))]))"
SHIM = str(Path(EXEC).with_name("agentcg-sh"))
RUN = """
# `make test` has set this one already.
environ = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
done = subprocess.run(argv, capture_output=True, text=True, env={**environ, **more})
result = done.stdout or done.stderr
"""
several_cpus = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one CPU")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    running = DaemonProcess(tmp_path_factory.mktemp("d"), CONFIG)
    try:
        running.start()
        yield running
    finally:
        running.close()


def look(agent: AgentProcess, *options: str, **env: str) -> tuple[dict[str, str], list[int]]:
    """Environment and CPUs of a program in a call."""
    argv = [EXEC, *options, "--", "python3", "-c", LOOK]
    environment, cpus = json.loads(agent.run(RUN, argv=argv, more=env))
    return environment, cpus


@several_cpus
def test_fewer_cpus_are_told_and_kept(agent: AgentProcess) -> None:
    environment, cpus = look(agent, "--cpu-max", "0.5")
    assert environment["OMP_NUM_THREADS"] == environment["GOMAXPROCS"] == "1"
    assert environment["MAKEFLAGS"] == "-j1" and len(cpus) == 1
    nproc = agent.run(RUN, argv=[EXEC, "--cpu-max", "1", "--", "nproc"], more={})
    assert int(nproc) == 1


@several_cpus
def test_what_the_user_has_set_stays(agent: AgentProcess) -> None:
    mine = {"OMP_NUM_THREADS": "7", "NODE_OPTIONS": "--no-warnings", "MAKEFLAGS": ""}
    environment, _ = look(agent, "--cpu-max", "1", "--memory-max", "512M", **mine)
    assert {name: environment[name] for name in mine} == mine
    assert environment["GOMAXPROCS"] == "1" and environment["GOMEMLIMIT"] == "460MiB"


def test_memory_lowers_heaps_and_never_raises_them(agent: AgentProcess) -> None:
    environment, _ = look(agent, "--memory-max", "400M")
    assert environment["NODE_OPTIONS"] == "--max-old-space-size=300"
    # V8 takes a quarter of the host's memory by itself, or 2 GiB.
    environment, _ = look(agent, "--memory-max", "64G")
    assert "NODE_OPTIONS" not in environment


def test_without_a_limit_nothing_is_told(agent: AgentProcess) -> None:
    environment, cpus = look(agent)
    told = {"OMP_NUM_THREADS", "MAKEFLAGS", "NODE_OPTIONS", "GOMEMLIMIT"} & environment.keys()
    # Where memory is limited, every call has at most what the pool has.
    assert told == ({"GOMEMLIMIT"} if "memory" in controllers() else set())
    assert cpus == sorted(os.sched_getaffinity(0))


@several_cpus
def test_the_shim_and_the_sdk_tell_it_too(agent: AgentProcess) -> None:
    code = """
call = agent.run([python, "-c", look], cpu_max="1", capture_output=True, text=True)
result = call.stdout
"""
    environment, cpus = json.loads(agent.run(code, python="python3", look=LOOK))
    assert environment["OMP_NUM_THREADS"] == "1" and len(cpus) == 1


@several_cpus
def test_the_sessions_limit_counts_and_calls_are_spread(daemon: DaemonProcess) -> None:
    agent = daemon.open("narrow", cpu_max="1")
    code = """
calls, seen = [], []
for _ in range(2):
    calls.append(subprocess.Popen([launcher, "--", "sleep", "1000"]))
    while open(f"/proc/{calls[-1].pid}/comm").read() != "sleep\\n": time.sleep(0.01)
    seen.append(sorted(os.sched_getaffinity(calls[-1].pid)))
for call in calls: call.kill(); call.wait()
result = seen
"""
    seen: Any = agent.run(code, launcher=EXEC)
    assert [len(cpus) for cpus in seen] == [1, 1] and seen[0] != seen[1]
    shim = agent.run(RUN, argv=[SHIM, "-c", "echo $OMP_NUM_THREADS"], more={})
    assert shim == "1\n"


@pytest.mark.controllers
def test_a_program_that_asks_how_much_may_be_resident_is_told(agent: AgentProcess) -> None:
    look_at = "import resource; print(resource.getrlimit(resource.RLIMIT_RSS)[0])"

    def limit(before: str) -> int:
        command = f"{before} exec {EXEC} --memory-max 64M -- python3 -c '{look_at}'"
        return int(agent.run(RUN, argv=["bash", "-c", command], more={}))

    assert limit("") == 48 << 20
    assert limit("ulimit -S -m 32768;") == 32 << 20, "what the user has set stays"
