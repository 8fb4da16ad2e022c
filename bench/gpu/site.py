"""Starts daemons and tenants for the GPU benchmark, and collects what they did: on a GPU with
PyTorch, or with stand-ins for both."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentcgroup.v1 import agentcgroup_pb2 as pb
from bench.report import ROOT
from tests.harness import DaemonProcess, wait_until

TORCH_PYTHON = os.environ.get("AGENTCG_TORCH_PYTHON", "/opt/torch/.venv/bin/python3")
READY_S = 90.0
END_S = 30.0


class TenantFailed(Exception):
    """Raised where a tenant did not do what it was for; the message has its own words."""


@dataclass(slots=True)
class Tenant:
    """A child of the zygote; `result` is there once it has ended."""

    name: str
    spec: dict[str, Any]
    pid: int = 0
    call: str = ""
    result: dict[str, Any] = field(default_factory=dict)

    def rate(self, begin_ns: int, end_ns: int) -> float:
        """Operations a second between two times."""
        done = sum(count for at, count in self.result["done"] if begin_ns < at <= end_ns)
        return float(done * 1e9 / (end_ns - begin_ns))


class Site:
    """A directory, a zygote, and daemons."""

    def __init__(self) -> None:
        self.real = Path(TORCH_PYTHON).exists() and Path("/dev/nvidiactl").exists()
        self.where = "bench" if self.real else "host, stand-in"
        self.directory = Path(tempfile.mkdtemp(prefix="acg-"))
        self._number = 0
        self._zygote: subprocess.Popen[str] | None = None

    # Tenants

    def start_zygote(self) -> None:
        """Start the process that loads PyTorch once and forks the tenants."""
        script = str(ROOT / "bench/gpu/tenant.py")
        argv = [TORCH_PYTHON, script]
        if not self.real:
            from tests.standin import build

            argv = [sys.executable, script, str(build())]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self._zygote = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._hear("loaded")

    def _hear(self, word: str) -> None:
        assert self._zygote is not None and self._zygote.stdout is not None
        line = self._zygote.stdout.readline().strip()
        if line != word:
            raise TenantFailed(f"the zygote said {line!r} instead of {word!r}")

    def _say(self, message: dict[str, Any]) -> None:
        if self._zygote is None:
            self.start_zygote()
        assert self._zygote is not None and self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(message) + "\n")
        self._zygote.stdin.flush()

    def spawn(
        self,
        kind: str,
        daemon: DaemonProcess | None = None,
        intent: dict[str, str] | None = None,
        env: dict[str, str] | None = None,
        **more: Any,
    ) -> Tenant:
        """Fork a tenant; with a daemon, in a call with this intent."""
        self._number += 1
        name = f"t{self._number}"
        base = self.directory / name
        spec = {
            "kind": kind,
            "ready": f"{base}.ready",
            "result": f"{base}.json",
            "start": str(self.directory / "start"),
            "env": env or {},
            **more,
        }
        if daemon is not None:
            spec["attach"], spec["intent"] = f"{daemon.run_dir}/agent/attach.sock", intent
        if not self.real:
            from tests.standin import build

            spec["library"], spec["node"] = str(build()), str(self.directory / "nvidiactl")
        self._say(spec)
        return Tenant(name, spec)

    def ready(self, tenants: list[Tenant], busy: list[Tenant] | None = None) -> None:
        """Wait until all tenants could begin. `busy`: those that the stand-in for NVML shows as
        busy, None: all. Raises TenantFailed."""
        for tenant in tenants:
            path, result = Path(tenant.spec["ready"]), Path(tenant.spec["result"])
            deadline = time.monotonic() + READY_S
            while not path.exists():
                if result.exists():
                    raise TenantFailed(result.read_text()[-1500:])
                if time.monotonic() > deadline:
                    raise TenantFailed(f"{tenant.name} was not ready in {READY_S:g} s")
                time.sleep(0.01)
            told = json.loads(path.read_text())
            tenant.pid, tenant.call = told["pid"], told["call"]
        if not self.real:
            self.show(tenants if busy is None else busy)

    def show(self, tenants: list[Tenant]) -> None:
        """Have the stand-in for NVML show these tenants as busy."""
        from tests.gpu_fakes import write_state

        busy = [[t.pid, 0, 1 << 30, 100.0 / max(1, len(tenants))] for t in tenants]
        write_state(self.directory / "gpus.json", devices=1, memory_gib=81, processes=busy)

    def go(self, tenants: list[Tenant], seconds: float, lead_s: float = 0.3) -> tuple[int, int]:
        """Let all tenants begin, and end, at one time; returns both, on the monotonic clock."""
        start = self.directory / "start"
        begin = time.monotonic_ns() + int(lead_s * 1e9)
        end = begin + int(seconds * 1e9)
        part = start.with_suffix(".part")
        part.write_text(json.dumps([begin, end]))
        part.replace(start)
        return begin, end

    def collect(self, tenants: list[Tenant], until_ns: int = 0) -> None:
        """Wait for the results. Raises TenantFailed."""
        deadline = max(time.monotonic(), until_ns / 1e9) + END_S
        for tenant in tenants:
            path = Path(tenant.spec["result"])
            while not path.exists():
                if time.monotonic() > deadline:
                    raise TenantFailed(f"{tenant.name} did not end")
                time.sleep(0.01)
            tenant.result = json.loads(path.read_text())
            if "error" in tenant.result:
                raise TenantFailed(tenant.result["error"][-1500:])
        with contextlib.suppress(FileNotFoundError):
            (self.directory / "start").unlink()

    def run(self, tenants: list[Tenant], seconds: float) -> tuple[int, int]:
        """Wait for tenants, let them work and collect what they did; returns begin and end."""
        self.ready(tenants)
        begin, end = self.go(tenants, seconds)
        self.collect(tenants, end)
        return begin, end

    # Daemons

    @contextlib.contextmanager
    def daemon(self, gpu: str) -> Iterator[DaemonProcess]:
        """Run a daemon with these lines in [gpu], and the zygote in a session of it."""
        self._number += 1
        directory = self.directory / f"d{self._number}"
        directory.mkdir()
        config = f"[gpu]\n{gpu}\n"
        if not self.real:
            from tests.standin import build

            config += f"libraries = [{str(build())!r}]\n"
        daemon = DaemonProcess(directory, config)
        if not self.real:
            self._prepare_fakes()
            daemon.module = "tests.gpu_daemon"
            daemon.environment = {"AGENTCG_TEST_GPUS": str(self.directory / "gpus.json")}
        try:
            daemon.start()
            spec = pb.SessionSpec(id="bench", priority="100")
            daemon.admin.OpenSession(pb.OpenSessionRequest(spec=spec))
            self._say({"enter": f"{daemon.run_dir}/admin/attach.sock", "session": "bench"})
            self._hear("entered")
            yield daemon
        finally:
            self._leave()
            daemon.close()

    def _leave(self) -> None:
        """Move the zygote out of the pool, which is to be removed, to this process's cgroup."""
        if self._zygote is None:
            return
        from agentcgroupd.cgroup.tree import cgroup2_mount
        from agentcgroupd.host.proc import cgroup_of

        own = cgroup2_mount() / cgroup_of(os.getpid()).strip("/")
        (own / "cgroup.procs").write_text(str(self._zygote.pid))

    def _prepare_fakes(self) -> None:
        from tests.gpu_fakes import DEVICES_MAJOR

        self.show([])
        node = self.directory / "nvidiactl"
        if not node.exists():
            os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(DEVICES_MAJOR, 255))

    def close(self) -> None:
        """End the zygote, remove the directory."""
        if self._zygote is not None:
            assert self._zygote.stdin is not None and self._zygote.stdout is not None
            self._zygote.stdin.close()
            try:
                self._zygote.wait(10)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()
            self._zygote.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def report_of(daemon: DaemonProcess, call: str) -> pb.Report:
    """Wait until a call has ended; returns its report."""
    admin = daemon.admin

    def ended() -> bool:
        return call not in [c.id for c in admin.ListCalls(pb.ListCallsRequest()).calls]

    wait_until("the call has ended", ended, 20)
    return admin.GetReport(pb.GetReportRequest(call_id=call))


def attempt(name: str, part: Callable[[], Any], failures: dict[str, str]) -> Any:
    """Run a part of the benchmark; a failure is noted, so that the other parts go on."""
    began = time.monotonic()
    try:
        result = part()
    except Exception as error:  # noqa: BLE001  # the other parts are still worth measuring
        failures[name] = f"{type(error).__name__}: {error}"[-1200:]
        print(f"gpu: {name}: FAILED after {time.monotonic() - began:.1f} s: {failures[name]}")
        return None
    print(f"gpu: {name}: {time.monotonic() - began:.1f} s", flush=True)
    return result
