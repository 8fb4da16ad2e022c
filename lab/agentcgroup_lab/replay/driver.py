"""A replayed agent: a process inside the session that holds the agent's memory and starts the
calls.

Run as a file (`python -I -S driver.py JOB.json`), with the standard library's smallest part only:
this process is the agent's runtime, so all that it is made of counts as the agent's memory, and in
an emulated guest each import costs tens of milliseconds. What it does is in the job; what happened
it appends to `events`, one JSON object a line, with CLOCK_MONOTONIC times that the engine shares.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import select
import sys
import time
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_BURN_SLICE_S = 0.005
_IDLE_S = 0.5


class Clock:
    """Plan time. It runs with real time, but not past the planned end of a call that still runs."""

    def __init__(self, now: float) -> None:
        self.at_s = 0.0
        self._real = now
        self._open: dict[int, float] = {}
        self._last_end_s = 0.0

    def begin(self, call: int, end_s: float) -> None:
        """A call that the agent waits for has begun."""
        self._open[call] = end_s

    def advance(self, now: float) -> float:
        """Move on to the real time `now` (seconds) as far as open calls allow. Returns plan
        time."""
        moved = self.at_s + now - self._real
        self._real = now
        self.at_s = max(self.at_s, min([moved, *self._open.values()]))
        return self.at_s

    def end(self, call: int, next_start_s: float) -> None:
        """A call has ended. When it was the last open one, the think time after it begins now: a
        call that ended early (it was killed) brings forward what follows."""
        self._last_end_s = max(self._last_end_s, self._open.pop(call))
        if not self._open:
            self.at_s = max(self.at_s, min(self._last_end_s, next_start_s))

    def wait_s(self, next_event_s: float) -> float:
        """Real seconds until plan time can reach the next event; forever while a call holds it
        up."""
        if any(end_s <= self.at_s for end_s in self._open.values()):
            return float("inf")
        return max(0.0, min([next_event_s, *self._open.values()]) - self.at_s)


class Held:
    """The agent's own memory: anonymous pages, written so that they compress about 2:1."""

    def __init__(self, max_bytes: int, own_bytes: int) -> None:
        size = max(max_bytes - own_bytes, 0) + mmap.PAGESIZE
        self._own_bytes = own_bytes
        self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without huge pages
                raise
        half = mmap.PAGESIZE // 2
        self._chunk = b"".join(os.urandom(half) + bytes(half) for _ in range(64))
        self._bytes = 0

    def resize(self, level_bytes: int) -> None:
        """Hold `level_bytes`, this process's own memory included."""
        target = max(0, level_bytes - self._own_bytes)
        target -= target % mmap.PAGESIZE
        while self._bytes < target:
            end = min(target, self._bytes + len(self._chunk))
            self._map[self._bytes : end] = self._chunk[: end - self._bytes]
            self._bytes = end
        if target < self._bytes:
            self._map.madvise(mmap.MADV_DONTNEED, target, self._bytes - target)
            self._bytes = target


def own_bytes() -> int:
    """Anonymous bytes that this process holds by itself. What it has mapped of files may be charged
    to whoever read them first, and to nobody in a guest that shares its host's files."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        fields = stream.read().split()
    return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE


def burn(owed_s: float) -> float:
    """Burn some of the CPU time owed. Returns what is left of it."""
    until = time.process_time() + min(owed_s, _BURN_SLICE_S)
    started = time.process_time()
    while time.process_time() < until:
        pass
    return max(0.0, owed_s - (time.process_time() - started))


class Driver:
    """Walks through the job: agent steps, calls in their order, think time between them."""

    def __init__(self, job: dict[str, Any], log: Callable[..., None]) -> None:
        self._log = log
        self._steps: list[tuple[float, int, int]] = job["agent"]
        self._calls: list[dict[str, Any]] = job["calls"]
        self._duration_s: float = job["duration_s"]
        self._gate: str = job["gate"]
        self._held = Held(max(step[1] for step in self._steps), own_bytes())
        self._poll = select.poll()
        self._running: dict[int, tuple[int, int]] = {}  # pidfd -> call, pid
        self._next_step = self._next_call = 0
        self._cpu_pct = 0
        self._owed_s = 0.0

    def run(self) -> None:
        """Until every call has ended and the plan's time is over."""
        self._apply_steps(0.0)  # before the clock starts: the agent has its memory already
        gate = self._open_gate()
        self._log(e="up")
        if gate is not None:
            with os.fdopen(gate, "rb") as stream:
                stream.read()  # until the engine has seen that all are up: they start as one
        self._log(e="ready")
        self._clock = Clock(time.monotonic())
        while True:
            at_s = self._move_on()
            self._apply_steps(at_s)
            while self._next_call < len(self._calls) and self._start_s() <= at_s:
                self._start(self._calls[self._next_call])
                self._next_call += 1
            if at_s >= self._duration_s and not self._running:
                return
            if self._owed_s >= _BURN_SLICE_S / 2:
                self._owed_s = burn(self._owed_s)
                self._reap(0.0)
            else:
                self._reap(self._clock.wait_s(self._next_event_s()))

    def _move_on(self) -> float:
        """Move plan time on to now, with the CPU time that the agent burns meanwhile. Returns plan
        time."""
        before_s = self._clock.at_s
        at_s = self._clock.advance(time.monotonic())
        self._owed_s += (at_s - before_s) * self._cpu_pct / 100.0
        return at_s

    def _open_gate(self) -> int | None:
        """Open the pipe that ends once the engine lets all start; None where it has done so."""
        try:
            # Without O_NONBLOCK this would wait for a writer, and for ever where the engine has
            # closed the pipe just now.
            gate = os.open(self._gate, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        os.set_blocking(gate, True)
        return gate

    def _start_s(self) -> float:
        if self._next_call >= len(self._calls):
            return self._duration_s
        return float(self._calls[self._next_call]["start_s"])

    def _next_event_s(self) -> float:
        step_s = self._duration_s
        if self._next_step < len(self._steps):
            step_s = self._steps[self._next_step][0]
        next_s = min(step_s, self._start_s())
        return next_s if next_s > self._clock.at_s else float("inf")

    def _apply_steps(self, at_s: float) -> None:
        level = None
        while self._next_step < len(self._steps) and self._steps[self._next_step][0] <= at_s:
            _, level, self._cpu_pct = self._steps[self._next_step]
            self._next_step += 1
        if level is not None:
            self._held.resize(level)

    def _start(self, call: dict[str, Any]) -> None:
        index: int = call["index"]
        argv: list[str] = call["argv"]
        open_stdin = (os.POSIX_SPAWN_OPEN, 0, call["schedule"], os.O_RDONLY, 0)
        # Logged first: once the child runs, this process may be killed at any moment.
        self._log(e="begin", i=index)
        try:
            pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=[open_stdin])
        except OSError as error:
            # What an agent sees when there is no memory for a fork: the call fails, it goes on.
            no_memory = error.errno in (errno.ENOMEM, errno.EAGAIN)
            self._log(e="end", i=index, status=127 << 8, why=str(error), no_memory=no_memory)
            return
        pidfd = os.pidfd_open(pid)
        self._poll.register(pidfd, select.POLLIN)
        self._running[pidfd] = index, pid
        if not call["background"]:
            self._clock.begin(index, call["end_s"])

    def _reap(self, wait_s: float) -> None:
        for pidfd, _ in self._poll.poll(min(wait_s, _IDLE_S) * 1000.0):
            index, pid = self._running.pop(pidfd)
            self._poll.unregister(pidfd)
            os.close(pidfd)
            _, status = os.waitpid(pid, 0)
            self._log(e="end", i=index, status=status)
            if not self._calls[index]["background"]:
                self._move_on()  # plan time stood while the call was late
                self._clock.end(index, self._start_s())


def main(path: str) -> None:
    """Run a job. This process is in the session already."""
    with open(path, encoding="utf-8") as stream:
        job = json.load(stream)
    events = os.open(job["events"], os.O_WRONLY | os.O_APPEND)

    def log(**event: object) -> None:
        event["t"] = time.monotonic()
        os.write(events, (json.dumps(event) + "\n").encode())

    Driver(job, log).run()
    log(e="done")


if __name__ == "__main__":
    main(sys.argv[1])
