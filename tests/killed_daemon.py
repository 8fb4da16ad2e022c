"""The daemon that is killed right before the n-th change it makes, as if by kill -9.

A change is whatever alters a cgroup, a record on one, or a file: the functions of `os` that do so
are counted from the moment at which the file named by AGENTCG_TEST_KILL_AT is there, with n in it.
Calls are paused and braked as soon as a process is in them, and let go of a moment later.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentcgroupd import __main__ as program
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.sessions.pool import ALIVE_XATTR
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Call

CHANGES = ("mkdir", "rmdir", "write", "setxattr", "removexattr", "unlink", "replace")
HOLD_S = 0.05


class Steps:
    """Counts changes, and ends this process before the one that was asked for."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._count = 0

    def counted(self, change: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function that makes a change."""

        def counting(*args: Any, **kwargs: Any) -> Any:
            # The pool is told twice a second that the daemon lives; that is no step of anything.
            if ALIVE_XATTR not in args and self._file.exists():
                self._count += 1
                if self._count == int(self._file.read_text()):
                    os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return counting


def hold(calls: Calls, call: Call) -> None:
    """Pause and brake a call for a moment."""
    actions = calls.actions
    actions.freeze(call, "to be held")
    if "memory.high" in call.session.offered:
        actions.throttle(call, 1 << 20, "to be braked")
        actions.slow(call.session, 50, "to be slowed")
    asyncio.get_running_loop().call_later(HOLD_S, actions.let_go, call, "held long enough")


def main() -> int:
    """Run the daemon's own main()."""
    steps = Steps(Path(os.environ["AGENTCG_TEST_KILL_AT"]))
    for name in CHANGES:
        setattr(os, name, steps.counted(getattr(os, name)))
    attach = Calls.attach

    def attach_and_hold(
        calls: Calls, call: Call, process: Process, came_from: Call | None = None
    ) -> None:
        attach(calls, call, process, came_from)
        hold(calls, call)

    setattr(Calls, "attach", attach_and_hold)  # noqa: B010
    return program.main()
