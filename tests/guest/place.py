"""A pool with one session on this kernel's cgroups, without a daemon, for tests of what is written
to them."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.cgroup.tree import Cgroup, cgroup2_mount
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.session import Call, Session, SessionLimits, boottime_usec
from agentcgroupd.telemetry.audit import Audit
from agentcgroupd.telemetry.feed import Feed
from agentcgroupd.telemetry.metrics import Metrics
from agentcgroupd.telemetry.notices import Notices


@dataclass
class Place:
    """A pool with one session, and what acts on it."""

    pool: Cgroup
    session: Session
    actions: Actions
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def call(self, high_bytes: int | None = None) -> Call:
        """A call of the session, with nothing in it."""
        id = secrets.token_hex(6)
        cgroup = self.session.cgroup.make_child(f"call-{id}")
        grant = Grant(
            memory_expected_bytes=0, memory_high_bytes=high_bytes, memory_max_bytes=None,
            cpu_weight=100, cpu_max_millicores=None, pids_max=None, timeout_usec=None, priority=50,
            on_pressure="throttle",
        )  # fmt: skip
        call = Call(
            id=id, session=self.session, name="t", argv=(), grant=grant, cgroup=cgroup,
            began_unix_usec=0, began_boot_usec=boottime_usec(), held=False,
            state=pb.CALL_STATE_RUNNING,
        )  # fmt: skip
        self.session.calls[id] = call
        return call

    def start(self, cgroup: Cgroup, code: str, count: int) -> subprocess.Popen[str]:
        """A process in `cgroup`; it begins its work there."""
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", f"import sys; sys.stdin.readline()\n{code}", str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        cgroup.attach(process.pid)
        ask(process)
        return process

    def events(self, kind: str) -> list[dict[str, object]]:
        """Entries of the audit log."""
        path = self.actions.notices.audit._path
        assert path is not None
        entries = (json.loads(line) for line in path.read_text().split("\n")[:-1])
        return [entry for entry in entries if entry["event"] == kind]


def ask(process: subprocess.Popen[str]) -> None:
    """Let it take its next step."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    """What it says next."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextmanager
def make_place(tmp_path: Path) -> Iterator[Place]:
    """A place whose audit log is in `tmp_path`; all that is in it ends with it."""
    mount = Cgroup.open(cgroup2_mount())
    mount.enable(("memory", "cpu"))
    name = f"agentcg-test-{secrets.token_hex(4)}"
    mount.make_child(name).enable(("memory", "cpu"))
    pool = Cgroup.open(mount.path / name)
    own = pool.make_child("s")
    own.enable(("memory", "cpu"))
    agent = own.make_child("agent")
    limits = SessionLimits(None, None, None, 100, None, None, 50, 16)
    session = Session(
        id="s",
        cgroup=own,
        agent=agent,
        cgroup_path=f"/{name}/s",
        limits=limits,
        opened_unix_usec=0,
        offered=agent.files(),
    )
    notices = Notices(Audit(tmp_path / "audit.jsonl", 1 << 30), Metrics(), Feed())
    actions = Actions(notices, lambda: None, hurry=lambda call: None)
    made = Place(pool, session, actions)
    try:
        yield made
    finally:
        pool.kill_and_remove(20)
        for process in made.processes:
            process.kill()
            process.wait()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()
        pool.close()
        mount.close()
