"""An intent in the environment of a program, for harnesses that execute each tool in a container
from outside: `docker exec -e AGENTCG_CALL_MEMORY_MAX=2G ...`."""

from __future__ import annotations

import re

from agentcgroupd.intents.parse import PARSERS, Intent, check_name, parse_intent

PREFIX = "AGENTCG_CALL_"
HINT = "AGENT_RESOURCE_HINT"
ENVIRONMENT_BYTES_MAX = 65_536
"""Most that is read of an environment."""
_ENTRY = re.compile(rb"(?<![^\0])(?:%b([^=\0]*)|%b)=([^\0]*)" % (PREFIX.encode(), HINT.encode()))
"""An entry that is for us, found without looking at the others one by one: an agent may have made
tens of thousands of them."""


def texts_in(environment: bytes) -> dict[str, str]:
    """Find the fields of an intent, and a name, in an environment as /proc/<pid>/environ has it:
    AGENTCG_CALL_ and the field in capitals. Of a variable that is there twice the first counts, as
    for getenv(3)."""
    texts: dict[str, str] = {}
    for entry in _ENTRY.finditer(environment[:ENVIRONMENT_BYTES_MAX]):
        name, value = entry.groups()
        field = "hint" if name is None else name.decode("ascii", "replace").lower()
        texts.setdefault(field, value.decode("utf-8", "replace"))
    return {field: text for field, text in texts.items() if text}


def declared_in(environment: bytes) -> tuple[str, Intent]:
    """Read the name (empty: none) and the intent in an environment. Raises InvalidField."""
    texts = texts_in(environment)
    name = texts.pop("name", "")
    if name:
        check_name(name)
    return name, parse_intent({"leftovers": "keep"} | texts)


FIELDS = ("name", *PARSERS)
"""What may be said so."""
