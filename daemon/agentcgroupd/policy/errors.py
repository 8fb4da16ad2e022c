"""Errors in a policy, in words: file, line, key, value, what is allowed."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from agentcgroupd.config import Section
from agentcgroupd.locations import Location
from agentcgroupd.mistakes import DocumentError, ErrorDetail, Path, explained, in_order, not_among
from agentcgroupd.policy.schema import AnyAction, Detector, Policy

PolicyError = DocumentError
"""A policy that cannot be used."""


def _by_tag(union: Any, key: str) -> dict[str, type[Section]]:
    """Return the models of a tagged union by their tags. `key`: the field that holds the tag."""
    models = get_args(get_args(union)[0])
    return {get_args(m.model_fields[key].annotation)[0]: m for m in models}


DETECTORS = _by_tag(Detector, "detector")
ACTIONS = _by_tag(AnyAction, "action")


def key_of(path: Path, data: dict[str, Any]) -> str:
    """Return a path as text, such as `rulesets.freeze.when[0].below`: rulesets go by their names,
    where they have one."""
    text, value = "", data
    for part in path:
        try:
            value = value[part]  # type: ignore[index]  # There are lists below the top.
        except (KeyError, IndexError, TypeError):
            value = {}
        name = value.get("name") if text == "rulesets" and isinstance(value, dict) else None
        if isinstance(name, str):
            text += f".{name}"
        elif isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def details_of(
    error: ValidationError, data: dict[str, Any], locations: Location
) -> list[ErrorDetail]:
    """Return the errors in a document that pydantic refused, in the order of their lines: first
    those of the document's own file, then those of its drop-ins."""
    found: dict[Path, str] = {}
    for item in error.errors():
        path, sentence = _explained(_path(item["loc"]), item)
        found.setdefault(path, sentence)
    return in_order(found, {path: key_of(path, data) for path in found}, locations)


def _path(loc: tuple[int | str, ...]) -> Path:
    """Return the path in the document: pydantic puts the kind of detector or action in between."""
    path: list[str | int] = []
    tagged = False
    for part in loc:
        kinds: dict[str, type[Section]] = {}
        if path[-1:] == ["do"]:
            kinds = ACTIONS
        elif path[-2:-1] == ["when"]:
            kinds = DETECTORS
        tagged = not tagged and part in kinds
        if not tagged:
            path.append(part)
    return tuple(path)


def _explained(path: Path, item: Any) -> tuple[Path, str]:
    """Return the exact place of one of pydantic's errors, and what is wrong there in words."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "union_tag_not_found":
        tag = _discriminator(context)
        words = ", ".join(DETECTORS if tag == "detector" else ACTIONS)
        return (*path, tag), f"it is missing; allowed is {words}"
    if kind == "union_tag_invalid":
        sentence = not_among(context["tag"], context["expected_tags"])
        return (*path, _discriminator(context)), sentence
    return explained(path, item, _section(path[:-1], item) if kind == "extra_forbidden" else None)


def _discriminator(context: Any) -> str:
    return str(context["discriminator"]).strip("'")


def _section(path: Path, item: Any) -> type[BaseModel]:
    """Return the model of the table at a path, in which an unknown key was found."""
    loc = item["loc"][:-1]
    if path[-1:] == ("do",):
        return ACTIONS[str(loc[-1])]
    if path[-2:-1] == ("when",):
        return DETECTORS[str(loc[-1])]
    model: type[BaseModel] = Policy
    for part in path:
        if isinstance(part, str):
            model = _model_of(model.model_fields[part])
    return model


def _model_of(info: FieldInfo) -> type[BaseModel]:
    """Return the one model that a field's annotation names."""
    types = [a for a in (info.annotation, *get_args(info.annotation)) if isinstance(a, type)]
    (model,) = [t for t in types if issubclass(t, BaseModel)]
    return model
