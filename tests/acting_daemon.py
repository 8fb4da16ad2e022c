"""The daemon with a hand in it: it pauses a call whose name begins with `acts-pause`, as the guard
would, and stands in for what only programs in the kernel and a GPU can refuse."""

from __future__ import annotations

import asyncio

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd import __main__ as program
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Call

PAUSED_S = 0.25
DENIED = pb.Feedback(
    code=pb.FEEDBACK_CODE_GROWTH_DENIED,
    sentence="A request for 12 MiB was refused (ENOMEM): the call has 20 MiB and it is held at "
    "24 MiB for now.",
)
VRAM = pb.Feedback(
    code=pb.FEEDBACK_CODE_GPU_MEMORY_DENIED,
    sentence="2 GiB of GPU memory were refused: the call holds 3 GiB of its quota of 4 GiB.",
)
_attach = Calls.attach


def attach(self: Calls, call: Call, process: Process, came_from: Call | None = None) -> None:
    """Attach as the daemon does, and then do what the call's name asks for."""
    _attach(self, call, process, came_from)
    if call.name.startswith("acts-pause"):
        self.actions.freeze(call, "More important work needs the memory.")
        asyncio.get_running_loop().call_later(PAUSED_S, _go_on, self, call)
    elif call.name.startswith("acts-deny"):
        call.was_denied, call.history = True, (*call.history, DENIED)
    elif call.name.startswith("acts-vram"):
        call.gpu_usage, call.gpu_feedback = pb.GpuUsage(refused=1), (VRAM,)


def _go_on(calls: Calls, call: Call) -> None:
    if call.id in calls.open:
        calls.actions.thaw(call, "There is room again.")


def main() -> int:
    """Run the daemon's main function."""
    setattr(Calls, "attach", attach)  # noqa: B010  # a method is replaced for the test
    return program.main()
