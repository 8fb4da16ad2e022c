"""Types that the programs declare, compared with the running kernel's BTF; types that the daemon
declares, compared with the programs'."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agentcgroupd.bpf import abi, features, sched
from agentcgroupd.bpf.btf import (
    KIND_ARRAY,
    KIND_ENUM,
    KIND_INT,
    KIND_PTR,
    KIND_STRUCT,
    KIND_TYPEDEF,
    KIND_UNION,
    Btf,
    kernel_btf,
)
from agentcgroupd.bpf.generate import OBJECTS, generate
from agentcgroupd.bpf.libbpf import libbpf
from tests.harness import ROOT

pytestmark = pytest.mark.programs

ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
HERE = ARCHITECTURES[os.uname().machine]
SIZES = {
    **dict.fromkeys(("char", "bool", "__u8"), 1),
    "__u16": 2,
    **dict.fromkeys(("int", "unsigned int", "__u32", "__s32"), 4),
    **dict.fromkeys(("long", "unsigned long", "__u64", "__s64"), 8),
}
"""Sizes of types in bytes, on the machines that bpf/ is for."""

# --- What kernel.h declares -----------------------------------------------------------------------


@dataclass(frozen=True)
class Declared:
    """A struct, typedef of a struct, or enum; `name` of one of its members, or nothing for the type
    itself. `text`: the member's type, with `*` for a pointer; `count`: None for no array."""

    kind: str
    type: str
    name: str = ""
    text: str = ""
    count: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.type}{'.' if self.name else ''}{self.name}"


_STATEMENT = re.compile(
    r"\s*(?:typedef (?P<old>[\w ]+?) (?P<new>\w+)"
    r"|(?:typedef )?(?P<kind>struct|enum)(?: (?P<name>\w+))?"
    r"(?:\s*\{(?P<body>[^{}]*)\}\s*(?P<alias>\w+)?)?)\s*;"
)
_MEMBER = re.compile(r"(?P<text>[\w ]+?\s*\*?)\s*\b(?P<name>\w+)(?:\[(?P<count>\d+)\])?\s*;")
_ENUMERATOR = re.compile(r"(?P<name>\w+)(?: = \w+)?(?:,|$)")


def active_text(text: str, architecture: str) -> str:
    """C text without comments and directives, and with one architecture's branches only."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    kept: list[str] = []
    branches: list[bool] = []
    for line in text.splitlines():
        condition = re.match(r"\s*#\s*(ifdef|ifndef|if|elif|else|endif)\b\s*(.*)", line)
        if condition is None:
            if all(branches) and not re.match(r"\s*#", line):
                kept.append(line)
            continue
        word, tested = condition.groups()
        if word in ("elif", "else", "endif"):
            branches.pop()
        if word != "endif":
            named = re.search(r"__TARGET_ARCH_(\w+)", tested)
            branches.append(named is None or named[1] == architecture)
    return "\n".join(kept)


def read_all(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Matches that follow one another to the end of the text; AssertionError at what is none."""
    place, text = 0, text.rstrip()
    while place < len(text):
        place += len(text[place:]) - len(text[place:].lstrip())
        found = pattern.match(text, place)
        assert found, f"cannot be read: {text[place : place + 60]!r}"
        yield found
        place = found.end()


def declared(text: str, architecture: str) -> tuple[list[Declared], dict[str, str]]:
    """All that a header declares, and its typedefs of other types."""
    found: list[Declared] = []
    typedefs: dict[str, str] = {}
    for statement in read_all(_STATEMENT, active_text(text, architecture)):
        if statement["new"]:
            typedefs[statement["new"]] = statement["old"]
            continue
        kind, name = statement["kind"], statement["name"] or statement["alias"]
        if statement["alias"]:
            kind = "typedef"
        found.append(Declared(kind, name))
        if kind == "enum":
            entries = read_all(_ENUMERATOR, statement["body"])
            found += [Declared(kind, name, entry["name"]) for entry in entries]
        elif statement["body"]:
            for member in read_all(_MEMBER, statement["body"]):
                count = int(member["count"]) if member["count"] else None
                found.append(Declared(kind, name, member["name"], member["text"].strip(), count))
    return found, typedefs


KERNEL_H = (ROOT / "bpf/kernel.h").read_text(encoding="ascii")
DECLARED, TYPEDEFS = declared(KERNEL_H, HERE)

# --- What the kernel has --------------------------------------------------------------------------


def kinds_of(declaration: Declared) -> tuple[int, ...]:
    """The BTF kinds that a declared type can have."""
    if declaration.kind == "enum":
        return (KIND_ENUM,)
    return (KIND_TYPEDEF,) if declaration.kind == "typedef" else (KIND_STRUCT, KIND_UNION)


def misfit(kernel: Btf, declaration: Declared, typedefs: dict[str, str]) -> str:
    """Fault of a declaration on this kernel; empty if it fits."""
    # A flavor is another form of the kernel's own type.
    name = declaration.type.partition("___")[0]
    type_id = kernel.find(name, *kinds_of(declaration))
    if type_id is None:
        return f"the kernel has no {declaration.kind} {name}"
    if not declaration.name:
        return ""
    if declaration.kind == "enum":
        return "" if declaration.name in kernel.enumerators(type_id) else "no such enumerator"
    member = kernel.member(kernel.strip(type_id), declaration.name)
    if member is None:
        return "no such member"
    text, inner = declaration.text, member.type_id
    if declaration.count is not None:
        if kernel.record(kernel.strip(inner))[1] != KIND_ARRAY:
            return "no array in the kernel"
        inner, count = kernel.array(kernel.strip(inner))
        if count and count < declaration.count:
            return f"an array of {count} in the kernel"
    return misfit_of_type(kernel, inner, text, typedefs)


def misfit_of_type(kernel: Btf, type_id: int, text: str, typedefs: dict[str, str]) -> str:
    """Fault of a member's type; empty if it fits."""
    name, kind, _, size = kernel.record(kernel.strip(type_id))
    if text.endswith("*"):
        if kind != KIND_PTR:
            return "no pointer in the kernel"
        to = text.rstrip("* ").removeprefix("struct ")
        name = kernel.record(kernel.strip(kernel.record(kernel.strip(type_id))[3]))[0]
        # What is only compared may point to anything, a function as well.
        fits = to in (name, "void")
        return "" if fits else f"a pointer to {name or 'something unnamed'} in the kernel"
    if text.startswith("struct "):
        fits = kind == KIND_STRUCT and name == text.removeprefix("struct ")
        return "" if fits else f"{name or 'something unnamed'} in the kernel"
    while text in typedefs:
        text = typedefs[text]
    if text not in SIZES:  # a typedef of a struct
        wanted = kernel.find(text, KIND_TYPEDEF)
        fits = wanted is not None and kernel.strip(wanted) == kernel.strip(type_id)
        return "" if fits else f"{name or 'something unnamed'} in the kernel"
    if kind != KIND_INT:
        return "no integer in the kernel"
    return "" if size == SIZES[text] else f"{size} bytes in the kernel"


# --- Tests ----------------------------------------------------------------------------------------


def test_nothing_in_the_header_is_overlooked() -> None:
    """Every type with a body has been read, for one architecture or another."""
    everywhere = {entry for arch in ARCHITECTURES.values() for entry in declared(KERNEL_H, arch)[0]}
    bare = re.sub(r"/\*.*?\*/", "", KERNEL_H, flags=re.DOTALL)
    bodies = re.findall(r"(\w+) \{", bare) + re.findall(r"\} (\w+);", bare)
    assert {name for name in bodies if name != "struct"} == {
        entry.type for entry in everywhere if entry.name
    }
    inside = "".join(re.findall(r"\{([^}]*)\}", bare))
    # Members end in a semicolon, enumerators in a comma.
    assert len([e for e in everywhere if e.name]) == inside.count(";") + inside.count(",")
    for entry in sorted(map(str, everywhere - set(DECLARED))):
        print(f"left out here, of another architecture: {entry}")


@pytest.mark.parametrize("declaration", DECLARED, ids=str)
def test_the_kernel_has_it(declaration: Declared) -> None:
    assert misfit(kernel_btf(), declaration, TYPEDEFS) == ""


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("struct no_such_struct;", "no struct no_such_struct"),
        ("struct cgroup___old { int nothing_like_it; };", "no such member"),
        ("struct task_struct { unsigned long exit_code; };", "4 bytes"),
        ("struct task_struct { struct mm_struct mm; };", "in the kernel"),
        ("struct task_struct { struct cgroup *mm; };", "a pointer to mm_struct"),
        ("struct task_struct { int mm; };", "no integer"),
        ("struct task_struct { int *exit_code; };", "no pointer"),
        ("struct task_struct { int pid[2]; };", "no array"),
        ("struct task_struct { char comm[1024]; };", "an array of 16"),
        ("struct signal_struct { atomic64_t live; };", "in the kernel"),
        ("enum memcg_memory_event { MEMCG_NEVER };", "no such enumerator"),
    ],
)
def test_a_wrong_declaration_is_found(text: str, wrong: str) -> None:
    entries, _ = declared(text, HERE)
    assert wrong in misfit(kernel_btf(), entries[-1], TYPEDEFS)


@pytest.mark.parametrize("text", ["struct a { int b : 3; };", "union a { int b; };", "int a"])
def test_what_the_reader_does_not_know_is_an_error(text: str) -> None:
    with pytest.raises(AssertionError, match="cannot be read"):
        declared(text, HERE)


SCHED_KERNEL_H = (ROOT / "bpf/sched_kernel.h").read_text(encoding="ascii")
SCHED_STRUCTS = re.findall(r"^struct (\w+) \{$", SCHED_KERNEL_H, re.MULTILINE)


def resolved_size(types: Btf, type_id: int) -> int:
    """Size of a type in bytes."""
    return int(libbpf().call("btf__resolve_size", types._handle, type_id))


@pytest.mark.parametrize("name", SCHED_STRUCTS)
def test_the_kernel_has_what_the_scheduler_uses(name: str) -> None:
    """Each member of each struct, of the same kind and size. (Its functions are compared when it is
    loaded.)"""
    (definition,) = features.definitions_of(sched.OBJECT)
    state = features.gate(definition, kernel_btf())
    if not state.works:
        pytest.skip(state.reason)
    kernel, ours = kernel_btf(), Btf.of_file(OBJECTS / "sched.bpf.o")
    theirs_id = kernel.find(name.partition("___")[0], KIND_STRUCT)
    ours_id = ours.find(name, KIND_STRUCT)
    assert ours_id is not None, "the scheduler does not use it"
    if name.startswith("bpf_iter_"):  # the kernel's own name for what is opaque to programs
        assert theirs_id is not None and ours.record(ours_id)[3] == kernel.record(theirs_id)[3]
        return
    assert theirs_id is not None, f"the kernel has no struct {name}"
    for member in ours.members(ours_id):
        found = kernel.member(theirs_id, member.name)
        assert found is not None, f"the kernel has no {name}.{member.name}"
        mine, its = ours.strip(member.type_id), kernel.strip(found.type_id)
        kind = ours.record(mine)[1]
        assert kernel.record(its)[1] == kind, f"{name}.{member.name} is of another kind"
        if kind in (KIND_INT, KIND_ENUM):
            assert resolved_size(kernel, its) == resolved_size(ours, mine), member.name


def test_the_daemon_has_the_programs_types() -> None:
    """The text of abi.py is what abi.h, as compiled, makes it."""
    text = Path(abi.__file__).read_text(encoding="ascii")
    assert text == generate(OBJECTS / "abi.bpf.o"), "run `python -m agentcgroupd.bpf.generate`"


@pytest.fixture(scope="module")
def shared() -> Iterator[Btf]:
    """The types of the compiled abi.h."""
    types = Btf.of_file(OBJECTS / "abi.bpf.o")
    yield types
    types.close()


def names_in_abi_h(kind: str) -> set[str]:
    """Names of the structs, or enums, that abi.h declares."""
    text = (ROOT / "bpf/abi.h").read_text(encoding="ascii")
    return set(re.findall(rf"^{kind} (\w+) {{$", text, re.MULTILINE))


def test_all_of_abi_h_is_in_abi_py(shared: Btf) -> None:
    for kind, number in (("struct", KIND_STRUCT), ("enum", KIND_ENUM)):
        names = names_in_abi_h(kind)
        assert len(names) > 3
        compiled = {shared.record(i)[0] for i in shared.ids() if shared.record(i)[1] == number}
        assert names <= compiled, "abi.bpf.c has no variable of it"


@pytest.mark.parametrize("name", sorted(names_in_abi_h("struct")))
def test_no_struct_has_padding(shared: Btf, name: str) -> None:
    """Padding would carry the kernel's memory to the daemon; and both sides agree on the size."""
    type_id = shared.find(name, KIND_STRUCT)
    assert type_id is not None
    place = 0
    for member in shared.members(type_id):
        assert member.offset_bits == place * 8, f"padding before {name}.{member.name}"
        place += libbpf().call("btf__resolve_size", shared._handle, member.type_id)
    assert place == shared.record(type_id)[3], f"padding at the end of {name}"
    title = "".join(part.capitalize() for part in name.split("_"))
    assert ctypes.sizeof(getattr(abi, title)) == place
