"""Draw docs/architecture.svg, and write the way of a call into docs/architecture.md.

    python -m tools.draw_architecture           write both
    python -m tools.draw_architecture --check   write nothing; exit status 1 where one is stale

Everything comes from the code: the floors from the layers contract in pyproject.toml, which
`make lint` enforces; each package's sentence from its docstring; the counts from its files. The
hops are listed here, and a hop that no longer exists in the code is an error.
"""

from __future__ import annotations

import argparse
import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import tomllib

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/architecture.svg"
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- hops: written by tools.draw_architecture -->", "<!-- end of hops -->"
CONTRACT = "The daemon's packages import one way"

SDK = "agentcgroup"
KERNEL = "the kernel"


@dataclass(frozen=True, slots=True)
class Hop:
    """Function on the way of a call: the file below the root, the name, what it does."""

    file: str
    function: str
    does: str

    @property
    def floor(self) -> str:
        """The package (or module of the daemon's root) whose floor the hop is on."""
        parts = Path(self.file).with_suffix("").parts
        if parts[0] == "daemon":
            return parts[2]
        return SDK if parts[0] == "agent_sdk" else KERNEL


WAY = (
    Hop("agent_sdk/agentcgroup/client.py", "Agent.run", "an agent runs a tool with an intent"),
    Hop("agent_sdk/agentcgroup/packets.py", "Line.send", "the request goes out as one packet"),
    Hop("daemon/agentcgroupd/rpc/attach.py", "AttachServer._rpc", "the caller is identified"),
    Hop("daemon/agentcgroupd/rpc/packets.py", "rpc_request", "the packet becomes a message"),
    Hop("daemon/agentcgroupd/rpc/agent_calls.py", "AgentCalls.begin", "the session is found"),
    Hop(
        "daemon/agentcgroupd/intents/request.py",
        "request_of_proto",
        "the message becomes a typed request, by the one table of parsers",
    ),
    Hop("daemon/agentcgroupd/calls/admission.py", "Admission.begin", "it is let in, or waits"),
    Hop("daemon/agentcgroupd/calls/lifecycle.py", "Calls.grant", "the session may have one more"),
    Hop("daemon/agentcgroupd/intents/grant.py", "grant_for", "what it gets is decided"),
    Hop(
        "daemon/agentcgroupd/calls/queue.py",
        "AdmissionQueue.enter",
        "each resource lets it in at once, or it waits",
    ),
    Hop("daemon/agentcgroupd/calls/lifecycle.py", "Calls.open_call", "it gets its cgroup"),
    Hop("daemon/agentcgroupd/enforce/limits.py", "write_grant", "interface files are written"),
    Hop("daemon/agentcgroupd/observers.py", "Observers.call_opened", "programs follow it"),
    Hop("daemon/agentcgroupd/telemetry/wire.py", "call_to_proto", "the agent is answered"),
)


class NotCurrent(Exception):
    """A hop that the code does not have, or a contract that is gone."""


@dataclass(frozen=True, slots=True)
class Room:
    """A package, or a module of the daemon's root: its docstring, and how many modules it has."""

    name: str
    sentence: str
    modules: int


def floors() -> list[list[str]]:
    """Names of packages by floor, the highest first, from the layers contract. Raises
    NotCurrent."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    for contract in tool["contracts"]:
        if contract["name"] == CONTRACT:
            return [[name.strip() for name in row.split("|")] for row in contract["layers"]]
    raise NotCurrent(f"pyproject.toml has no contract {CONTRACT!r}")


def room(name: str) -> Room:
    """Read a package or module of the daemon."""
    place = ROOT / "daemon/agentcgroupd" / name
    files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    first = place / "__init__.py" if place.is_dir() else files[0]
    return _room(name, first, files)


def _room(name: str, documented: Path, files: list[Path]) -> Room:
    doc = ast.get_docstring(ast.parse(documented.read_text())) or ""
    counted = [path for path in files if path.name != "__init__.py"]
    return Room(name, " ".join(doc.split("\n\n")[0].split()), len(counted))


def functions(file: str) -> set[str]:
    """Qualified names of all functions in a file; C functions by a name before a parenthesis."""
    text = (ROOT / file).read_text()
    if not file.endswith(".py"):
        return {word.split()[-1].lstrip("*") for word in text.split("(") if word.split()}
    found: set[str] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + child.name)
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(text), "")
    return found


def check_hops() -> None:
    """Raise NotCurrent for the first hop that is not in the code."""
    for hop in WAY:
        if not (ROOT / hop.file).exists() or hop.function not in functions(hop.file):
            raise NotCurrent(f"{hop.file} has no {hop.function}: correct WAY in {__file__}")


ROW, LEFT, TEXT, TRACK, STEP = 46, 24, 190, 690, 27
"""Pixels: the height of a floor, the left edges of boxes, sentences and the way, and its step."""
INK, FAINT, FILL, WARM = "#1b2a3a", "#6b7a89", "#e8eef4", "#c2571a"


def _text(
    x: float, y: float, words: str, size: float = 12, color: str = INK, extra: str = ""
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}"{extra}>{escape(words)}</text>'
    )


def _wrap(sentence: str, width: int = 84) -> list[str]:
    lines, line = [], ""
    for word in sentence.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


def picture() -> str:
    """The SVG: floors from top to bottom, and the way of a call through them."""
    sdk_files = sorted((ROOT / "agent_sdk/agentcgroup").rglob("*.py"))
    sdk_files = [path for path in sdk_files if "v1" not in path.parts]
    sdk = _room(SDK, ROOT / "agent_sdk/agentcgroup/__init__.py", sdk_files)
    programs = sorted((ROOT / "bpf").glob("*.bpf.c"))
    kernel = Room(KERNEL, "Programs of bpf/, and the files of cgroup v2.", len(programs))
    rows = [[sdk], *([room(name) for name in row] for row in floors()), [kernel]]
    width = TRACK + STEP * (len(WAY) + 1)
    height = ROW * len(rows) + 70
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="DejaVu Sans, Helvetica, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT, 26, "agentcgroup: who may import whom, and the way of a call", 16),
        _text(
            LEFT,
            44,
            "Each floor may import the floors below it. Grey: how many modules.",
            11,
            FAINT,
        ),
    ]
    where: dict[str, float] = {}
    for number, row in enumerate(rows):
        top = 58 + ROW * number
        out += _floor(row, top, width, where)
    out += _way(where)
    return "\n".join([*out, "</svg>"]) + "\n"


def _floor(row: list[Room], top: float, width: float, where: dict[str, float]) -> list[str]:
    out = [f'<line x1="{LEFT}" y1="{top}" x2="{width - 12}" y2="{top}" stroke="#d5dde5"/>']
    part = (ROW - 6) / len(row)
    for index, each in enumerate(row):
        y = top + 3 + part * index
        middle = y + part / 2
        where[each.name] = middle
        outside = each.name in (SDK, KERNEL)
        out.append(
            f'<rect x="{LEFT}" y="{y:g}" width="150" height="{part - 2:g}" rx="3" '
            f'fill="{"white" if outside else FILL}" stroke="{FAINT}"/>'
        )
        out.append(_text(LEFT + 8, middle + 3, each.name, 12 if len(row) == 1 else 11))
        modules = str(each.modules)
        out.append(_text(LEFT + 143, middle + 3, modules, 9, FAINT, ' text-anchor="end"'))
        wrapped = _wrap(each.sentence)
        if len(row) > 1:
            wrapped = [wrapped[0] if len(wrapped) == 1 else wrapped[0] + " ..."]
        for line, words in enumerate(wrapped[:2]):
            shift = 3 if len(wrapped) == 1 else -3 + 13 * line
            out.append(_text(TEXT, middle + shift, words, 10.5 if len(row) == 1 else 10))
    return out


def _way(where: dict[str, float]) -> list[str]:
    points = [(TRACK + STEP * index, where[hop.floor]) for index, hop in enumerate(WAY)]
    line = " ".join(f"{x:g},{y:g}" for x, y in points)
    out = [f'<polyline points="{line}" fill="none" stroke="{WARM}" stroke-width="1.5"/>']
    for number, (x, y) in enumerate(points, 1):
        out.append(f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="white" stroke="{WARM}"/>')
        out.append(_text(x, y + 3.5, str(number), 10, WARM, ' text-anchor="middle"'))
    return out


def table() -> str:
    """The hops as a table in Markdown."""
    rows = ["| | where | what happens |", "|---|---|---|"]
    for number, hop in enumerate(WAY, 1):
        rows.append(f"| {number} | `{hop.file}` `{hop.function}` | {hop.does} |")
    return "\n".join(rows)


def page(old: str) -> str:
    """The page with its table of hops written anew. Raises NotCurrent without the two marks."""
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise NotCurrent(f"{PAGE} lacks {BEGIN!r} or {END!r}")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    """Write or check both; 1 where something is not current."""
    parser = argparse.ArgumentParser(prog="python -m tools.draw_architecture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    try:
        check_hops()
        made = {PICTURE: picture(), PAGE: page(PAGE.read_text())}
    except NotCurrent as error:
        print(f"architecture: {error}", file=sys.stderr)
        return 1
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if arguments.check:
        for path in stale:
            name = path.relative_to(ROOT)
            print(f"{name} is not current: python -m tools.draw_architecture", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(made[path])
        print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
