"""Writer of abi.py, from the type information of the compiled abi.h.

Run as `python -m agentcgroupd.bpf.generate`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from agentcgroupd.bpf.btf import KIND_ARRAY, KIND_ENUM, KIND_INT, KIND_STRUCT, KIND_VAR, Btf

OBJECTS = Path(__file__).parent / "objects"

HEADER = '''"""Constants and structs that the programs and the daemon share.

Made from bpf/abi.h by `python -m agentcgroupd.bpf.generate`; do not edit.
"""

from __future__ import annotations

import ctypes
import enum
'''


def _scalar(size_bytes: int, is_signed: bool) -> str:
    return f"ctypes.c_{'' if is_signed else 'u'}int{8 * size_bytes}"


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


class Writer:
    """Text of a module with each type once, after the types that it is made of."""

    def __init__(self, btf: Btf) -> None:
        """Begin with the module's head."""
        self._btf = btf
        self._written: set[str] = set()
        self.text = HEADER

    def enum(self, type_id: int) -> None:
        """Write an enum as a class; the one named `abi`, as constants."""
        name, _, _, _ = self._btf.record(type_id)
        values = self._btf.enumerators(type_id)
        if name == "abi":
            self.text += "\n" + "".join(f"{key} = {value}\n" for key, value in values.items())
            return
        prefix = _common_prefix(list(values))
        rows = "".join(f"    {key.removeprefix(prefix)} = {v}\n" for key, v in values.items())
        self.text += (
            f'\n\nclass {_class_name(name)}(enum.IntEnum):\n    """enum {name}"""\n\n{rows}'
        )

    def struct(self, type_id: int) -> str:
        """Write a struct unless it is written already. Returns the name of its class."""
        name, _, _, size = self._btf.record(type_id)
        title = _class_name(name)
        if name in self._written:
            return title
        self._written.add(name)
        rows = hints = ""
        for member in self._btf.members(type_id):
            ctype = self._ctype(member.type_id)
            rows += f'        ("{member.name}", {ctype}),\n'
            hints += f"    {member.name}: {_hint(ctype)}\n"
        fields = f"(\n{rows}    )" if rows.count("\n") > 1 else f"({rows.strip()})"
        self.text += (
            f'\n\nclass {title}(ctypes.Structure):\n    """struct {name}, {size} bytes"""\n\n'
            f"    _fields_ = {fields}\n{hints}"
        )
        return title

    def _ctype(self, type_id: int) -> str:
        type_id = self._btf.strip(type_id)
        name, kind, _, size = self._btf.record(type_id)
        if kind == KIND_STRUCT:
            return self.struct(type_id)
        if kind == KIND_ARRAY:
            element, count = self._btf.array(type_id)
            return f"{self._ctype(element)} * {count}"
        if kind == KIND_INT and name == "char":
            return "ctypes.c_char"
        if kind == KIND_INT:
            return _scalar(size, not name.startswith(("unsigned", "long unsigned")))
        raise TypeError(f"{name}: a type of kind {kind} cannot be shared")


def _hint(ctype: str) -> str:
    """The Python type of a member, for type checkers."""
    element, is_array, _ = ctype.partition(" * ")
    if is_array:
        return "bytes" if element == "ctypes.c_char" else f"ctypes.Array[{element}]"
    return "int" if ctype.startswith("ctypes.") else ctype


def _common_prefix(names: list[str]) -> str:
    parts = names[0].split("_")
    while parts and not all(name.startswith("_".join(parts) + "_") for name in names):
        parts.pop()
    return "_".join(parts) + "_" if parts else ""


def generate(path: Path) -> str:
    """The text of abi.py for a compiled abi.bpf.c. Raises BpfError."""
    btf = Btf.of_file(path)
    writer = Writer(btf)
    variables = []
    for type_id in btf.ids():
        name, kind, _, inner = btf.record(type_id)
        if kind == KIND_VAR:
            variables.append((name, btf.strip(inner)))
    structs = []
    for _, type_id in variables:
        kind = btf.record(type_id)[1]
        if kind == KIND_ENUM:
            writer.enum(type_id)
        elif kind == KIND_STRUCT:
            structs.append(type_id)
    for type_id in structs:
        writer.struct(type_id)
    btf.close()
    return writer.text


def main() -> int:
    """Write abi.py, or with --check only compare it. Returns the exit status."""
    parser = argparse.ArgumentParser(description="write abi.py from abi.bpf.o")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    arguments = parser.parse_args()
    target = Path(__file__).with_name("abi.py")
    text = generate(OBJECTS / "abi.bpf.o")
    if arguments.check:
        return 0 if target.read_text() == text else 1
    target.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
