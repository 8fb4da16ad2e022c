"""Benchmark `soak`: whether anything grows while the daemon works for long.

In the first half of the time calls of every kind run, sessions come and go, callers hang up, and
the daemon is stopped and killed again and again; each next one has to find what the last one left.
In the second half one daemon bears the same load without a restart. Its memory, descriptors,
threads, maps and programs of the kernel, and the cgroups of the pool are sampled all the time, and
have to be flat: the slope through the samples of the second half is what is judged.

Needs no controllers; where there are some, calls also run out of memory.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from agentcgroup import audit
from agentcgroup.v1 import agentcgroup_pb2 as pb
from bench.report import RESULTS, BenchReport, Target
from tests.harness import PATIENCE, AgentProcess, DaemonProcess, controllers

MIB = 1 << 20
SAMPLE_S = 1.0
WARM_UP = 0.3
"""Share of the second half that does not count: until every kept report has been kept once."""
BPFFS = Path("/sys/fs/bpf")

WORK = """
import random
KINDS = ["run", "launcher", "held", "hang up", "timeout", "fail", "refused", "oom"]
def work(seconds, may_oom):
    rng, end, counts = random.Random(os.getpid()), time.monotonic() + seconds, {}
    def count(what):
        counts[what] = counts.get(what, 0) + 1
    while time.monotonic() < end:
        kind = rng.choice(KINDS)
        try:
            if kind == "run":
                agent.run(["true"])
            elif kind == "launcher":
                subprocess.call([EXEC, "--name", "t", "--", "true"], stderr=subprocess.DEVNULL)
            elif kind == "held":
                call_id = stub.BeginCall(pb.BeginCallRequest(name="held"), timeout=10).id
                argv = [EXEC, "--call", call_id, "--", "true"]
                subprocess.call(argv, stderr=subprocess.DEVNULL)
                stub.EndCall(pb.EndCallRequest(call_id=call_id), timeout=10)
            elif kind == "hang up":
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sock.connect(str(RUN_DIR / "agent/attach.sock"))
                if rng.random() < 0.5:
                    sock.send(b"ACG1\\0begin\\0name=x\\0")
                sock.close()
            elif kind == "timeout":
                agent.run(["sleep", "5"], timeout=0.1)
            elif kind == "fail":
                agent.run(["sh", "-c", "(sleep 0.2 &) ; kill -9 $$"])
            elif kind == "refused":
                stub.BeginCall(pb.BeginCallRequest(name="x", intent=pb.Intent(memory="lots")))
            elif may_oom:
                agent.run([sys.executable, "-c", "x = bytearray(64 << 20)"], memory_max="24M")
            count(kind)
        except Exception as error:
            count(type(error).__name__)
    return counts
result = work(seconds, may_oom)
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the daemon and its pool hold at a moment."""

    at_s: float
    rss_bytes: int
    descriptors: int
    threads: int
    bpf: int
    """Maps, programs and links that the daemon holds."""
    cgroups: int
    dying: int
    """Cgroups that were removed and that the kernel still keeps."""
    pins: int


ALLOWED = {
    "rss_bytes": 8.0 * MIB,
    "descriptors": 8.0,
    "threads": 1.0,
    "bpf": 1.0,
    "cgroups": 4.0,
    "dying": 200.0,
    "pins": 0.0,
}
"""How much each may grow over the judged time."""


def sample(daemon: DaemonProcess, at_s: float) -> Sample | None:
    """Look at the daemon; None if it is not there just now."""
    assert daemon.process is not None
    proc = Path(f"/proc/{daemon.process.pid}")
    try:
        status = (proc / "status").read_text()
        fds = os.listdir(proc / "fd")
        infos = "".join(_text(proc / "fdinfo" / fd) for fd in fds)
        stat = (daemon.cgroup_dir / "cgroup.stat").read_text()
    except OSError:
        return None
    rss = re.search(r"VmRSS:\s+(\d+)", status)
    threads = re.search(r"Threads:\s+(\d+)", status)
    if rss is None or threads is None:
        return None
    kept = dict(line.split() for line in stat.splitlines())
    return Sample(
        at_s,
        int(rss[1]) << 10,
        len(fds),
        int(threads[1]),
        len(re.findall(r"^(?:map_id|prog_id|link_id):", infos, re.MULTILINE)),
        int(kept["nr_descendants"]),
        int(kept["nr_dying_descendants"]),
        sum(1 for _ in BPFFS.rglob("*")) if BPFFS.is_dir() else 0,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes between points (Theil and Sen), which single peaks do not move."""
    step = max(1, len(points) // 300)
    chosen = points[::step]
    pairs = itertools.combinations(chosen, 2)
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs if b[0] > a[0])


class Soak:
    """A daemon under load, and what was seen of it."""

    def __init__(self, daemon: DaemonProcess, sessions: int) -> None:
        self._daemon = daemon
        self._sessions = sessions
        self._started = time.monotonic()
        self.samples: list[Sample] = []
        self.counts: dict[str, int] = {}
        self.restarts = 0
        self.stop = threading.Event()
        self._lock, self._forking = threading.Lock(), threading.Lock()
        self._up = threading.Event()

    def now_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._started

    def load(self, number: int) -> None:
        """Open a session, work in it for some seconds, close it, and begin anew."""
        for turn in itertools.count():
            if self.stop.is_set():
                return
            self._up.wait(60 * PATIENCE)
            name = f"s{number}-{turn}"
            try:
                spec = pb.SessionSpec(id=name)
                self._daemon.admin.OpenSession(
                    pb.OpenSessionRequest(spec=spec), wait_for_ready=True, timeout=60
                )
                with self._forking:  # the harness forks for one thread at a time
                    agent = AgentProcess(self._daemon.run_dir, name)
                try:
                    may_oom = "memory" in controllers()
                    done = agent.run(WORK, seconds=10.0, may_oom=may_oom)
                finally:
                    agent.close()
                self._count(done)
            except Exception as error:  # noqa: BLE001 - the daemon is killed meanwhile
                self._count({f"session: {type(error).__name__}": 1})
            self._close(name)

    def _close(self, name: str) -> None:
        request = pb.CloseSessionRequest(session_id=name)
        try:
            self._daemon.admin.CloseSession(request, wait_for_ready=True, timeout=60)
        except Exception as error:  # noqa: BLE001 - it was never opened, or is closed at the end
            self._count({f"close: {type(error).__name__}": 1})

    def _count(self, done: dict[str, int]) -> None:
        with self._lock:
            for what, count in done.items():
                self.counts[what] = self.counts.get(what, 0) + count

    def watch(self) -> None:
        """Take samples until the end."""
        while not self.stop.wait(SAMPLE_S):
            if self._up.is_set() and (seen := sample(self._daemon, self.now_s())) is not None:
                self.samples.append(seen)

    def restart(self) -> None:
        """Stop or kill the daemon, in turns, and start the next one."""
        self._up.clear()
        if self.restarts % 2:
            self._daemon.kill()
        else:
            self._daemon.stop()
        with self._forking:
            self._daemon.start()
        self.restarts += 1
        self._up.set()

    def run(self, minutes: float, every_s: float) -> float:
        """Do it all; returns when the second half began, in seconds."""
        self._up.set()
        targets: list[Callable[[], None]] = [self.watch]
        targets += [lambda number=number: self.load(number) for number in range(self._sessions)]  # type: ignore[misc]  # mypy cannot tell the type of a lambda with a default
        threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in threads:
            thread.start()
        while self.now_s() < minutes * 30:
            time.sleep(every_s)
            self.restart()
            print(f"soak: {self.now_s():.0f} s, {self.restarts} restarts", file=sys.stderr)
        began_s = self.now_s()
        while self.now_s() < minutes * 60:
            time.sleep(5)
        self.stop.set()
        for thread in threads:
            thread.join(60 * PATIENCE)
        return began_s


def draw(samples: Sequence[Sample], began_s: float, path: Path) -> None:
    """Draw what was sampled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [field.name for field in fields(Sample) if field.name != "at_s"]
    figure, axes = pyplot.subplots(len(names), 1, sharex=True, figsize=(8, 1.4 * len(names)))
    for axis, name in zip(axes, names, strict=True):
        axis.plot([s.at_s / 60 for s in samples], [getattr(s, name) for s in samples], lw=0.8)
        axis.axvline(began_s / 60, color="grey", lw=0.6)
        axis.set_ylabel(name.removesuffix("_bytes"), rotation=0, ha="right")
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("minutes; restarts and kills left of the line")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def judge(samples: Sequence[Sample], began_s: float, end_s: float) -> list[Target]:
    """Compare the growth of each number over the judged time with what is allowed."""
    since = began_s + WARM_UP * (end_s - began_s)
    judged = [seen for seen in samples if seen.at_s >= since]
    targets = []
    for name, most in ALLOWED.items():
        points = [(seen.at_s, float(getattr(seen, name))) for seen in judged]
        growth = slope(points) * (end_s - since)
        unit, scale = ("MiB", MIB) if name == "rss_bytes" else ("", 1)
        label = f"growth of {name.removesuffix('_bytes')} in {(end_s - since) / 60:.1f} min"
        targets.append(Target(label, growth / scale, unit, f"<= {most / scale:g}", growth <= most))
    return targets


def main() -> int:
    """Soak, judge, draw. Returns 0 where all is flat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--sessions", type=int, default=4, help="at a time")
    parser.add_argument("--restart-every", type=float, default=15.0, metavar="SECONDS")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        daemon = DaemonProcess(Path(directory))
        daemon.start()
        try:
            soak = Soak(daemon, arguments.sessions)
            began_s = soak.run(arguments.minutes, arguments.restart_every)
            end_s = soak.now_s()
            targets = judge(soak.samples, began_s, end_s)
            for session in daemon.admin.ListSessions(pb.ListSessionsRequest()).sessions:
                daemon.admin.CloseSession(pb.CloseSessionRequest(session_id=session.id))
            left = sum(1 for path in daemon.cgroup_dir.rglob("*") if path.is_dir())
            targets.append(Target("cgroups left at the end", left, "", "0", left == 0))
            said = daemon.log.read_text().count("Traceback")
            targets.append(Target("tracebacks in the log", said, "", "0", said == 0))
        finally:
            daemon.close()
        found = audit.verify(audit.files_of(daemon.audit_path))
        wrong = len(found.problems)
        targets.append(Target("problems of the audit log", wrong, "", "0", wrong == 0))
    details: dict[str, Any] = {
        "restarts": soak.restarts,
        "counts": soak.counts,
        "samples": [asdict(seen) for seen in soak.samples],
    }
    where = os.environ.get("AGENTCG_GUEST") or "native"
    report = BenchReport("soak", where, sum(soak.counts.values()), targets, details)
    report.show()
    print(f"{soak.restarts} restarts; {dict(sorted(soak.counts.items()))}")
    print(report.write())
    draw(soak.samples, began_s, RESULTS / "soak.png")
    return 0 if all(target.met for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
