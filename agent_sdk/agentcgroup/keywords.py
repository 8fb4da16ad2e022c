"""Keyword arguments of this package's functions: those that are unknown are named, with what may
have been meant, and times may be text."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from agentcgroup.errors import InvalidIntent
from agentcgroup.meant import meant

RUN_KEYWORDS = frozenset({"input", "capture_output", "timeout", "check"})
_TIME = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)")
_SECONDS = {
    "": 1,
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1,
    "sec": 1,
    "m": 60,
    "min": 60,
    "h": 3600,
    "d": 86400,
}
TIME_ALLOWED = "seconds, or a time such as '1.5s', '250ms', '10m', '2h'"


@cache
def popen_keywords() -> frozenset[str]:
    """Return the keyword arguments of subprocess.Popen in this version of Python."""
    return frozenset(inspect.signature(subprocess.Popen).parameters) - {"args"}


def refuse_unknown(
    function: str, given: Mapping[str, Any], known: Collection[str], elsewhere: Collection[str] = ()
) -> None:
    """Refuse keyword arguments that a function does not have. `elsewhere`: those of the call
    itself, which come too late here.

    Raises:
        TypeError: it names the first one, and what may have been meant.
    """
    for name in given:
        if name in elsewhere:
            raise TypeError(
                f"{function}() got {name!r}, which is a field of the intent: it belongs to the "
                "call, so give it to tool_call(), or later to update()"
            )
        if name not in known:
            what = f"{function}() got an unexpected keyword argument {name!r}"
            raise TypeError(what + meant(name, [*known, *elsewhere]))


def seconds(field: str, value: str | float | None) -> float | None:
    """Return a time in seconds, from a number of them or from text such as "250ms" or "10m".

    Raises:
        InvalidIntent: it is neither.
    """
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    found = _TIME.fullmatch(value.strip().lower()) if isinstance(value, str) else None
    if found is None or found[2] not in _SECONDS:
        raise InvalidIntent(
            f"{field}: {value!r} cannot be used: allowed is {TIME_ALLOWED}",
            field=field,
            value=str(value)[:200],
            allowed=TIME_ALLOWED,
        )
    return float(found[1]) * _SECONDS[found[2]]
