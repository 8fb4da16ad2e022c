"""Records of sessions and calls on their cgroups: JSON in an extended attribute of the directory.

A record is all that a restarted daemon needs: memory holds nothing that cannot be read back from
the kernel.
"""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RECORD_VERSION = 1
ARGV_RECORD_CHARS = 512


def read_record(raw: bytes | None, kind: str) -> dict[str, Any] | None:
    """Read a record of this version and kind; None for anything else."""
    if raw is None:
        return None
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.get("v") != RECORD_VERSION or data.get("kind") != kind:
        return None
    return data


def foreign_version(raw: bytes | None, kind: str) -> object:
    """The version of a record of ours that this daemon cannot read; None for a record that it can,
    and for what is no record."""
    try:
        data = json.loads(raw or b"null")
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.get("kind") != kind or "v" not in data:
        return None
    return None if data["v"] == RECORD_VERSION else data["v"]


encode = json.JSONEncoder(separators=(",", ":")).encode
"""Write what a record holds as JSON. json.dumps would make an encoder each time."""


@cache
def _names(kind: type[DataclassInstance]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def plain(value: DataclassInstance) -> dict[str, Any]:
    """A flat dataclass as a dict. dataclasses.asdict would copy deeply, which is most of a record's
    cost."""
    return {name: getattr(value, name) for name in _names(type(value))}


def cut_argv_of_record(argv: tuple[str, ...]) -> list[str]:
    """The arguments of a call, as many as fit into ARGV_RECORD_CHARS; the last one may be cut."""
    kept, left = [], ARGV_RECORD_CHARS
    for argument in argv:
        if left <= 0:
            break
        kept.append(argument[:left])
        left -= len(argument) + 1
    return kept


def sendable(text: str) -> str:
    """Text without lone surrogates, which protobuf does not take."""
    return str(text).encode("utf-8", "replace").decode()
