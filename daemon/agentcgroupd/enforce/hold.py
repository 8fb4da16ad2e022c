"""Pauses by the operator: a call is held frozen whatever the policy does with it, and goes on when
the operator, or the daemon's end, lets it.

The policy's own pauses and turns on a GPU go on beside it: a call is frozen as long as one of them
wants that.
"""

from __future__ import annotations

from agentcgroup.text import printable
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.enforce.actions import Actions
from agentcgroupd.errors import FailedPrecondition
from agentcgroupd.state.session import Call, held_around

GOES_ON = "It goes on: the operator let it."
WHY_CHARS_MAX = 200


def hold(actions: Actions, call: Call, why: str) -> None:
    """Pause a call for the operator; no error if it is held already. `why`: told to its agent.
    Raises FailedPrecondition where it is ending, KnobError, or CgroupGone."""
    if call.state == pb.CALL_STATE_ENDING:
        raise FailedPrecondition(f"call {call.id} is ending", "call_id")
    said = f": {printable(why)[:WHY_CHARS_MAX]}" if why else "."
    actions.hold(call, f"The operator paused it{said}")


def resume(actions: Actions, call: Call) -> None:
    """Let a call go on that the operator or the policy has paused. Raises FailedPrecondition where
    it is not paused, or only with a call that it is in; KnobError, or CgroupGone."""
    holder = held_around(call)
    if holder is not None and holder is not call:
        raise FailedPrecondition(
            f"call {call.id} is paused with call {holder.id}, which it is in: resume that",
            "call_id",
        )
    if holder is None and call.frozen_since_usec is None and call.disk_since_usec is None:
        raise FailedPrecondition(f"call {call.id} is not paused", "call_id")
    actions.unhold(call, GOES_ON)
    actions.disk_unhold(call, GOES_ON)
    actions.thaw(call, GOES_ON)
