"""The daemon with gRPC servers that do not end, and with calls that are frozen once they run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

from agentcgroupd import __main__ as program
from agentcgroupd import stopping
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.rpc.grpc_server import GrpcServer
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Call

STOP_MOST_S = 2.0


async def never(server: GrpcServer) -> None:
    """Stand for a server whose requests do not end: it does not heed the first cancellation, which
    is the daemon's, but the second one, which is the loop's at the very end."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    await asyncio.Event().wait()


async def block(server: GrpcServer) -> None:
    """Stand for a server that holds up the whole loop."""
    time.sleep(100)  # noqa: ASYNC251


def main() -> int:
    """Run the daemon's own main()."""
    attach = Calls.attach

    def attach_and_freeze(
        calls: Calls, call: Call, process: Process, came_from: Call | None = None
    ) -> None:
        attach(calls, call, process, came_from)
        asyncio.get_running_loop().call_later(0.2, calls.actions.freeze, call, "to be held")

    setattr(Calls, "attach", attach_and_freeze)  # noqa: B010
    setattr(GrpcServer, "stop", block if "AGENTCG_TEST_BLOCK" in os.environ else never)  # noqa: B010
    stopping.STOP_MOST_S = STOP_MOST_S
    return program.main()
