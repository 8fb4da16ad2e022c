"""Errors in a policy, in words: file, line, key, value, what is allowed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from agentcgroupd.config import Section
from agentcgroupd.errors import VALUE_SHOWN_CHARS, ConfigError, InvalidField
from agentcgroupd.policy.locations import Location
from agentcgroupd.policy.schema import AnyAction, Detector, Policy
from agentcgroupd.units import suggestion

Path = tuple[str | int, ...]


def _by_tag(union: Any, key: str) -> dict[str, type[Section]]:
    """Return the models of a tagged union by their tags. `key`: the field that holds the tag."""
    models = get_args(get_args(union)[0])
    return {get_args(m.model_fields[key].annotation)[0]: m for m in models}


DETECTORS = _by_tag(Detector, "detector")
ACTIONS = _by_tag(AnyAction, "action")

MISSING = "it is missing"


@dataclass(frozen=True, slots=True)
class ErrorDetail:
    """An error in a policy. `line` 0: the file as a whole."""

    file: str
    line: int
    key: str
    sentence: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(filter(None, (place, self.key, self.sentence)))


class PolicyError(ConfigError):
    """A policy that cannot be used. The message has a line for each of its errors."""

    def __init__(self, *errors: ErrorDetail) -> None:
        self.errors = errors
        super().__init__("\n".join(map(str, errors)))


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
    # A misspelt key is told once: the key that was meant is not missing as well.
    for path, sentence in list(found.items()):
        meant = re.match(r"no such key; did you mean '(.*)'\?", sentence)
        if meant and found.get((*path[:-1], meant[1])) == MISSING:
            del found[(*path[:-1], meant[1])]
    details = []
    for path, sentence in found.items():
        # Pydantic counts an array whose elements are wrong as empty, too.
        if not any(_is_within(other, path) for other in found):
            place = locations.find(path)
            details.append(ErrorDetail(place.file, place.line, key_of(path, data), sentence))
    return sorted(details, key=lambda d: (d.file != locations.file, d.file, d.line))


def _is_within(path: Path, outer: Path) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


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
    cause = context.get("error")
    if isinstance(cause, InvalidField):
        if isinstance(item["input"], dict):  # Two keys of this table contradict each other.
            parts = re.findall(r"[^.\[\]]+", cause.field)
            path += tuple(int(part) if part.isdigit() else part for part in parts)
        return path, f"{_shown(cause.value)} cannot be used; allowed is {cause.allowed}"
    if kind == "extra_forbidden":
        known = _section(path[:-1], item).model_fields
        hint = suggestion(str(path[-1]), known) or "known are " + ", ".join(known)
        return path, f"no such key; {hint}"
    if kind == "missing":
        return path, MISSING
    if kind == "union_tag_not_found":
        tag = _discriminator(context)
        words = ", ".join(DETECTORS if tag == "detector" else ACTIONS)
        return (*path, tag), f"it is missing; allowed is {words}"
    if kind == "union_tag_invalid":
        sentence = _not_among(context["tag"], context["expected_tags"])
        return (*path, _discriminator(context)), sentence
    if kind == "literal_error":
        return path, _not_among(item["input"], context["expected"])
    return path, f"{_shown(item['input'])} cannot be used; allowed is {_allowed(item)}"


def _discriminator(context: Any) -> str:
    return str(context["discriminator"]).strip("'")


def _not_among(value: object, expected: str) -> str:
    """Say which words are allowed. `expected`: words in quotes, as pydantic lists them."""
    words = re.findall(r"'([^']*)'", expected)
    hint = suggestion(str(value), words)
    sentence = f"{_shown(value)} cannot be used; allowed is {', '.join(words)}"
    return f"{sentence}; {hint}" if hint else sentence


_ALLOWED = {
    "string_pattern_mismatch": "1 to 63 small letters, digits, - and _, the first no - or _",
    "too_short": "one or more",
    "tuple_type": "an array",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "int_type": "a value",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "finite_number": "a finite number",
}


def _allowed(item: Any) -> str:
    text = _ALLOWED.get(item["type"])
    if text is None:
        return str(item["msg"]).removeprefix("Input should be ").split(",")[0]
    return text.format(**item.get("ctx", {}))


def _shown(value: object) -> str:
    """Return a value as it would be written in TOML, cut where it is long."""
    if isinstance(value, dict):
        return "a table"
    if value is None:
        return "''"  # An empty text is read as None.
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= VALUE_SHOWN_CHARS else f"{text[:VALUE_SHOWN_CHARS]}..."


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
