"""The commands of docs/containers.md, run as they are printed, with Docker's and podman's own
programs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.containers.host import AGENT_SOCKETS, SLEEP, is_none, is_session, sessions
from tests.containers.runtimes import IMAGE, PAGE, Service
from tests.harness import DaemonProcess

TEXT = PAGE.read_text()


def program_of(service: Service) -> list[str]:
    """A runtime's program, with the options that have it find what the test has started."""
    if service.name == "docker":
        return ["docker", f"--host=unix://{service.socket}"]
    return [*service.argv[:4]]


def run(
    daemon: DaemonProcess, script: str | Sequence[str], **env: str
) -> subprocess.CompletedProcess[str]:
    """Run an operator's command."""
    argv = ["sh", "-ec", script] if isinstance(script, str) else list(script)
    more = {"AGENTCG_RUN_DIR": str(daemon.run_dir), **env}
    return subprocess.run(
        argv, env={**os.environ, **more}, capture_output=True, text=True, check=False
    )


def start(service: Service, name: str, *options: str) -> None:
    """Start a container by the runtime's own program."""
    more = ("run", "--detach", f"--name={name}", "--network=none", "--stop-signal=SIGKILL")
    argv = [*program_of(service), *more, *options, IMAGE, *SLEEP]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    service.made.append(name)


def test_the_line_for_a_runtime(daemon: DaemonProcess, service: Service) -> None:
    """An agent in it declares a call with nothing else set."""
    found = re.search(r"`docker run (.+) IMAGE`", TEXT)
    assert found is not None
    options = found[1].replace(f"-v {AGENT_SOCKETS}:", f"-v {daemon.run_dir}/agent:")
    name = f"page-{service.name}"
    start(service, name, *shlex.split(options))
    is_session(daemon, name)
    done = service.client.containers.get(name).exec_run(["agentcg-exec", "--", "true"])
    assert (done.exit_code, sessions(daemon)[name].calls_ended) == (0, 1), done.output
    service.remove(name)
    is_none(daemon, name)


def test_the_line_for_a_container_of_another_user(
    daemon: DaemonProcess, services: dict[str, Service]
) -> None:
    (line,) = re.findall(r"^agentcg session adopt .+$", TEXT, re.MULTILINE)
    start(services["podman"], "reviewer")
    podman = f'podman() {{ command {shlex.join(program_of(services["podman"]))} "$@"; }}'
    # The guest's pool may have less than what the page gives to a session.
    done = run(daemon, f"{podman}\n{line.replace('4G', '400M')}")
    assert done.returncode == 0, done.stderr
    assert sessions(daemon)["reviewer"].memory_max_bytes == 400 << 20
    services["podman"].remove("reviewer")
    is_none(daemon, "reviewer")


def test_a_container_is_adopted_by_its_name(
    daemon: DaemonProcess, services: dict[str, Service]
) -> None:
    docker = services["docker"]
    start(docker, "unlabelled")
    argv = ("agentcg", "session", "adopt", "adopted", "--container", "unlabelled")
    done = run(daemon, argv, DOCKER_HOST=f"unix://{docker.socket}")
    assert done.returncode == 0, done.stderr
    assert "adopted" in sessions(daemon)
    docker.remove("unlabelled")
    is_none(daemon, "adopted")


def test_the_runtime_stays_while_containers_have_it(
    daemon: DaemonProcess, services: dict[str, Service]
) -> None:
    docker, config = services["docker"], Path("/etc/docker/daemon.json")
    before = config.read_text()
    start(docker, "has-it", "--runtime=agentcg")
    argv = ("agentcg", "uninstall", "--docker", "--dry-run")
    done = run(daemon, argv, DOCKER_HOST=f"unix://{docker.socket}")
    assert done.returncode != 0 and "has-it; remove them first" in done.stderr
    docker.remove("has-it")
    done = run(daemon, argv, DOCKER_HOST=f"unix://{docker.socket}")
    assert done.returncode == 0 and "would be taken out" in done.stdout
    assert config.read_text() == before
