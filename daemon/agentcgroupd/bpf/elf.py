"""Offsets of functions in a shared library's file, where a probe is to be put.

Reads what that needs of ELF-64, little endian (elf(5)): program headers and dynamic symbols. A
library may come from a container and have any content; everything that is read from it is checked.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Container, Iterator
from pathlib import Path

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_PT_LOAD, _SHT_DYNSYM, _STT_FUNC, _STT_GNU_IFUNC = 1, 11, 2, 10
SYMBOLS_MOST = 1 << 20
NAME_MOST = 256


class NotElf(ValueError):
    """The file is no shared library for this kind of machine, or a damaged one."""


class Library:
    """An open library. Use as a context manager."""

    def __init__(self, path: str | Path) -> None:
        """Map the file and read its headers. Raises OSError or NotElf."""
        with open(path, "rb") as file:
            try:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise NotElf(f"{path} is empty") from None
        try:
            self._read()
        except struct.error as error:
            self.close()
            raise NotElf(f"{path}: {error}") from None
        except BaseException:
            self.close()
            raise
        self._path = path

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file."""
        self._data.close()

    def _read(self) -> None:
        header = _HEADER.unpack_from(self._data)
        if header[0][:6] != b"\x7fELF\x02\x01":
            raise NotElf("no 64-bit little-endian ELF file")
        ph_offset, sh_offset = header[5], header[6]
        ph_size, ph_count, sh_size, sh_count = header[9:13]
        self._loads = []
        for index in range(ph_count):
            kind, _, offset, address, _, size, _, _ = _PROGRAM.unpack_from(
                self._data, ph_offset + index * ph_size
            )
            if kind == _PT_LOAD:
                self._loads.append((address, size, offset))
        sections = [
            _SECTION.unpack_from(self._data, sh_offset + i * sh_size) for i in range(sh_count)
        ]
        self._symbols = [
            (s[4], min(s[5] // _SYMBOL.size, SYMBOLS_MOST), sections[s[6]][4], sections[s[6]][5])
            for s in sections
            if s[1] == _SHT_DYNSYM and s[6] < len(sections)
        ]

    def mentions(self, name: str) -> bool:
        """Whether the name is among the symbols' names. Quicker than `exports`, to leave out the
        many libraries that have no such symbol."""
        text = b"\0" + name.encode() + b"\0"
        return any(
            self._data.find(text, start, start + size) >= 0 for _, _, start, size in self._symbols
        )

    def exports(self, names: Container[str] | None = None) -> Iterator[tuple[str, int]]:
        """Functions that the library defines: (name, offset in the file), of `names` or of all.
        Raises NotElf."""
        for offset, count, strings, _ in self._symbols:
            for index in range(count):
                try:
                    name_at, info, _, section, value, _ = _SYMBOL.unpack_from(
                        self._data, offset + index * _SYMBOL.size
                    )
                except struct.error as error:
                    raise NotElf(f"{self._path}: {error}") from None
                if info & 0xF not in (_STT_FUNC, _STT_GNU_IFUNC) or not section or not value:
                    continue
                start = strings + name_at
                end = self._data.find(b"\0", start, start + NAME_MOST)
                name = self._data[start:end].decode("ascii", "replace") if end >= 0 else ""
                if name and (names is None or name in names):
                    place = self.offset_of(value)
                    if place is not None:
                        yield name, place

    def offset_of(self, address: int) -> int | None:
        """Offset in the file of what is loaded at an address; None: no part of the file is."""
        for start, size, offset in self._loads:
            if start <= address < start + size:
                return int(address - start + offset)
        return None


def first_export(path: Path) -> int:
    """Offset in the file of some function of a library. Raises OSError or NotElf."""
    with Library(path) as library:
        for _, offset in library.exports():
            return offset
    raise NotElf(f"{path} has no function")
