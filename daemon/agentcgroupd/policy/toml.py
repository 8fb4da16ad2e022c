"""Policies as text: the whole document as TOML, and how two policies differ, key by key.

The writer is our own because operators read what it writes, and copy it into drop-ins: each
detector and each action stands on one line, as in the policies that come with the daemon. tomli-w
makes a table of every action, and of the detectors too as soon as one is longer than 100
characters; neither can be set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic.fields import FieldInfo

from agentcgroupd.config import Section
from agentcgroupd.config_values import Duration
from agentcgroupd.policy.schema import AT_MOST, Amount, Policy, Ruleset

_DURATION = get_args(Duration)[1]
_TIMES = ((3_600_000_000, "h"), (60_000_000, "m"), (1_000_000, "s"), (1000, "ms"), (1, "us"))
_SIZES = ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"), (1, ""))


def _exactly(value: int, units: tuple[tuple[int, str], ...]) -> str:
    """Return a quantity with the largest unit that leaves nothing over."""
    factor, unit = next((f, u) for f, u in units if value % f == 0)
    return f"{value // factor}{unit}"


def _is_duration(info: FieldInfo) -> bool:
    inner = [a for arg in get_args(info.annotation) for a in get_args(arg)]
    return _DURATION in info.metadata or _DURATION in inner


def _plain(info: FieldInfo, value: object) -> str | int | float | bool:
    """Return a value as an operator would write it: quantities as text with their units."""
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
    """Return a value in TOML."""
    if isinstance(value, str):
        # TOML escapes like JSON, but for DEL, which only TOML forbids.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _items(section: Section) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Yield name, field and value of each key that is set, defaults included."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if value is not None:
            yield name, info, value


def to_toml(policy: Policy) -> str:
    """Return the whole policy as a document. Read again, it is the same policy."""
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
    """Yield the lines of a table: tables and arrays in it are inline ones."""
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
    """A key that differs between two policies. None: it is not there."""

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
    """Return what is different, key by key. Rulesets are compared by their names."""
    changes = _changes(_entries(before), _entries(after))
    old = {r.name: r for r in before.rulesets}
    new = {r.name: r for r in after.rulesets}
    for name in old | new:
        key = f"rulesets.{name}"
        if name not in new:
            changes.append(Change(key, describe(old[name]), None))
        elif name not in old:
            changes.append(Change(key, None, describe(new[name])))
        else:
            changes += _changes(_entries(old[name], f"{key}."), _entries(new[name], f"{key}."))
    old_order = [name for name in old if name in new]
    new_order = [name for name in new if name in old]
    if old_order != new_order:
        changes.append(Change("order of rulesets", ", ".join(old_order), ", ".join(new_order)))
    return changes


def _changes(before: Iterable[tuple[str, str]], after: Iterable[tuple[str, str]]) -> list[Change]:
    old, new = dict(before), dict(after)
    changes = [Change(key, old.get(key), new.get(key)) for key in old | new]
    return [change for change in changes if change.before != change.after]


def _entries(section: Section, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys with their values, of all tables but the rulesets."""
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
    """Return a ruleset in words, such as `freeze when pool_free (below 6%, until 12%)`."""
    conditions = " and ".join(f"{d.detector} ({', '.join(_settings(d))})" for d in ruleset.when)
    return f"{ruleset.do.action} when {conditions}"


def _settings(section: Section) -> Iterator[str]:
    """Yield what is set and is not the default."""
    for name, info, value in _items(section):
        if name not in ("detector", "action") and value != info.default:
            yield name if value is True else f"{name} {_plain(info, value)}"
