"""The configuration as text: each key with its default and what it means, as TOML.

What keys mean stands in one place, docs/configuration.md, which comes with the package.
"""

from __future__ import annotations

import json
import re
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentcgroupd import documents
from agentcgroupd.config import Config, parse_config

WIDTH = 96
_ROW = re.compile(r"^\| `([a-z]+)\.([a-z_]+)` \| (.*?) \| (.*) \|$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\((?:#[^)]*|[^)]*)\)")
_BELOW = re.compile(r"; see \[below\]\([^)]*\)")
_LITERAL = re.compile(r"`([^`]*)`")


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of the configuration. `default`: in words or as it would be written."""

    section: str
    key: str
    default: str
    meaning: str

    @property
    def literal(self) -> str | None:
        """The default as a value in TOML; None: it is described in words."""
        found = _LITERAL.fullmatch(self.default)
        if found is None:
            return None
        text = found[1]
        is_value = text in ("true", "false") or text.isdecimal() or text.startswith("[")
        return text if is_value else json.dumps(text)


def page() -> Path:
    """The page that describes every key: of the checkout, or as it came with the package."""
    package = Path(__file__).resolve().parent
    checkout = package.parents[1]
    if (checkout / "pyproject.toml").exists():
        return checkout / "docs/configuration.md"
    return package / "configuration.md"


def settings() -> list[Setting]:
    """All keys, in the order of the page."""
    return [Setting(*row.groups()) for row in _ROW.finditer(page().read_text(encoding="utf-8"))]


def show(path: Path | None) -> str:
    """A configuration as TOML, every key with its meaning: those that the file sets with its
    values, the others with their defaults. Raises ConfigError."""
    given: dict[str, Any] = {}
    if path is not None:
        document = documents.read(path)
        parse_config(document.data, str(path), document.locations)
        given = document.data
    lines = []
    section = ""
    for setting in settings():
        if setting.section != section:
            section = setting.section
            lines += ["", f"[{section}]"]
        lines += _lines(setting, given.get(section, {}))
    return "\n".join(lines).lstrip("\n") + "\n"


def as_dict(path: Path | None) -> dict[str, Any]:
    """The values in force, each as it is written (sizes and times with their units); a default
    that is described in words is left out. Raises ConfigError."""
    return tomllib.loads(show(path))


def _lines(setting: Setting, given: dict[str, Any]) -> Iterator[str]:
    meaning = _LITERAL.sub(r"\1", _LINK.sub(r"\1", _BELOW.sub("", setting.meaning)))
    yield from textwrap.wrap(meaning, WIDTH, initial_indent="# ", subsequent_indent="# ")
    if setting.key in given:
        yield f"{setting.key} = {_toml(given[setting.key])}  # default: {setting.default}"
    elif setting.literal is not None:
        yield f"{setting.key} = {setting.literal}"
    else:
        yield f"# {setting.key} = (default: {setting.default.replace('`', '')})"


def _toml(value: Any) -> str:
    """Write what tomllib has read."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    # TOML escapes like JSON, but for DEL, which only TOML forbids.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def missing() -> list[str]:
    """Keys that the page does not describe."""
    described = {(setting.section, setting.key) for setting in settings()}
    known = {
        (name, key)
        for name, info in Config.model_fields.items()
        for key in getattr(info.annotation, "model_fields", ())
    }
    return [".".join(key) for key in sorted(known ^ described)]
