"""Tenants of a GPU for the benchmark: a process that loads PyTorch once and forks those that work.

Needs none of agentcgroup's packages, so that it runs in any Python with PyTorch. Each child asks
for its call over the attach socket (docs/protocol.md), as the launcher would. Without PyTorch the
stand-in for libcuda is used, and the work is to spin.

    python bench/gpu/tenant.py [LIBCUDA]     then a JSON object a line on stdin, one for each child
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE = 8192
OPS_A_SYNC = 4
"""Products that are queued at a time: a few milliseconds of work."""
SPIN_NS = 1_000_000


def enter(path: str, intent: dict[str, str]) -> str:
    """Begin a call, enter it and set the environment that its grant has; returns the call's id."""
    words = ["ACG1", "begin", "name=tenant", *(f"{k}={v}" for k, v in intent.items())]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(path)
        sock.send(b"".join(word.encode() + b"\0" for word in words))
        while True:
            reply = sock.recv(1 << 16).decode().split("\0")
            if reply[0] != "WAIT":
                break
    if reply[0] != "OK":
        raise SystemExit(f"refused: {reply}")
    for word in reply:
        if word.startswith("env="):
            name, _, value = word[4:].partition("=")
            os.environ[name] = value
    return reply[1].removeprefix("call=")


def move(path: str, session: str) -> None:
    """Move this process into the agent leaf of a session."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(path)
        sock.send(f"ACG1\0enter\0session={session}\0".encode())
        reply = sock.recv(1 << 16).decode()
    if not reply.startswith("OK"):
        raise SystemExit(f"refused: {reply!r}")


class TorchWork:
    """Products of large matrices."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch

        self.torch = torch
        size = spec.get("size", SIZE)
        self.a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
        self.b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty(size, size, device="cuda", dtype=torch.bfloat16)
        self.ops = spec.get("ops_a_sync", OPS_A_SYNC)
        for _ in range(5):
            self.some()

    def one(self) -> None:
        """Do one product and wait for it."""
        self.torch.mm(self.a, self.b, out=self.out)
        self.torch.cuda.synchronize()

    def some(self) -> int:
        """Do a few products and wait for them; returns how many."""
        for _ in range(self.ops):
            self.torch.mm(self.a, self.b, out=self.out)
        self.torch.cuda.synchronize()
        return int(self.ops)


class SpinWork:
    """Spins on the processor after a launch of the stand-in library's."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.cuda = ctypes.CDLL(spec["library"])
        with contextlib.suppress(OSError):
            os.open(spec["node"], os.O_RDWR)

    def one(self) -> None:
        """Launch, and spin for a millisecond of processor time."""
        self.cuda.cuLaunchKernel(None, 0)
        until = time.thread_time_ns() + SPIN_NS
        while time.thread_time_ns() < until:
            pass

    def some(self) -> int:
        """Do one piece of work; returns 1."""
        self.one()
        return 1


def steady(work: Any, until_ns: int) -> dict[str, Any]:
    """Work without a pause; returns [time, operations since the step before] for each step."""
    done = []
    while time.monotonic_ns() < until_ns:
        count = work.some()
        done.append([time.monotonic_ns(), count])
    return {"done": done}


def bursts(
    work: Any, until_ns: int, pause_s: float, pause_more_s: float, each: int
) -> dict[str, Any]:
    """Do a few operations now and then; returns for each burst when it began and how long each
    operation took."""
    found = []
    while time.monotonic_ns() < until_ns:
        time.sleep(pause_s + pause_more_s * random.random())
        began, times = time.monotonic_ns(), []
        for _ in range(each):
            before = time.monotonic_ns()
            work.one()
            times.append(time.monotonic_ns() - before)
        found.append({"began_ns": began, "took_ns": times})
    return {"bursts": found}


def hold(_: Any, until_ns: int) -> dict[str, Any]:
    """Hold the memory that is allocated, and do nothing."""
    time.sleep(max(0.0, (until_ns - time.monotonic_ns()) / 1e9))
    return {}


def grab(spec: dict[str, Any]) -> dict[str, Any]:
    """Allocate and keep one GiB after the other; returns how many came, and what the driver said
    to the next."""
    import torch

    torch.cuda.init()
    kept, said = [], ""
    for _ in range(spec["chunks"]):
        try:
            kept.append(torch.empty(1 << 30, device="cuda", dtype=torch.uint8))
        except RuntimeError as error:  # torch.OutOfMemoryError, and what MPS makes of its limit
            said = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            break
    note = Path(spec["result"]).with_suffix(".grabbed")
    answer = {
        "got": len(kept),
        "said": said,
        "reserved": torch.cuda.memory_reserved(),
        "at_ns": time.monotonic_ns(),
    }
    note.write_text(json.dumps(answer))
    time.sleep(spec["hold_s"])
    return {**answer, "lived": True}


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """Live as one tenant, to its end; returns its result."""
    os.environ.update(spec.get("env", {}))
    call = enter(spec["attach"], spec["intent"]) if spec.get("intent") else ""
    if spec["kind"] == "grab":
        Path(spec["ready"]).write_text(json.dumps({"pid": os.getpid(), "call": call}))
        return grab(spec)
    make: Callable[[dict[str, Any]], Any] = SpinWork if spec.get("library") else TorchWork
    work = make(spec)
    ready = Path(spec["ready"])
    part = ready.with_suffix(".part")
    part.write_text(json.dumps({"pid": os.getpid(), "call": call}))
    part.replace(ready)
    start = Path(spec["start"])
    while not start.exists():
        time.sleep(0.002)
    begin_ns, end_ns = json.loads(start.read_text())
    time.sleep(max(0.0, (begin_ns - time.monotonic_ns()) / 1e9))
    if spec["kind"] == "bursts":
        return bursts(work, end_ns, spec["pause_s"], spec["pause_more_s"], spec["each"])
    return (hold if spec["kind"] == "hold" else steady)(work, end_ns)


def main() -> int:
    """Load PyTorch, then fork a child for each line on stdin."""
    if len(sys.argv) < 2:
        import torch

        assert torch.version.cuda
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    print("loaded", flush=True)
    for line in sys.stdin:
        spec = json.loads(line)
        if "enter" in spec:
            move(spec["enter"], spec["session"])
            print("entered", flush=True)
            continue
        if os.fork() == 0:
            result: dict[str, Any]
            status = 0
            try:
                result = child(spec)
            except BaseException:  # noqa: BLE001  # whatever it is, the benchmark wants to know
                result, status = {"error": traceback.format_exc()}, 1
            out = Path(spec["result"])
            part = out.with_suffix(".part")
            part.write_text(json.dumps(result))
            part.replace(out)
            os._exit(status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
