"""A daemon on this kernel for tests: started, killed and started again, with agents inside its
sessions. All that it makes lies below one cgroup of its own, which is removed at the end."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec

import grpc

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from tests.zygote import Forked, fork

ROOT = Path(__file__).resolve().parent.parent
_VENDOR = Path("/sys/class/dmi/id/sys_vendor")
SLOW = 25.0 if _VENDOR.exists() and "QEMU" in _VENDOR.read_text() else 1.0
"""Factor by which an emulated CPU is slower; only waiting times are multiplied by it."""
PATIENCE = max(SLOW, 6.0)
"""Factor by which a test waits longer than a free machine needs, before it has failed: other work
may need this machine's CPUs as well."""
IN_GUEST = "AGENTCG_GUEST" in os.environ
"""Whether this is a test guest, which gives memory back later than a machine of its own would."""
EXEC = os.environ.get("AGENTCG_EXEC") or str(Path(sys.executable).parent / "agentcg-exec")


P = ParamSpec("P")


def patient(test: Callable[P, None]) -> Callable[P, None]:
    """Decorate a test whose result needs a CPU that does nothing else. An emulated CPU shares its
    core with the rest of the host, so there the best of three runs counts."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        for left in range(2 if SLOW != 1.0 else 0, -1, -1):
            try:
                return test(*args, **kwargs)
            except AssertionError as error:
                if not left:
                    raise
                print(f"again, {left} times at most: {error}")

    return run


def wait_until(
    what: str,
    condition: Callable[[], bool],
    timeout_s: float = 10.0,
    every_s: float = 0.005,
    *,
    promised: bool = False,
) -> None:
    """Poll until `condition` holds. Raises AssertionError, which names `what`, if it does not in
    time. `every_s` is the pause between polls: longer where polling keeps an emulated CPU busy.
    `promised`: the time is part of what is tested, so a slow machine gets no more of it."""
    deadline = time.monotonic() + timeout_s * (1.0 if promised else PATIENCE)
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(every_s)


def controllers() -> set[str]:
    """Controllers that this kernel's cgroup2 mount offers."""
    return set((cgroup2_mount() / "cgroup.controllers").read_text().split())


class AgentProcess:
    """A Python process inside a session's agent leaf that runs what it is sent."""

    def __init__(self, run_dir: Path, session_id: str, *, is_forked: bool = True) -> None:
        """Start the process. With `is_forked` that is quick, but the process shares memory with
        others outside, which the OOM killer counts as its own; else the launcher executes it."""
        env = {**os.environ, "AGENTCG_RUN_DIR": str(run_dir)}
        its_stdin, stdin = os.pipe()
        stdout, its_stdout = os.pipe()
        self.process: Forked | subprocess.Popen[bytes]
        if is_forked:
            self.process = fork("tests.agent_worker", [session_id], env, its_stdin, its_stdout, 2)
        else:
            env["PYTHONPATH"] = os.pathsep.join(
                filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
            )
            worker = [sys.executable, "-m", "tests.agent_worker"]
            argv = [EXEC, "--session", session_id, "--", *worker]
            self.process = subprocess.Popen(
                argv, stdin=its_stdin, stdout=its_stdout, env=env, cwd=ROOT
            )
        os.close(its_stdin)
        os.close(its_stdout)
        self._stdin, self._stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")

    def run(self, code: str, **values: Any) -> Any:
        """Execute `code` in the process with `values`, `agent`, `stub`, `pb` and the usual modules
        as globals. Returns its `result`, or raises what it raised (grpc errors as RemoteRpcError).
        """
        pickle.dump((code, values), self._stdin)
        self._stdin.flush()
        ok, result = _load(self._stdout)
        if not ok:
            raise result
        return result

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # killed with its session just now
            self._stdin.close()
        try:
            self.process.wait(10 * PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stdout.close()


def _load(stream: BinaryIO | Any) -> tuple[bool, Any]:
    loaded: tuple[bool, Any] = pickle.load(stream)
    return loaded


class RemoteRpcError(Exception):
    """A gRPC error that the worker got."""

    def __init__(self, code: str, details: str, error: bytes) -> None:
        super().__init__(code, details, error)
        self.code, self.details = code, details
        self.error = pb.Error.FromString(error)


SHELLS_BEGIN_CALLS = """
[[boundaries.rules]]
program = ["sh", "bash", "dash", "zsh", "ash", "ksh"]
shell_command = true
"""
"""Rules of daemons in tests: what else an agent starts stays with it, for tests that need that."""


class DaemonProcess:
    """A daemon with a pool, sockets and files of its own."""

    def __init__(self, directory: Path, config: str = "", run_dir: Path | None = None) -> None:
        """Write the configuration. `config` is TOML to be added: sections other than [server] and
        [audit]; a [pool] section comes first. Where it does not speak of boundaries,
        SHELLS_BEGIN_CALLS holds. `run_dir`: the run directory, where it is to be elsewhere."""
        self.directory = directory
        self.run_dir = run_dir or directory / "run"
        self.audit_path = directory / "audit.jsonl"
        self.history_path = directory / "history.db"
        self.pool_path = f"/agentcg-test-{secrets.token_hex(4)}"
        self.cgroup_dir = cgroup2_mount() / self.pool_path.strip("/")
        self.config = directory / "agentcgroupd.toml"
        pool = f'[pool]\ncgroup = "{self.pool_path}"\n'
        if config.startswith("[pool]\n"):
            pool, config = pool + config.removeprefix("[pool]\n"), ""
        self.config.write_text(
            f"{pool}\n[server]\nrun_dir = {str(self.run_dir)!r}\nmetrics_address = ''\n"
            f"[audit]\npath = {str(self.audit_path)!r}\n{config}"
            + ("" if "[history]" in pool + config else self._history())
            + ("" if "boundaries" in pool + config else SHELLS_BEGIN_CALLS)
            # Its verification takes seconds where the CPU is emulated: for tests that ask for it.
            + ("" if "[cpu]" in pool + config else '[cpu]\nscheduler = "off"\n')
        )
        self.module, self.environment = "agentcgroupd.__main__", dict[str, str]()
        """Module whose main() is the daemon, and variables that are added to its environment."""
        self.process: Forked | None = None
        self.forks_agents = True
        """`is_forked` of the agents (AgentProcess)."""
        self.agents: list[AgentProcess] = []
        self.log = directory / "log"
        self._channel: grpc.Channel | None = None

    def _history(self) -> str:
        return f"[history]\npath = {str(self.history_path)!r}\n"

    @property
    def admin(self) -> pb_grpc.AdminStub:
        """The operator's stub."""
        if self._channel is None:
            self._channel = grpc.insecure_channel(f"unix:{self.run_dir}/admin/grpc.sock")
        return pb_grpc.AdminStub(self._channel)

    def audit_lines(self) -> list[str]:
        """Lines of the audit log. The daemon may be writing the last one: a reader sees a part of
        it then, which is left out."""
        return self.audit_path.read_text().split("\n")[:-1]

    def start(self) -> None:
        """Start the daemon and wait until it is ready."""
        argv = ["--config", str(self.config)]
        environment = {**os.environ, **self.environment}
        with self.log.open("ab") as log, open(os.devnull) as nothing:
            output = log.fileno()
            self.process = fork(self.module, argv, environment, nothing.fileno(), output, output)
        wait_until("the daemon is ready", self._ready, 15)
        stub = self.admin
        stub.GetPool(pb.GetPoolRequest(), wait_for_ready=True, timeout=10 * PATIENCE)

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the daemon ended: {self.log.read_text()}"
        # Both sockets are new ones once the last of them is there.
        return (self.run_dir / "admin/attach.sock").exists()

    def kill(self) -> None:
        """Send SIGKILL, wait, and remove the socket that shows that it is ready."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        (self.run_dir / "admin/attach.sock").unlink()

    def stop(self) -> None:
        """Send SIGTERM and wait; no error if the daemon does not run."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20 * PATIENCE)

    def open(self, session_id: str, **limits: Any) -> AgentProcess:
        """Open a session with an agent in it."""
        spec = pb.SessionSpec(id=session_id, **limits)
        self.admin.OpenSession(pb.OpenSessionRequest(spec=spec))
        return self.enter(session_id)

    def enter(self, session_id: str) -> AgentProcess:
        """Start another process in a session's agent leaf."""
        agent = AgentProcess(self.run_dir, session_id, is_forked=self.forks_agents)
        self.agents.append(agent)
        return agent

    def call_dirs(self) -> list[Path]:
        """All call cgroups that exist now."""
        return sorted(self.cgroup_dir.glob("*/call-*"))

    def close(self) -> None:
        """Stop the daemon and its agents, and remove the pool."""
        for agent in self.agents:
            agent.close()
        if self._channel is not None:
            self._channel.close()
        self.stop()
        if self.cgroup_dir.exists():
            pool = Cgroup.open(self.cgroup_dir)
            pool.kill_and_remove(20)
            pool.close()
