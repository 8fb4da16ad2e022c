"""What a model hears of a call that has ended, by the names that the protocol gives it. The SDK
says it of its own calls (`told`), the daemon to the hooks of agents (rpc/hook_verb.py)."""

from __future__ import annotations

BY_ITSELF = ("OK", "FAILED")
"""Verdicts on a command that was not ended by a limit or by others."""
FEEDBACK = (
    "OOM",
    "PIDS_LIMIT",
    "GROWTH_DENIED",
    "FROZEN",
    "CPU_THROTTLED",
    "MEMORY_THROTTLED",
    "OVERSTATED",
    "LEFTOVERS",
    "LEFT_CALL",
    "GPU_CLOSED",
    "GPU_MEMORY_DENIED",
    "GPU_FAULT",
    "GPU_LOST",
)
"""Feedback that a model hears of a call that ended by itself."""
