"""Points in time as people write them: so long ago, or a date."""

from __future__ import annotations

import re
import time

from agentcgroup.errors import InvalidIntent

ALLOWED = "30s, 10m, 2h, 1d, or a time such as 2026-01-31T12:00"
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def moment_usec(field: str, value: float | str) -> int:
    """Return microseconds since 1970. `value`: seconds since 1970, or text; "2h" is two hours ago,
    and a date without a zone is local. `field`: what an error names.

    Raises:
        InvalidIntent: it is no point in time.
    """
    if not isinstance(value, str):
        return int(value * 1e6)
    from datetime import datetime  # few commands need it, and each would wait for it

    ago = re.fullmatch(r"(\d{1,9})([smhd])", value)
    if ago is not None:
        return int((time.time() - int(ago[1]) * _UNITS_S[ago[2]]) * 1e6)
    try:
        return int(datetime.fromisoformat(value).timestamp() * 1e6)
    except (ValueError, OverflowError, OSError):
        sentence = f"{field}: {value!r} cannot be used: allowed is {ALLOWED}"
        raise InvalidIntent(sentence, field=field, value=value, allowed=ALLOWED) from None
