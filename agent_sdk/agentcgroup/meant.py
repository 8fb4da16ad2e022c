"""What may have been meant by a word that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_CHARS_MOST = 64
"""No known word is longer, and looking for one that is near takes time by the square of that."""


def meant(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known word that is nearest; empty where none is near."""
    near = difflib.get_close_matches(word[:_CHARS_MOST], list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
