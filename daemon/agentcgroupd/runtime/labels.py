"""What a container says of itself: labels (annotations of pods) that make it a session.

`agentcgroup.session` is its name, or `true` for a name made of the container's;
`agentcgroup.label.KEY` is a label of the session; the other labels are limits of the session, by
the names that options of `agentcg session adopt` have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.config_containers import LABEL_FIELDS, LABEL_OF_SESSION, ContainerRule
from agentcgroupd.errors import InvalidField
from agentcgroupd.units import parse_labels

PREFIX = "agentcgroup."
SESSION = f"{PREFIX}session"
OF_SESSION = f"{PREFIX}{LABEL_OF_SESSION}"
ID_CHARS_MAX = 63
SHORT_ID = 12
"""Characters of a container's id that runtimes show."""
VALUE_CHARS_MAX = 256
"""The longest value of a label that is looked at."""
WORDS = {"true": "yes", "false": "no"}
"""What labels say where a session's spec says the other."""


@dataclass(frozen=True, slots=True)
class Container:
    """A running container, as its runtime tells of it."""

    runtime: str
    """Which: `docker`, `podman`, `nri`..."""
    id: str
    """64 hexadecimal digits."""
    name: str
    image: str
    pid: int
    """The first process, in the daemon's pid namespace; 0: not known."""
    labels: Mapping[str, str]
    cgroup: str = ""
    """Path below the cgroup2 mount, where the runtime tells it; empty: that of its process."""


@dataclass(frozen=True, slots=True)
class Wish:
    """The session that a container is to be."""

    spec: pb.SessionSpec
    ignored: tuple[str, ...] = ()
    """Labels of ours that mean nothing; a clause each."""


def wish_of(container: Container, rules: Sequence[ContainerRule]) -> Wish | None:
    """What a container asks to be, by its labels and by the first rule that fits it; labels win.
    None: no session."""
    labels = {**_of_rules(container, rules), **_of_labels(container.labels)}
    name = labels.pop(SESSION, None)
    if name is None or name.lower() == "false":
        return None
    spec = pb.SessionSpec(id=session_id(container.name if name in ("", "true") else name))
    ignored = []
    for label, value in labels.items():
        if label.startswith(OF_SESSION):
            ignored += _label_of_session(spec, label.removeprefix(OF_SESSION), value)
            continue
        field = LABEL_FIELDS.get(label.removeprefix(PREFIX))
        if field is None:
            ignored.append(f"{label[:VALUE_CHARS_MAX]!r} is no label that is known")
        elif len(value) > VALUE_CHARS_MAX:
            ignored.append(f"{label!r} has more than {VALUE_CHARS_MAX} characters")
        elif field:
            setattr(spec, field, WORDS.get(value, value) if field == "exec_is_call" else value)
    return Wish(spec, tuple(ignored))


def _label_of_session(spec: pb.SessionSpec, key: str, value: str) -> list[str]:
    """Give the session a label; returns why not, as a clause, where it cannot have that."""
    try:
        parse_labels("label", {**spec.labels, key: value})
    except InvalidField as error:
        return [error.sentence]
    spec.labels[key] = value
    return []


def wanted(
    labels: Mapping[str, str], name: str, image: str, rules: Sequence[ContainerRule]
) -> bool:
    """Whether a container may become a session, from what an event tells of it."""
    return SESSION in labels or any(_fits(rule, name, image) for rule in rules)


def _of_labels(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if name.startswith(PREFIX)}


def _of_rules(container: Container, rules: Sequence[ContainerRule]) -> dict[str, str]:
    for rule in rules:
        if _fits(rule, container.name, container.image):
            given = {f"{PREFIX}{name}": value for name, value in rule.labels.items()}
            return {SESSION: "true", **given}
    return {}


def _fits(rule: ContainerRule, name: str, image: str) -> bool:
    return fnmatchcase(image, rule.image) and fnmatchcase(name, rule.name)


def session_id(name: str) -> str:
    """A session's id made of a container's name, or of what a label says."""
    text = re.sub(r"[^a-z0-9_.-]", "-", name.lower()).lstrip("_.-")
    return text[:ID_CHARS_MAX] or "container"


def other_id(session: str, container: str) -> str:
    """An id for a container whose own is taken. `container`: its id."""
    return f"{session[: ID_CHARS_MAX - SHORT_ID - 1]}-{container[:SHORT_ID].lower()}"
