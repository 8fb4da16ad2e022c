"""The strategies that a replay compares: where sessions run, and what is set for them.

`none`: each session is one plain cgroup below the pool and only the pool has a limit.
`static`: the same, and each session's memory.max is its even part of the pool.
`ours`: a daemon of its own, in a run directory of its own, with the same pool size.
`high` is for comparison only: as `static`, but with memory.high instead of memory.max.
Who compares with more strategies registers a backend for each.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from agentcgroupd.cgroup.knobs import CPU_WEIGHT, MEMORY_CURRENT, MEMORY_HIGH, MEMORY_MAX
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.errors import CgroupGone, KnobError

# Functions import what only DaemonBackend needs: gRPC, which is slow to load, and the policy, whose
# pydantic is no dependency of the command line that reads STRATEGIES for its help.
if TYPE_CHECKING:
    from agentcgroup.v1 import agentcgroup_pb2 as pb

STRATEGIES = ("none", "static", "ours")
"""The strategies that `agentcg replay` offers."""
AGENT_LEAF = "agent"
_ENTER = 'echo 0 >"$0/cgroup.procs" && exec "$@"'
_START_S = 90.0
_RPC_S = 60.0
_STOP_S = 20.0
IMPORTANT_CPU_WEIGHT = "10000"
"""What is short is memory: on a busy machine the others are not to take its CPU time either."""
NICE = -10
"""The value of systemd/agentcgroupd.service."""


class ReplayError(RuntimeError):
    """The replay cannot run here; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Place:
    """The cgroup that a session's driver runs in, and the way into it."""

    cgroup: Cgroup
    prefix: tuple[str, ...]
    """Words before the driver's command line that put it there before it is executed, so that all
    of its memory is the session's."""


class Backend(Protocol):
    """A strategy on a pool."""

    name: str
    pool: Cgroup
    holds_back: bool
    """Whether calls are paused, or wait to begin, while the pool is short."""

    def open(self, session_id: str, important: bool) -> Place:
        """Make a session."""

    def call_prefix(self, tool: str) -> tuple[str, ...]:
        """Words that stand before a call's own command line."""

    def environment(self) -> dict[str, str]:
        """Variables that the drivers need beyond this process's own."""

    def close(self, session_id: str) -> None:
        """End a session and all that runs in it."""

    def events(self) -> Sequence[pb.Event]:
        """Events that the daemon has told so far, oldest first."""

    def notes(self) -> tuple[str, ...]:
        """Plain sentences for the result."""

    def stop(self) -> tuple[str, ...]:
        """End everything; returns the cgroups that were left behind, now removed."""


def _base(name: str) -> tuple[Cgroup, str]:
    """The cgroup2 mount, with the memory controller enabled for the cgroups below."""
    root = Cgroup.open(cgroup2_mount())
    if "memory" in root.enable(("memory", "cpu", "pids")):
        root.close()
        raise ReplayError(
            "no memory controller in cgroup v2 here (cgroup v1 may hold it): run this in the "
            "test guest (make guest) or on a host that boots with cgroup v2 only"
        )
    return root, name


def _weigh_cpu(pool: Cgroup) -> None:
    """Give the pool one part of the CPU for its important session, and one for all others, beside
    pools with one part each: that session's is then not the others' to use."""
    try:
        pool.write(CPU_WEIGHT, 200)
    except KnobError as error:
        if error.errno != errno.ENOENT:  # without the controller each process counts alone
            raise


def _below(cgroup: Cgroup, depth: int = 4) -> list[str]:
    """Paths of all cgroups below this one, deepest last."""
    found: list[str] = []
    try:
        for name in cgroup.children():
            child = cgroup.child(name)
            found.append(str(child.path))
            if depth:
                found += _below(child, depth - 1)
    except CgroupGone:
        pass  # it went while we looked: not left behind
    return found


MakeBackend = Callable[[int, int, Path, float], Backend]
"""Makes a backend of a pool's size in bytes, the number of sessions, a directory of its own, and
the scale of the replayed memory. Raises ReplayError, KnobError, OSError."""

_BACKENDS: dict[str, MakeBackend] = {}


def register(strategy: str, make: MakeBackend) -> None:
    """Make a strategy known to `make_backend` by this name."""
    _BACKENDS[strategy] = make


class PlainBackend:
    """`none`, `static` and `high`: cgroups and limits, nobody who watches them."""

    holds_back = False

    def __init__(self, name: str, pool_bytes: int, sessions: int) -> None:
        self.name = name
        root, pool = _base(f"agentcg-replay-{os.getpid()}-{name}")
        self._root = root
        self.pool = root.make_child(pool)
        self.pool.write(MEMORY_MAX, pool_bytes)
        self.pool.enable(("memory", "cpu", "pids"))
        self._share_bytes = pool_bytes // sessions

    def open(self, session_id: str, important: bool) -> Place:
        """Make a plain cgroup; importance is not expressed."""
        del important
        cgroup = self.pool.make_child(session_id)
        if self.name == "static":
            cgroup.write(MEMORY_MAX, self._share_bytes)
        elif self.name == "high":
            cgroup.write(MEMORY_HIGH, self._share_bytes)
        return Place(cgroup, ("/bin/sh", "-c", _ENTER, str(cgroup.path)))

    def call_prefix(self, tool: str) -> tuple[str, ...]:
        """Give no words: calls are plain children of their agent."""
        del tool
        return ()

    def environment(self) -> dict[str, str]:
        """Give no variables: plain cgroups need none."""
        return {}

    def close(self, session_id: str) -> None:
        """Kill what is left and remove the cgroup."""
        self.pool.child(session_id).kill_and_remove()

    def events(self) -> Sequence[pb.Event]:
        """Give no events: nobody watches."""
        return ()

    def notes(self) -> tuple[str, ...]:
        """Give no sentences: there is nobody to say any."""
        return ()

    def stop(self) -> tuple[str, ...]:
        """Remove the pool."""
        left = tuple(_below(self.pool))
        self.pool.kill_and_remove()
        self._root.close()
        return left


class DaemonBackend:
    """`ours`: starts the daemon, opens sessions through its Admin service, listens to its
    events."""

    name = "ours"
    holds_back = True

    def __init__(self, pool_bytes: int, work: Path, memory_scale: float = 1.0) -> None:
        """`memory_scale`: of what is replayed. What the policy says in bytes, such as how far a
        recorded call goes, is true of the recordings, and so scaled alike."""
        from agentcgroup.paths import admin_socket, find_launcher

        self._work = work
        self._launcher = find_launcher()
        self._run_dir = work / "run"
        self._root, pool = _base(f"agentcg-replay-{os.getpid()}-ours")
        self._pool_path = self._root.path / pool
        config = work / "agentcgroupd.toml"
        config.write_text(
            f'[pool]\ncgroup = "/{pool}"\nmemory_max = {json.dumps(str(pool_bytes))}\n'
            f'[server]\nrun_dir = {json.dumps(str(self._run_dir))}\nmetrics_address = ""\n'
            f"[audit]\npath = {json.dumps(str(work / 'audit.jsonl'))}\n"
            "[history]\npath = ''\n"
            f"[policy]\npath = {json.dumps(str(_policy(work, memory_scale)))}\n",
            encoding="utf-8",
        )
        self._log = work / "daemon.log"
        with self._log.open("wb") as log:
            self._daemon = subprocess.Popen(
                [sys.executable, "-m", "agentcgroupd", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": _python_path()},
            )
        self._notes: list[str] = []
        self._hurry()
        try:
            self._connect(admin_socket(str(self._run_dir)))
            self.pool = Cgroup.open(self._pool_path)
            _weigh_cpu(self.pool)
        except BaseException:
            self._end_daemon()
            raise

    def _hurry(self) -> None:
        """Let the daemon run before what calls burn, as its unit does."""
        try:
            nice = os.getpriority(os.PRIO_PROCESS, 0) + NICE
            os.setpriority(os.PRIO_PROCESS, self._daemon.pid, max(nice, -20))
        except PermissionError as error:
            self._notes.append(f"the daemon waits for its CPU time as calls do: {error}")

    def _connect(self, socket: str) -> None:
        import grpc

        from agentcgroup.v1 import agentcgroup_pb2 as pb
        from agentcgroup.v1 import agentcgroup_pb2_grpc as rpc

        deadline = time.monotonic() + _START_S
        while not os.path.exists(socket):
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise ReplayError(f"the daemon did not start: {self._last_words()}")
            time.sleep(0.02)
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self._admin = rpc.AdminStub(self._channel)
        try:
            info = self._admin.GetPool(pb.GetPoolRequest(), timeout=_START_S, wait_for_ready=True)
        except grpc.RpcError as error:
            raise ReplayError(f"the daemon does not answer: {error}") from error
        self._notes += [f"not enforced here: {name}" for name in info.not_enforced]
        self._events: list[pb.Event] = []
        self._stream = self._admin.WatchEvents(pb.WatchEventsRequest())
        self._watcher = threading.Thread(target=self._watch, name="watch-events", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        import grpc

        try:
            for event in self._stream:
                self._events.append(event)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.CANCELLED:
                self._notes.append(f"the daemon's events ended early: {error.details()}")

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turns the daemon's refusal, or its absence, into a ReplayError with its last words."""
        import grpc

        try:
            yield
        except grpc.RpcError as error:
            raise ReplayError(
                f"the daemon did not {what}: {error.details()} ({self._last_words()})"
            ) from error

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " / ".join(lines[-5:]) or "it said nothing"

    def open(self, session_id: str, important: bool) -> Place:
        """Open a session; the important one says so, also of its CPU time, the others leave it at
        the default."""
        from agentcgroup.v1 import agentcgroup_pb2 as pb

        spec = pb.SessionSpec(id=session_id)
        if important:
            spec.priority, spec.cpu_weight = "important", IMPORTANT_CPU_WEIGHT
        with self._asking("open a session"):
            session = self._admin.OpenSession(pb.OpenSessionRequest(spec=spec), timeout=_RPC_S)
        path = self._root.path / session.cgroup_path.lstrip("/")
        return Place(
            Cgroup(self._root.dir_fd, str(path.relative_to(self._root.path)), path),
            prefix=(self._launcher, "--session", session_id, "--"),
        )

    def call_prefix(self, tool: str) -> tuple[str, ...]:
        """The launcher, with nothing but the tool's name: that is what an agent knows before."""
        return (self._launcher, "--on-unavailable", "refuse", "--name", tool, "--")

    def environment(self) -> dict[str, str]:
        """Variables that say where the daemon is."""
        return {"AGENTCG_RUN_DIR": str(self._run_dir)}

    def close(self, session_id: str) -> None:
        """Close the session as an operator would."""
        from agentcgroup.v1 import agentcgroup_pb2 as pb

        request = pb.CloseSessionRequest(session_id=session_id)
        with self._asking("close a session"):
            self._admin.CloseSession(request, timeout=_RPC_S)

    def events(self) -> Sequence[pb.Event]:
        """Events so far, oldest first."""
        return tuple(self._events)

    def notes(self) -> tuple[str, ...]:
        """Sentences on what the daemon cannot enforce here, and on an early end."""
        return tuple(self._notes)

    def _end_daemon(self) -> None:
        if self._daemon.poll() is None:
            self._daemon.terminate()
        try:
            self._daemon.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()

    def stop(self) -> tuple[str, ...]:
        """Stop the daemon; what it leaves below the pool is a leak."""
        left = tuple(_below(self.pool))
        died = self._daemon.poll()
        if died is not None:
            self._notes.append(f"the daemon ended early ({died}): {self._last_words()}")
        self._stream.cancel()
        self._watcher.join(5)
        self._channel.close()
        self._end_daemon()
        try:
            self.pool.kill_and_remove()
        except CgroupGone:
            pass  # the daemon took its pool with it
        self.pool.close()
        self._root.close()
        return left


def _policy(work: Path, memory_scale: float) -> Path:
    """The default policy, for memory at this scale."""
    from agentcgroupd.policy.load import load_policy
    from agentcgroupd.policy.scale import scaled
    from agentcgroupd.policy.toml import to_toml

    path = work / "policy.toml"
    policy = scaled(load_policy(Path("default")).policy, min(1.0, memory_scale))
    path.write_text(to_toml(policy), encoding="utf-8")
    return path


def _python_path() -> str:
    """PYTHONPATH with the places where this process found both packages, so that a checkout without
    an install works, too."""
    import agentcgroup
    import agentcgroupd

    paths = [
        str(Path(module.__file__).parent.parent)
        for module in (agentcgroup, agentcgroupd)
        if module.__file__
    ]
    known = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*paths, *([known] if known else [])])


def make_backend(
    strategy: str, pool_bytes: int, sessions: int, work: Path, memory_scale: float = 1.0
) -> Backend:
    """Make the backend of a registered strategy. Raises ValueError for another name, and
    ReplayError, KnobError, OSError."""
    make = _BACKENDS.get(strategy)
    if make is None:
        raise ValueError(f"strategy is {strategy!r}; allowed: {', '.join(_BACKENDS)}")
    return make(pool_bytes, sessions, work, memory_scale)


def _plain(strategy: str) -> MakeBackend:
    def make(pool_bytes: int, sessions: int, work: Path, memory_scale: float) -> Backend:
        del work, memory_scale
        return PlainBackend(strategy, pool_bytes, sessions)

    return make


def _ours(pool_bytes: int, sessions: int, work: Path, memory_scale: float) -> Backend:
    del sessions
    return DaemonBackend(pool_bytes, work, memory_scale)


for _strategy in ("none", "static", "high"):
    register(_strategy, _plain(_strategy))
register("ours", _ours)


def current_bytes(cgroup: Cgroup) -> int | None:
    """Read memory.current; None for a cgroup that is gone."""
    try:
        return cgroup.read(MEMORY_CURRENT)
    except CgroupGone:
        return None
