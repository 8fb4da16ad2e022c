"""Policies from files: one document, and drop-ins laid over it.

A drop-in says only what is different. Its tables are merged over the document's. A ruleset whose
name is known replaces only the keys that it has; a new one is put at the end, or before the ruleset
that it names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agentcgroupd import documents
from agentcgroupd.locations import Location
from agentcgroupd.mistakes import ErrorDetail
from agentcgroupd.policy.errors import PolicyError, details_of
from agentcgroupd.policy.lint import lint
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.toml import to_toml
from agentcgroupd.units import suggestion

DEFAULT = Path("default")
_BUILT_IN_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A policy and where it comes from."""

    policy: Policy
    sources: tuple[Path, ...]
    """The document, then its drop-ins in their order."""
    text: str
    """The whole policy as TOML, defaults and drop-ins included."""
    warnings: tuple[str, ...] = ()


def load_policy(
    path: Path | None, drop_in: Path | None = None, limit_bytes: int | None = None
) -> Loaded:
    """Read a policy.

    `path`: a file, or the name of a policy that came with the daemon; None: the default.
    `drop_in`: a directory of drop-ins, which need not be there. `limit_bytes`: the pool's size for
    the warnings, where it is known. Raises PolicyError, a ConfigError.
    """
    sources = find_sources(path, drop_in)
    document = documents.read(sources[0])
    for source in sources[1:]:
        _merge(document, documents.read(source))
    policy = _validate(document)
    return Loaded(policy, sources, to_toml(policy), tuple(lint(policy, limit_bytes)))


def parse_policy(text: str, name: str = "policy") -> Policy:
    """Read a whole document that is no file. Raises PolicyError, whose message calls the document
    `name`."""
    return _validate(documents.parse(text, name))


def built_in() -> dict[str, Path]:
    """Return the policies that came with the daemon, by name."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parents[1] / "policies"
    directory = checkout if (checkout.parent / "pyproject.toml").exists() else package / "policies"
    return {p.stem: p for p in sorted(directory.glob("*.toml"))}


def find_sources(path: Path | None, drop_in: Path | None) -> tuple[Path, ...]:
    """Return the files that make up a policy, whether or not they can be read. Raises
    PolicyError."""
    return _find_document(path or DEFAULT), *_find_drop_ins(drop_in)


def _find_document(path: Path) -> Path:
    name = str(path)
    if not _BUILT_IN_NAME.fullmatch(name):
        return path
    known = built_in()
    if name in known:
        return known[name]
    names = ", ".join(known) or "none, for none came with the daemon"
    sentence = f"there is no such policy; allowed is a path such as ./mine.toml, or one of {names}"
    hint = suggestion(name, known)
    raise documents.wrong(path, 0, f"{sentence}; {hint}" if hint else sentence)


def _find_drop_ins(directory: Path | None) -> list[Path]:
    """Return a directory's drop-ins in the order of their names. Hidden files are left out; backups
    that editors make do not end in .toml, or are hidden."""
    if directory is None:
        return []
    try:
        found = sorted(directory.iterdir(), key=lambda p: p.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise documents.unreadable(directory, error) from None
    return [p for p in found if p.suffix == ".toml" and not p.name.startswith(".")]


def _validate(document: documents.Document) -> Policy:
    try:
        return Policy.model_validate(document.data)
    except ValidationError as error:
        raise PolicyError(*details_of(error, document.data, document.locations)) from None


# Drop-ins

_Placed = tuple[Any, Location]
"""A ruleset as tomllib read it, and where it stands."""


def _merge(document: documents.Document, drop_in: documents.Document) -> None:
    """Lay `drop_in` over `document`. Raises PolicyError."""
    rulesets = drop_in.data.get("rulesets")
    if isinstance(rulesets, list) and isinstance(document.data.get("rulesets", []), list):
        _merge_rulesets(document, rulesets, drop_in.locations.children["rulesets"])
        del drop_in.data["rulesets"]
    _merge_tables(document.data, document.locations, drop_in.data, drop_in.locations)


def _merge_tables(
    data: dict[str, Any], locations: Location, over: dict[str, Any], over_locations: Location
) -> None:
    for key, value in over.items():
        before, location = data.get(key), over_locations.children[key]
        if isinstance(before, dict) and isinstance(value, dict) and _same_kind(before, value):
            _merge_tables(before, locations.children[key], value, location)
        else:
            data[key], locations.children[key] = value, location


def _same_kind(before: dict[str, Any], over: dict[str, Any]) -> bool:
    """Tell whether two tables can be merged: the keys of one kind of action say nothing about
    another kind."""
    action = before.get("action")
    return bool(over.get("action", action) == action)


def _merge_rulesets(
    document: documents.Document, over: list[Any], over_locations: Location
) -> None:
    """Lay a drop-in's rulesets over the document's. Raises PolicyError."""
    locations = document.locations.children.get("rulesets", over_locations)
    merged = [(r, locations.children[i]) for i, r in enumerate(document.data.get("rulesets", []))]
    seen: set[str] = set()
    for index, ruleset in enumerate(over):
        location = over_locations.children[index]
        if not isinstance(ruleset, dict):
            merged.append((ruleset, location))  # The model refuses it.
            continue
        name, before = ruleset.get("name"), ruleset.pop("before", None)
        if isinstance(name, str):
            if name in seen:
                raise _refused(location, name, "name", name, "each name once")
            seen.add(name)
        found = _index_of(merged, name)
        if found is not None:
            _merge_tables(*merged[found], ruleset, location)
        else:
            found = len(merged)
            merged.append((ruleset, location))
        if before is not None:
            _move(merged, found, before, location)
    document.data["rulesets"] = [r for r, _ in merged]
    document.locations.children["rulesets"] = Location(
        locations.file, locations.line, {i: location for i, (_, location) in enumerate(merged)}
    )


def _move(rulesets: list[_Placed], index: int, before: Any, location: Location) -> None:
    """Move a ruleset before the one that is named. `location`: where the drop-in says so. Raises
    PolicyError if there is none of that name."""
    moved = rulesets.pop(index)
    place = _index_of(rulesets, before)
    if place is None:
        names = [r["name"] for r, _ in rulesets if isinstance(_name(r), str)]
        hint = suggestion(str(before), names)
        allowed = f"the name of another ruleset{hint and '; ' + hint}"
        raise _refused(location, _name(moved[0]), "before", before, allowed)
    rulesets.insert(place, moved)


def _name(ruleset: Any) -> Any:
    return ruleset.get("name") if isinstance(ruleset, dict) else None


def _index_of(rulesets: list[_Placed], name: Any) -> int | None:
    """Return the index of the ruleset of this name; None where there is none."""
    if name is None:
        return None
    return next((i for i, (ruleset, _) in enumerate(rulesets) if _name(ruleset) == name), None)


def _refused(location: Location, name: Any, key: str, value: Any, allowed: str) -> PolicyError:
    """An error in one key of a drop-in's ruleset."""
    place = location.find((key,))
    sentence = f"{value!r} cannot be used; allowed is {allowed}"
    return PolicyError(ErrorDetail(place.file, place.line, f"rulesets.{name}.{key}", sentence))
