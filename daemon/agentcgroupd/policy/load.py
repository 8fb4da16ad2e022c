"""From files to the policy in force: one document, and drop-ins laid over it.

A drop-in says only what is different. Its tables are merged over the document's; a ruleset whose
name is known replaces only the keys that it has, another is put at the end, or before the one that
it names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib
from pydantic import ValidationError

from agentcgroupd.policy.errors import Mistake, PolicyError, mistakes_of
from agentcgroupd.policy.lint import doubts
from agentcgroupd.policy.locations import Mark, scan
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.toml import to_toml
from agentcgroupd.units import suggestion

DEFAULT = Path("default")
FILE_BYTES_MAX = 1 << 20
_BUILT_IN_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A policy and where it comes from."""

    policy: Policy
    sources: tuple[Path, ...]
    """The document, then its drop-ins in their order."""
    text: str
    """The whole of it as TOML, defaults and drop-ins included."""
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class _Document:
    data: dict[str, Any]
    marks: Mark


def load_policy(
    path: Path | None, drop_in: Path | None = None, limit_bytes: int | None = None
) -> Loaded:
    """Read a document (a file, or the name of one that came with the daemon; None: the default)
    and its drop-ins (a directory, which need not be there). `limit_bytes`: the pool's size, where
    it is known. Raises PolicyError, a ConfigError."""
    sources = find_sources(path, drop_in)
    document = _read(sources[0])
    for source in sources[1:]:
        _merge(document, _read(source))
    policy = _validate(document)
    warnings = tuple(doubts(policy, limit_bytes))
    return Loaded(policy, sources, to_toml(policy), warnings)


def parse_policy(text: str, name: str = "policy") -> Policy:
    """A whole document that is no file. Raises PolicyError, which calls it `name`."""
    return _validate(_parse(text, name))


def built_in() -> dict[str, Path]:
    """The documents that came with the daemon, by name."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parents[1] / "policies"
    directory = checkout if (checkout.parent / "pyproject.toml").exists() else package / "policies"
    return {p.stem: p for p in sorted(directory.glob("*.toml"))}


def find_sources(path: Path | None, drop_in: Path | None) -> tuple[Path, ...]:
    """The files that make up a policy, whether or not they can be read. Raises PolicyError."""
    return _find_document(path or DEFAULT), *_find_drop_ins(drop_in)


def _find_document(path: Path) -> Path:
    if not _BUILT_IN_NAME.fullmatch(str(path)):
        return path
    known = built_in()
    if str(path) in known:
        return known[str(path)]
    hint = suggestion(str(path), known)
    names = ", ".join(known) or "none, for none came with the daemon"
    sentence = f"there is no such policy; allowed is a path such as ./mine.toml, or one of {names}"
    raise PolicyError([Mistake(str(path), 0, "", f"{sentence}; {hint}" if hint else sentence)])


def _find_drop_ins(directory: Path | None) -> list[Path]:
    """By name. Neither hidden files nor editors' backups end in .toml and begin without a dot."""
    if directory is None:
        return []
    try:
        found = sorted(directory.iterdir(), key=lambda p: p.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from None
    return [p for p in found if p.suffix == ".toml" and not p.name.startswith(".")]


def _unreadable(path: Path, error: OSError) -> PolicyError:
    return PolicyError([Mistake(str(path), 0, "", f"cannot be read: {error.strerror}")])


def _read(path: Path) -> _Document:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(raw) > FILE_BYTES_MAX:
        sentence = f"cannot be used: allowed are {FILE_BYTES_MAX >> 20} MiB"
        raise PolicyError([Mistake(str(path), 0, "", sentence)])
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PolicyError([Mistake(str(path), line, "", "it is not UTF-8 text")]) from None
    return _parse(text, str(path))


def _parse(text: str, name: str) -> _Document:
    try:
        return _Document(tomllib.loads(text), scan(text, name))
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)", str(error))
        line = int(place[1]) if place and place[1] else text.count("\n") + 1
        what = str(error)[: place.start()] if place else str(error)
        raise PolicyError([Mistake(name, line, "", f"it is not TOML: {what}")]) from None
    except RecursionError:
        raise PolicyError([Mistake(name, 0, "", "it is nested too deeply")]) from None


def _validate(document: _Document) -> Policy:
    try:
        return Policy.model_validate(document.data)
    except ValidationError as error:
        raise PolicyError(mistakes_of(error, document.data, document.marks)) from None


# Drop-ins


def _merge(document: _Document, drop_in: _Document) -> None:
    """Lay `drop_in` over `document`. Raises PolicyError."""
    rulesets = drop_in.data.get("rulesets")
    if isinstance(rulesets, list) and isinstance(document.data.get("rulesets", []), list):
        _merge_rulesets(document, rulesets, drop_in.marks.children["rulesets"])
        del drop_in.data["rulesets"]
    _merge_tables(document.data, document.marks, drop_in.data, drop_in.marks)


def _merge_tables(
    data: dict[str, Any], marks: Mark, over: dict[str, Any], over_marks: Mark
) -> None:
    for key, value in over.items():
        before, mark = data.get(key), over_marks.children[key]
        if isinstance(before, dict) and isinstance(value, dict) and _same_kind(before, value):
            _merge_tables(before, marks.children[key], value, mark)
        else:
            data[key], marks.children[key] = value, mark


def _same_kind(before: dict[str, Any], over: dict[str, Any]) -> bool:
    """The keys of one kind of action say nothing about another."""
    action = before.get("action")
    return bool(over.get("action", action) == action)


def _merge_rulesets(document: _Document, over: list[Any], over_marks: Mark) -> None:
    rulesets = document.data.get("rulesets", [])
    marks = document.marks.children.get("rulesets", over_marks)
    merged = [(r, marks.children[i]) for i, r in enumerate(rulesets)]
    seen: set[Any] = set()
    for index, ruleset in enumerate(over):
        mark = over_marks.children[index]
        if not isinstance(ruleset, dict):
            merged.append((ruleset, mark))  # the model refuses it
            continue
        name, before = ruleset.get("name"), ruleset.pop("before", None)
        if isinstance(name, str):
            if name in seen:
                raise _wrong_in(mark, name, "name", name, "each name once")
            seen.add(name)
        found = _index_of(merged, name)
        if found is not None:
            _merge_tables(*merged[found], ruleset, mark)
        else:
            found = len(merged)
            merged.append((ruleset, mark))
        if before is not None:
            moved = merged.pop(found)
            place = _index_of(merged, before)
            if place is None:
                names = [r["name"] for r, _ in merged if isinstance(_name(r), str)]
                hint = suggestion(str(before), names)
                allowed = f"the name of another ruleset{hint and '; ' + hint}"
                raise _wrong_in(mark, name, "before", before, allowed)
            merged.insert(place, moved)
    document.data["rulesets"] = [r for r, _ in merged]
    document.marks.children["rulesets"] = Mark(
        marks.file, marks.line, {i: mark for i, (_, mark) in enumerate(merged)}
    )


def _name(ruleset: Any) -> Any:
    return ruleset.get("name") if isinstance(ruleset, dict) else None


def _index_of(rulesets: list[tuple[Any, Mark]], name: Any) -> int | None:
    return next((i for i, (r, _) in enumerate(rulesets) if _name(r) == name is not None), None)


def _wrong_in(mark: Mark, name: Any, key: str, value: Any, allowed: str) -> PolicyError:
    place = mark.find((key,))
    sentence = f"{value!r} cannot be used; allowed is {allowed}"
    return PolicyError([Mistake(place.file, place.line, f"rulesets.{name}.{key}", sentence)])
