"""Which runtimes are asked, by the configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

from agentcgroupd.config_containers import ContainersConfig
from agentcgroupd.runtime.containers import Containers, Lifecycle
from agentcgroupd.runtime.cri import Cri
from agentcgroupd.runtime.docker_engine import DockerEngine
from agentcgroupd.runtime.early import Splitter
from agentcgroupd.runtime.engine import Engine, Watcher
from agentcgroupd.runtime.nri import Nri
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.telemetry.notices import Notices


class Runtimes:
    """The threads in which runtimes are asked for their containers."""

    def __init__(
        self,
        config: ContainersConfig,
        run_dir: Path,
        mount: Path,
        sessions: Sessions,
        notices: Notices,
    ) -> None:
        """`run_dir`: of the daemon's sockets; `mount`: where cgroup2 is mounted."""
        self._splitter = Splitter(mount)
        engines = _engines(config, run_dir, self._splitter)
        self._engines = list(engines) if config.enabled else []
        self.containers = Containers(config.rules, sessions, notices)
        """What makes sessions of containers; it has to be told of sessions that end."""
        self._watchers: list[Watcher] = []

    def start(self, lifecycle: Lifecycle, undo: AsyncExitStack) -> None:
        """Begin to ask; `undo` stops it."""
        undo.callback(self.stop)
        self.containers.begin(lifecycle)
        loop = asyncio.get_running_loop()
        for engine in self._engines:
            watcher = Watcher(engine, loop, self.containers.told)
            self._watchers.append(watcher)
            watcher.start()

    def stop(self) -> None:
        """Stop; the threads are not waited for. Sessions stay."""
        for watcher in self._watchers:
            watcher.stop()
        self._splitter.close()


def _engines(config: ContainersConfig, run_dir: Path, splitter: Splitter) -> Iterator[Engine]:
    for name, socket in (("docker", config.docker), ("podman", config.podman)):
        if socket is not None:
            yield DockerEngine(name, socket, config.rules, config.annotations)
    if config.nri is not None:
        yield Nri(config.nri, config.rules, config.annotations, run_dir / "agent", splitter)
    for path in config.cri:
        yield Cri(path, config.rules, config.annotations)
