"""Stop a part of the daemon without waiting for it for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

STOP_MOST_S = 1.5
"""How long one part may take to stop; then the daemon goes on stopping without it."""


async def bounded(what: str, stop: Callable[[], Awaitable[None]]) -> None:
    """Stop a part, but wait no longer than STOP_MOST_S for it."""
    task = asyncio.ensure_future(stop())
    done, _ = await asyncio.wait({task}, timeout=STOP_MOST_S)
    if done:
        task.result()
        return
    task.cancel()
    log.error("%s did not stop within %g s: the daemon ends without it", what, STOP_MOST_S)
