"""Tables of text in columns, for terminals."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Make a line for each row, the columns two spaces apart. `right`: the numbers, from 0, of the
    columns that are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], rule: bool = False) -> list[str]:
    """A line with the headers, then one line a row. A column whose header starts with ">" is
    aligned to the right. `rule`: with dashes below the headers."""
    titles = [header.removeprefix(">") for header in headers]
    right = [number for number, header in enumerate(headers) if header.startswith(">")]
    lines = aligned([titles, *rows], right)
    if rule:
        columns = zip(titles, *rows, strict=True)
        lines.insert(1, "  ".join("-" * max(map(len, column)) for column in columns))
    return lines
