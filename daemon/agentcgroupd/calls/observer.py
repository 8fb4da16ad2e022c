"""What follows calls from their begin to their end."""

from __future__ import annotations

from typing import Protocol

from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.session import Call


class CallObserver(Protocol):
    """What follows calls: programs in the kernel, the guard, GPUs. Called on the event loop."""

    def call_opened(self, call: Call) -> None:
        """Take note of a call's cgroup, with no process in it or, after a restart, with some.
        Raises BpfError where the call cannot have what it was granted."""

    def call_begun(self, call: Call) -> None:
        """Guard a call from now on. Its limits are set; only after a restart has it processes."""

    def regrant(self, call: Call, grant: Grant) -> Grant:
        """Change what an open call has to `grant`, and return that with what follows from it.
        Raises RequestError, with nothing changed."""

    def entered(self, pid: int) -> None:
        """Take note that a process is in a call or in an agent leaf, as all that it will fork."""

    def agent_entered(self, pid: int) -> None:
        """Take note that a process of the agent itself was put into an agent leaf."""

    def catch_up(self) -> None:
        """Read what is known of processes that have ended, before a call is judged by it."""

    def behind(self) -> bool:
        """Tell whether more processes of a call may still be on their way into it."""

    def call_ending(self, call: Call) -> None:
        """Take note that a call is empty and that its report is about to be made."""

    def call_closed(self, call: Call) -> None:
        """Take note that a call's cgroup is gone or given up."""

    def room_given_up(self, call: Call) -> None:
        """Take note that what an open call expects is not kept for it while it stands empty."""

    def call_ended(self, call: Call, held_bytes: int) -> None:
        """Take note that a call is over, and what it has held at most."""
