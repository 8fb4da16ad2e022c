"""A policy as text: the whole document, and how two of them differ, key by key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic.fields import FieldInfo

from agentcgroupd.config import Duration, Section
from agentcgroupd.policy.schema import AT_MOST, Amount, Policy, Ruleset

_DURATION = get_args(Duration)[1]
_TIMES = ((3_600_000_000, "h"), (60_000_000, "m"), (1_000_000, "s"), (1000, "ms"), (1, "us"))
_SIZES = ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"), (1, ""))


def _exactly(value: int, units: tuple[tuple[int, str], ...]) -> str:
    """With the largest unit that leaves nothing over."""
    factor, unit = next((f, u) for f, u in units if value % f == 0)
    return f"{value // factor}{unit}"


def _is_duration(info: FieldInfo) -> bool:
    inner = [a for arg in get_args(info.annotation) for a in get_args(arg)]
    return _DURATION in info.metadata or _DURATION in inner


def _plain(info: FieldInfo, value: object) -> str | int | float | bool:
    """A value as an operator would write it."""
    if isinstance(value, Amount):
        parts = []
        if value.percent is not None:
            parts.append(f"{value.percent!r}".removesuffix(".0") + "%")
        if value.size_bytes is not None:
            parts.append(_exactly(value.size_bytes, _SIZES))
        return AT_MOST.join(parts)
    if isinstance(value, int) and _is_duration(info):
        return _exactly(value, _TIMES)
    assert isinstance(value, str | int | float), value
    return value


def _toml(value: str | int | float | bool) -> str:
    if isinstance(value, str):
        # What JSON escapes is escaped alike in TOML, which alone forbids DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _items(section: Section) -> Iterator[tuple[str, FieldInfo, Any]]:
    """What is set, defaults included."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if value is not None:
            yield name, info, value


def to_toml(policy: Policy) -> str:
    """The whole document; read again, it is the same policy."""
    lines: list[str] = []
    tables: list[str] = []
    for name, info, value in _items(policy):
        if isinstance(value, Section):
            tables += ["", f"[{name}]", *_pairs(value)]
        elif isinstance(value, tuple):
            for ruleset in value:
                tables += ["", f"[[{name}]]", *_pairs(ruleset)]
        else:
            lines.append(f"{name} = {_toml(_plain(info, value))}")
    return "\n".join([*lines, *tables, ""])


def _pairs(section: Section) -> Iterator[str]:
    for name, info, value in _items(section):
        if isinstance(value, tuple):
            yield f"{name} = ["
            yield from (f"  {_inline(element)}," for element in value)
            yield "]"
        elif isinstance(value, Section):
            yield f"{name} = {_inline(value)}"
        else:
            yield f"{name} = {_toml(_plain(info, value))}"


def _inline(section: Section) -> str:
    pairs = (f"{name} = {_toml(_plain(info, value))}" for name, info, value in _items(section))
    return f"{{ {', '.join(pairs)} }}"


# Differences


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs. None: it is not there."""

    key: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        if self.before is None:
            return f"{self.key}: added: {self.after}"
        if self.after is None:
            return f"{self.key}: removed, was: {self.before}"
        return f"{self.key}: {self.before} -> {self.after}"


def diff(before: Policy, after: Policy) -> list[Change]:
    """What is different, key by key; rulesets are compared by their names."""
    changes = _changes(dict(_entries(before)), dict(_entries(after)))
    old, new = ({r.name: r for r in p.rulesets} for p in (before, after))
    for name in old | new:
        key = f"rulesets.{name}"
        if name in old and name in new:
            entries = (dict(_entries(r, f"{key}.")) for r in (old[name], new[name]))
            changes += _changes(*entries)
        else:
            was, now = (describe(p[name]) if name in p else None for p in (old, new))
            changes.append(Change(key, was, now))
    common = [[n for n in p if n in old and n in new] for p in (old, new)]
    if common[0] != common[1]:
        changes.append(Change("order of rulesets", *map(", ".join, common)))
    return changes


def _changes(before: dict[str, str], after: dict[str, str]) -> list[Change]:
    return [Change(key, before.get(key), after.get(key)) for key in before | after
            if before.get(key) != after.get(key)]  # fmt: skip


def _entries(section: Section, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys with their values, of all tables but the rulesets."""
    for name, info, value in _items(section):
        if isinstance(value, Section):
            yield from _entries(value, f"{prefix}{name}.")
        elif not isinstance(value, tuple):
            plain = _plain(info, value)
            word = isinstance(plain, str) and re.fullmatch(r"[\w.%-]+", plain)
            yield prefix + name, str(plain) if word else _toml(plain)
        elif isinstance(section, Ruleset):
            for index, element in enumerate(value):
                yield from _entries(element, f"{prefix}{name}[{index}].")


def describe(ruleset: Ruleset) -> str:
    """`freeze when pool_free (below 6%, until 12%)`."""
    conditions = " and ".join(f"{d.detector} ({', '.join(_settings(d))})" for d in ruleset.when)
    return f"{ruleset.do.action} when {conditions}"


def _settings(section: Section) -> Iterator[str]:
    """What is set and not as it is by default."""
    for name, info, value in _items(section):
        if name not in ("detector", "action") and value != info.default:
            yield name if value is True else f"{name} {_plain(info, value)}"
