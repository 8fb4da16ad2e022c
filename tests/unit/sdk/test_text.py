"""Text of others is shown without what would change a terminal."""

from __future__ import annotations

import json
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from agentcgroup.text import escaped_json, printable, printable_lines

# Categories of the Unicode Character Database: controls, formats, surrogates, separators of lines.
UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
SHOWN_FORMATS = {"\u0600", "\u0601", "\u0602", "\u0603", "\u0604", "\u0605", "\u06dd", "\u070f"}
"""Signs that are drawn around what follows; they neither hide nor turn anything."""


def test_plain_text_stays() -> None:
    for text in (
        "",
        "pytest -q",
        "größe",
        "\N{SNOWMAN}",
        "🙂",
        "日本語",
        "עברית",
        "a\N{NO-BREAK SPACE}b",
    ):
        assert printable(text) == printable_lines(text) == text


def test_every_control_and_format_is_replaced() -> None:
    for code in range(0x110000):
        char = chr(code)
        if unicodedata.category(char) not in UNSAFE or char in SHOWN_FORMATS:
            continue
        if 0x890 <= code <= 0x8E2 or 0x110BD <= code <= 0x1343F:
            continue  # more of the same kind, in scripts of their own
        assert printable(char) == "?", hex(code)


@given(st.text(st.characters(codec=None)))
def test_properties(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text) and printable(shown) == shown
    shown.encode()
    assert printable_lines(text).count("\n") == text.count("\n")
    document = escaped_json(json.dumps([text], indent=2, ensure_ascii=False))
    assert json.loads(document) == [text]
    assert printable_lines(document) == document
