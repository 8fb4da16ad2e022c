"""Process trees that are played again: programs with the very names and arguments that agents
start, in the same order, by the same ways of forking.

A tree is a list of words for the player (player.c), which the functions here make. Each process
says where it should be, in a call or with the agent, and notes where it is.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("player.c")
VARIABLE = "AGENTCG_TREE"

Words = list[str]


def does(*parts: Words) -> Words:
    """What a process does, one thing after the other."""
    return [word for part in parts for word in part]


def _child(how: Words, parts: Sequence[Words]) -> Words:
    words = [*does(*parts), "end", "0"]
    return [*how, str(len(words)), *words]


def fork(*parts: Words) -> Words:
    """Fork a child that does this."""
    return _child(["fork"], parts)


def spawn(argv: Sequence[str], *parts: Words, comm: str = "", setsid: bool = False) -> Words:
    """Start a program as posix_spawn(3) does, which then does this."""
    before: Words = ["setsid"] if setsid else []
    return _child(["spawn"], [before, become(argv, comm=comm), *parts])


def thread(name: str, *parts: Words) -> Words:
    """Have a thread of that name fork a child that does this."""
    return _child(["thread", name], parts)


def become(argv: Sequence[str], *parts: Words, comm: str = "") -> Words:
    """Execute a program, which then does this. `comm`: the name of its file, where that is not its
    first argument's."""
    file = comm or argv[0].rpartition("/")[2].removeprefix("-")
    return does(["exec", file, str(len(argv)), *argv], *parts)


def start(argv: Sequence[str], *parts: Words, comm: str = "") -> Words:
    """Fork a child that executes a program, which then does this."""
    return fork(become(argv, *parts, comm=comm))


def called(name: str) -> Words:
    """Change the process's own name."""
    return ["name", name]


def inside(label: str) -> Words:
    """Wait until the process is in a call, and note which."""
    return ["inside", label]


def outside(label: str) -> Words:
    """Note where the process is, which should be with the agent."""
    return ["outside", label]


def nap(ms: int) -> Words:
    """Wait."""
    return ["nap", str(ms)]


SETSID: Words = ["setsid"]
GROUP: Words = ["group"]
JOIN: Words = ["join"]
WAIT: Words = ["wait"]


@dataclass(frozen=True)
class Note:
    """Where a process was."""

    should_be: str
    """`inside` or `outside` of a call."""
    label: str
    pid: int
    cgroup: str

    @property
    def expected(self) -> str:
        """The name of the call that it should be in; empty: in none."""
        return self.label if self.should_be == "inside" else ""

    @property
    def call_id(self) -> str:
        """The innermost call; empty: it was in none."""
        _, found, call_id = self.cgroup.rpartition("/call-")
        return call_id.partition("/")[0] if found else ""


class Player:
    """The compiled player, and the trees that it plays."""

    def __init__(self, directory: Path) -> None:
        """Compile it."""
        self._directory = directory
        self._links = directory / "bin"
        self._links.mkdir()
        self._program = directory / "player"
        options = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
        subprocess.run(["cc", *options, "-o", str(self._program), str(SOURCE)], check=True)
        self._count = 0

    def prepare(self, tree: Words) -> tuple[str, dict[str, str], Path]:
        """Return the program that begins to play a tree, the variables that it needs, and the file
        that will hold its notes."""
        for name in {"start", *_programs(tree)}:
            link = self._links / name
            if not link.exists():
                link.hardlink_to(self._program)
        self._count += 1
        file = self._directory / f"tree-{self._count}"
        file.write_bytes(b"".join(word.encode() + b"\0" for word in [*tree, "wait", "end", "0"]))
        notes = file.with_name(file.name + ".notes")
        return str(self._links / "start"), {VARIABLE: f"{file}:0"}, notes


def _programs(tree: Words) -> Iterator[str]:
    """Names of the files that a tree executes."""
    rest = iter(tree)
    for word in rest:
        match word:
            case "exec":
                yield next(rest)
                for _ in range(int(next(rest))):
                    next(rest)
            case "thread":
                next(rest), next(rest)
            case "setsid" | "group" | "join" | "wait":
                pass
            case _:
                next(rest)


def notes_in(file: Path) -> list[Note]:
    """What the processes of a tree have noted."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    rows = [line.split("\t", 3) for line in lines]
    return [Note(should_be, label, int(pid), cgroup) for should_be, label, pid, cgroup in rows]
