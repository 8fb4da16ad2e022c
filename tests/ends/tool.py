"""The tool whose end is drawn: does what a plan says, and writes down what it has done.

Arguments: the plan as JSON, the file for its notes, the cgroup2 mount, the cgroups to leave for."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MIB = 1 << 20
NESTED_MAX = 24 * MIB


class Tool:
    """A process with a plan."""

    def __init__(
        self, plan: dict[str, Any], notes: Path, mount: Path, ways: dict[str, str]
    ) -> None:
        self.plan, self.mount, self.ways, self.directory = plan, mount, ways, notes.parent
        self.notes = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.nested = False

    def note(self, what: str, **more: Any) -> None:
        """Write down what has just been done."""
        line = json.dumps({"what": what, "pid": os.getpid(), "at": time.monotonic(), **more})
        os.write(self.notes, line.encode() + b"\n")

    def here(self) -> Path:
        """The cgroup that this process is in."""
        lines = Path("/proc/self/cgroup").read_text().split("\n")
        return self.mount / next(line[3:].strip("/") for line in lines if line.startswith("0::"))

    def nest(self) -> Path:
        """Make cgroups below the call, with this process in one of them; returns another one."""
        if not self.nested:
            self.nested, self.call = True, self.here()
            (self.call / "main").mkdir()
            (self.call / "job").mkdir()
            (self.call / "main/cgroup.procs").write_text(str(os.getpid()))
            if (self.call / "memory.max").exists():
                (self.call / "cgroup.subtree_control").write_text("+memory")
        return self.call / "job"

    # Children

    def child(self, kind: str) -> None:
        """Start a process that outlives this one."""
        if kind == "nested":
            job = self.nest()
            self.fork(lambda: (job / "cgroup.procs").write_text(str(os.getpid())))
        elif kind == "deaf":
            self.fork(lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
        elif kind == "setsid":
            self.fork(os.setsid)
        elif kind == "double fork":
            middle = os.fork()
            if middle == 0:
                self.fork(lambda: None)
                os._exit(0)
            os.waitpid(middle, 0)
        else:
            self.fork(lambda: None)

    def fork(self, prepare: Callable[[], object]) -> None:
        """Fork a process that waits until it is killed; returns when it is prepared."""
        ready, told = os.pipe()
        if os.fork() == 0:
            os.close(ready)
            # A handler that this process has is not the child's.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            prepare()
            self.note("child")
            os.write(told, b".")
            os.close(told)
            while True:
                signal.pause()
        os.close(told)
        os.read(ready, 1)
        os.close(ready)

    def child_out_of_memory(self) -> None:
        """Have a child run out of memory in a nested cgroup, and go on."""
        job = self.nest()
        (job / "memory.max").write_text(str(NESTED_MAX))
        child = os.fork()
        if child == 0:
            (job / "cgroup.procs").write_text(str(os.getpid()))
            self.take(4 * NESTED_MAX)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        self.note("child oom", status=status)

    def leave(self) -> None:
        """Move out of the call, and stay there long enough to be seen."""
        self.note("leaving")
        way, pid = self.ways[self.plan["leaves"]], str(os.getpid())
        if self.plan["leaver"] == "child":
            child = os.fork()
            if child == 0:
                Path(way, "cgroup.procs").write_text(pid)
                os._exit(0)
            os.waitpid(child, 0)
        else:
            Path(way, "cgroup.procs").write_text(pid)
        self.note("left")
        self.wait_for("seen", 5.0)

    def wait_for(self, name: str, most_s: float) -> None:
        """Wait until the observer makes a file, or for this long."""
        deadline = time.monotonic() + most_s
        while not (self.directory / name).exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    # The end

    @staticmethod
    def take(size: int) -> bytes:
        """Take memory, a page after the other."""
        return b"x" * size

    def run_out_of_memory(self) -> NoReturn:
        """Run out of memory at the level of the plan."""
        level = self.plan["oom"]
        if level == "nested":
            job = self.nest()
            (job / "memory.max").write_text(str(NESTED_MAX))
            (job / "cgroup.procs").write_text(str(os.getpid()))
        self.note("settled")
        if level == "session":
            self.wait_for("go", 60.0)
        kept = [self.take(8 * MIB) for _ in range(32)]
        self.note("survived", held=len(kept))
        os._exit(99)

    def finish(self) -> NoReturn:
        """Come to the end of the plan."""
        end = self.plan["end"]
        if end == "oom":
            self.run_out_of_memory()
        self.note("settled" if end == "never" else "ending")
        if end == "exit":
            os._exit(self.plan["code"])
        if end == "signal":
            os.kill(os.getpid(), self.plan["number"])
        while True:
            time.sleep(1000)

    def run(self) -> NoReturn:
        """Do all of it."""
        on_term = self.plan["on_term"]
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if on_term == "ignore":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif on_term == "exit":
            signal.signal(signal.SIGTERM, lambda *_: os._exit(self.plan["code"]))
        self.note("began")
        # A cgroup gives controllers to those below it only while it holds no process itself.
        nests = "nested" in (*self.plan["children"], self.plan["oom"]) or self.plan["child_oom"]
        if nests:
            self.nest()
        for kind in self.plan["children"]:
            self.child(kind)
        if self.plan["leaves"]:
            self.leave()
        if self.plan["child_oom"]:
            self.child_out_of_memory()
        if self.plan["ender"] == "detach":
            self.note("waiting")
            self.wait_for("go", 60.0)
        if not self.plan["thread"]:
            self.finish()
        threading.Thread(target=self.finish_alone, daemon=True).start()
        ctypes.CDLL(None).syscall(60, 0)  # exit(2), of this thread alone
        raise AssertionError

    def finish_alone(self) -> None:
        """Come to the end once the main thread has ended."""
        while Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.005)
        self.finish()


if __name__ == "__main__":
    raw, notes, mount, ways = sys.argv[1:]
    Tool(json.loads(raw), Path(notes), Path(mount), json.loads(ways)).run()
