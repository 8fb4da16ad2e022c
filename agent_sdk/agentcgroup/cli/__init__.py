"""The command `agentcg` (everything but `exec`, which its C front does itself).

One module a group: status (status, sessions, budget, version), calls (calls, end, report), session,
policy, streams (feedback, events), audit, history (history, usage, explain), install, setup,
trace (doctor, record, replay). `commands` makes the parser of them, importing only the module of
the command that is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13  # of SIGINT and SIGPIPE, as a shell has them


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (else the process's own). Returns the exit code."""
    try:
        # Imported here, because ^C may come meanwhile.
        from agentcgroup.cli.commands import run

        return run(sys.argv[1:] if argv is None else [*argv])
    except KeyboardInterrupt:
        return INTERRUPTED
