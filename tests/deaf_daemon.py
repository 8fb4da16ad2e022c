"""The daemon that goes deaf while a file is there: its loop turns, and nobody is answered.

The file is named by the environment variable AGENTCG_TEST_DEAF; what is in it says on which
sockets. With `loop` in it, whoever asks stops the loop for some seconds.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from agentcgroupd import __main__ as program
from agentcgroupd.rpc.attach import AttachServer, Client

STUCK_S = 8.0


def main() -> int:
    """Run the daemon's own main()."""
    deaf = Path(os.environ["AGENTCG_TEST_DEAF"])
    receive = AttachServer._receive

    def is_deaf(path: Path) -> bool:
        return deaf.exists() and path.parent.name in deaf.read_text()

    def hear(server: AttachServer, caller: Client) -> bool:
        if deaf.exists() and deaf.read_text() == "loop":
            time.sleep(STUCK_S)
        return not is_deaf(server._path) and receive(server, caller)

    setattr(AttachServer, "_receive", hear)  # noqa: B010
    return program.main()
