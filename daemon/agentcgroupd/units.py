"""Quantities as people write them, and how they are shown.

Parsers take the name of the field and its text, and raise `InvalidField` with both. They work on
`Decimal`, so that no value is rounded before it is compared.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import NewType

from agentcgroupd.errors import InvalidField

Bytes = NewType("Bytes", int)
Usec = NewType("Usec", int)
Millicores = NewType("Millicores", int)
CgroupId = NewType("CgroupId", int)
"""Inode number of a cgroup's directory, which is the kernel's cgroup id."""

BYTES_ALLOWED = "a size such as 512M, 1.5G or 2GiB, from 1M to 8E"
CORES_ALLOWED = "a number of cores such as 1.5, 2 or 250m, from 10m to 65536"
DURATION_ALLOWED = "a time such as 90, 1.5s, 250ms or 10m, from 1ms to 30d"
PERCENT_ALLOWED = "a whole number of percent such as 10%, from 1% to 100%"
IMPORTANT_PRIORITY = 80
"""Least priority of important sessions and calls, for which others make room."""
PRIORITY_WORDS = {"batch": 20, "normal": 50, "important": IMPORTANT_PRIORITY}
PRIORITY_ALLOWED = "a whole number from 0 to 100, or batch (20), normal (50) or important (80)"

_TEXT_CHARS_MAX = 64
_NUMBER = re.compile(r"([0-9]{1,30}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([A-Za-z]*)", re.ASCII)
_BYTE_UNIT = re.compile(r"([kmgtpe])(?:i?b)?|b?")
_SECOND_USEC = 10**6
_TIME_UNITS = {
    "": _SECOND_USEC,
    "us": 1,
    "ms": 10**3,
    "s": _SECOND_USEC,
    "sec": _SECOND_USEC,
    "m": 60 * _SECOND_USEC,
    "min": 60 * _SECOND_USEC,
    "h": 3600 * _SECOND_USEC,
    "d": 86400 * _SECOND_USEC,
}

LABELS_MOST, LABEL_CHARS_MOST = 16, 63
LABEL_KEY_ALLOWED = (
    "1 to 63 letters, digits, '_', '.', '/' and '-', with a letter or digit at both ends"
)
LABEL_VALUE_ALLOWED = "1 to 63 printable characters without a blank at either end"
LABELS_ALLOWED = f"at most {LABELS_MOST} labels"
_LABEL_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_./-]*[A-Za-z0-9])?", re.ASCII)

BYTES_MIN = Bytes(1 << 20)
BYTES_MAX = Bytes((1 << 63) - 1)
"""The kernel's own counter is a signed 64-bit number of pages; no host comes near either."""


def bare(text: str) -> str:
    """The text without blanks around it, which are those of ASCII: of other characters none passes
    for a blank."""
    return text.strip(string.whitespace)


def lowered(text: str) -> str:
    """The text in small letters if it is ASCII: the sign for kelvin does not become a k."""
    return text.lower() if text.isascii() else text


def _split(field: str, text: str, allowed: str) -> tuple[Decimal, str]:
    stripped = bare(text)
    if stripped.startswith("-"):
        raise InvalidField(field, text, allowed, "it is negative")
    match = _NUMBER.fullmatch(stripped) if len(stripped) <= _TEXT_CHARS_MAX else None
    if match is None:
        raise InvalidField(field, text, allowed, "it is not a number with a unit")
    number = Decimal(match[1])
    if number == 0:
        raise InvalidField(field, text, allowed, "it is zero")
    return number, match[2]


def parse_bytes(field: str, text: str, least: int = BYTES_MIN) -> Bytes:
    """Bytes from `512M`, `2GiB`, `1.5g`, `1048576`; K to E are powers of 1,024, with or without
    iB."""
    allowed = BYTES_ALLOWED
    if least != BYTES_MIN:
        allowed = allowed.replace("from 1M", f"from {show_bytes(least)}")
    number, unit = _split(field, text, allowed)
    known = _BYTE_UNIT.fullmatch(unit.lower())
    if known is None:
        raise InvalidField(field, text, allowed, f"{unit!r} is no unit of size")
    prefix = known[1] or ""
    value = number * (1 << 10 * " kmgtpe".index(prefix or " "))
    if not prefix and value != int(value):
        raise InvalidField(field, text, allowed, f"a part of a byte (was {text}G meant?)")
    if value < least:
        raise InvalidField(field, text, allowed, f"it is below {show_bytes(least)}")
    if value > BYTES_MAX:
        raise InvalidField(field, text, allowed, "it is too large")
    return Bytes(int(value))


NET_RATE_LEAST = 64 << 10
"""Lowest rate that sockets are held to, in bytes a second: what may be sent at once is 256 KiB at
least (bpf/net.bpf.c)."""


def parse_rate(field: str, text: str, least: int = BYTES_MIN) -> Bytes:
    """Bytes a second from `10M` or `10M/s`."""
    stripped = bare(text)
    return parse_bytes(field, stripped[:-2] if stripped.endswith("/s") else text, least)


def parse_net_rate(field: str, text: str) -> Bytes:
    """Bytes a second of sockets, as `parse_rate`."""
    return parse_rate(field, text, NET_RATE_LEAST)


def parse_cores(field: str, text: str) -> Millicores:
    """Thousandths of a core from `1.5`, `2` or `250m`."""
    number, unit = _split(field, text, CORES_ALLOWED)
    if unit not in ("", "m"):
        raise InvalidField(field, text, CORES_ALLOWED, f"{unit!r} is no unit of cores")
    value = number if unit == "m" else number * 1000
    # 10m: the kernel takes no quota below 1 ms (kernel/sched/core.c: min_cfs_quota_period).
    if not 10 <= value <= 65_536_000:
        raise InvalidField(field, text, CORES_ALLOWED, "it is out of range")
    return Millicores(int(value))


def parse_duration(field: str, text: str) -> Usec:
    """Microseconds from `90` (seconds), `1.5s`, `250ms`, `10m`, `2h`, `1d`."""
    number, unit = _split(field, text, DURATION_ALLOWED)
    if unit not in _TIME_UNITS:
        raise InvalidField(field, text, DURATION_ALLOWED, f"{unit!r} is no unit of time")
    value = number * _TIME_UNITS[unit]
    if not 1000 <= value <= 30 * 86400 * 10**6:
        raise InvalidField(field, text, DURATION_ALLOWED, "it is out of range")
    return Usec(int(value))


def parse_count(field: str, text: str, least: int, most: int) -> int:
    """A whole number from `least` to `most`."""
    allowed = f"a whole number from {least} to {most}"
    stripped = bare(text)
    if not re.fullmatch(r"[0-9]{1,18}", stripped):
        raise InvalidField(field, text, allowed, "it is not a whole number")
    value = int(stripped)
    if not least <= value <= most:
        raise InvalidField(field, text, allowed, "it is out of range")
    return value


def parse_percent(field: str, text: str) -> int:
    """A whole number of percent from 1 to 100: `10%` or `10`."""
    stripped = bare(bare(text).removesuffix("%"))
    if not re.fullmatch(r"[0-9]{1,3}", stripped) or not 1 <= int(stripped) <= 100:
        raise InvalidField(field, text, PERCENT_ALLOWED)
    return int(stripped)


def parse_priority(field: str, text: str) -> int:
    """0 (first to wait) to 100, or one of the words in `PRIORITY_WORDS`."""
    word = lowered(bare(text))
    if word in PRIORITY_WORDS:
        return PRIORITY_WORDS[word]
    if not re.fullmatch(r"[0-9]{1,3}", word) or int(word) > 100:
        raise InvalidField(field, text, PRIORITY_ALLOWED, suggestion(word, PRIORITY_WORDS))
    return int(word)


def parse_labels(field: str, labels: Mapping[str, str]) -> dict[str, str]:
    """Labels as they are kept, sorted by their keys. Keys are those of Kubernetes, and a few more;
    values may have other printable characters."""
    if len(labels) > LABELS_MOST:
        raise InvalidField(field, f"{len(labels)} labels", LABELS_ALLOWED)
    for key, value in labels.items():
        if len(key) > LABEL_CHARS_MOST or not _LABEL_KEY.fullmatch(key):
            raise InvalidField(field, key, LABEL_KEY_ALLOWED, "it cannot be the key of a label")
        is_short = 0 < len(value) <= LABEL_CHARS_MOST
        if not is_short or not value.isprintable() or value != value.strip():
            raise InvalidField(f"{field}[{key}]", value, LABEL_VALUE_ALLOWED)
    return dict(sorted(labels.items()))


def parse_word(field: str, text: str, words: tuple[str, ...]) -> str:
    """The one of `words` that the text is, in whatever case. Raises InvalidField."""
    word = lowered(bare(text))
    if word not in words:
        raise InvalidField(field, text, " or ".join(words), suggestion(word, words))
    return word


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word[:_TEXT_CHARS_MAX], list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def show_bytes(value: float) -> str:
    """`1.5 GiB`, `512 MiB`, `96 KiB`."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << shift:
            return f"{value / (1 << shift):.4g} {unit}"
    return f"{value:.0f} bytes"


def show_cores(millicores: int) -> str:
    """`1 core`, `1.5 cores`."""
    return f"{millicores / 1000:g} {'core' if millicores == 1000 else 'cores'}"


def show_usec(value: float) -> str:
    """`1.25 s`, `35 ms`, `2 min 5 s`."""
    if value >= 60_000_000:
        minutes, seconds = divmod(round(value / 1e6), 60)
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    if value >= 1_000_000:
        return f"{value / 1e6:.3g} s"
    return f"{value / 1e3:.3g} ms"
