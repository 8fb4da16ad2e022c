"""Makes the inputs of the recorded agents, all of them here, from nothing but the standard library.

    python -m bench.agents.prepare WORK [PART...]

WORK/repo     a git repository with some hundred commits of text and of data
WORK/wheels   a wheel with a thousand modules, to be installed without a network
WORK/data     a table of measurements (CSV), 1.2 million rows
WORK/cpp      C++ sources that a compiler has work with
WORK/suite    a test suite for pytest
"""

from __future__ import annotations

import base64
import hashlib
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

WORDS = [f"{a}{b}{c}" for a in "bdgklmnprst" for b in "aeiou" for c in "lmnrst"]
COMMITS, FILES = 240, 160
ROWS = 1_200_000
MODULES = 1000


def text(rng: random.Random, lines: int) -> str:
    """Lines of made-up words: they compress and differ as source text does."""
    return "".join(" ".join(rng.choices(WORDS, k=12)) + "\n" for _ in range(lines))


def make_repo(directory: Path, rng: random.Random) -> None:
    """A history by `git fast-import`: text that changes a little, and some large binary files."""
    subprocess.run(["git", "init", "-q", "-b", "main", str(directory)], check=True)
    files = {f"src/part{i:03}/module.txt": text(rng, 400) for i in range(FILES)}
    stream: list[bytes] = []
    for number in range(COMMITS):
        for name in rng.sample(sorted(files), 12):
            lines = files[name].splitlines(keepends=True)
            for _ in range(20):
                lines[rng.randrange(len(lines))] = text(rng, 1)
            files[name] = "".join(lines)
        message = f"change {number}".encode()
        stream.append(
            b"commit refs/heads/main\ncommitter A <a@example.org> %d +0000\n"
            % (1_600_000_000 + number)
        )
        stream.append(b"data %d\n%s\n" % (len(message), message))
        contents = {name: body.encode() for name, body in files.items()}
        if number % 12 == 0:
            # The same megabytes with a piece of them replaced: work for the delta search.
            blob = bytearray(random.Random(1).randbytes(6_000_000))
            at = rng.randrange(5_000_000)
            blob[at : at + 200_000] = rng.randbytes(200_000)
            contents[f"data/{number % 36}.bin"] = bytes(blob)
        for name, body in contents.items():
            stream.append(b"M 100644 inline %s\ndata %d\n%s\n" % (name.encode(), len(body), body))
    subprocess.run(
        ["git", "-C", str(directory), "fast-import", "--quiet", "--depth=0"],
        input=b"".join(stream),
        check=True,
    )


def make_wheel(directory: Path, rng: random.Random) -> None:
    """A wheel (a zip archive with a record of its files) of modules with tables and functions."""
    directory.mkdir()
    entries: dict[str, bytes] = {"bigpkg/__init__.py": b'"""Many modules."""\n'}
    for number in range(MODULES):
        table = ", ".join(repr(word) for word in rng.choices(WORDS, k=600))
        functions = "".join(
            f"def f{i}(x):\n    return [x + {i}, {rng.random()}, TABLE[{i}]]\n\n\n"
            for i in range(60)
        )
        entries[f"bigpkg/m{number}.py"] = f"TABLE = [{table}]\n\n\n{functions}".encode()
    info = "bigpkg-1.0.dist-info"
    entries[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: bigpkg\nVersion: 1.0\n"
    entries[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: bench\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = ""
    for name, body in entries.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(body)}\n"
    entries[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    with zipfile.ZipFile(
        directory / "bigpkg-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED
    ) as out:
        for name, body in entries.items():
            out.writestr(name, body)


def make_data(directory: Path, rng: random.Random) -> None:
    """A table as instruments write them."""
    directory.mkdir()
    with (directory / "measured.csv").open("w", encoding="ascii") as out:
        out.write("when,where,value,error,note\n")
        for number in range(ROWS):
            where = WORDS[rng.randrange(200)]
            value = rng.gauss(100, 15)
            out.write(
                f"{1_700_000_000 + number},{where},{value:.4f},{value / 50:.4f},{number % 7}\n"
            )


CPP = """
#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <regex>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>
template <int N> struct Node {{
    std::map<std::string, std::variant<int, double, std::string>> table;
    std::unordered_map<int, std::vector<std::shared_ptr<Node>>> children;
    std::function<int(int)> f = [this](int x) {{ return x + N + (int)table.size(); }};
    int sum(int depth) const {{
        int total = 0;
        for (const auto &[key, list] : children)
            for (const auto &child : list)
                total += depth ? child->sum(depth - 1) + f(key) : N;
        for (const auto &[key, value] : table)
            total += std::visit([](const auto &v) {{ return (int)sizeof(v) + N; }}, value);
        return total;
    }}
    void sort(std::vector<Node *> &all) const {{
        std::stable_sort(all.begin(), all.end(), [](const Node *a, const Node *b) {{
            return a->table.size() * N < b->table.size();
        }});
    }}
}};
template <int N> int one() {{
    Node<N> node;
    std::vector<Node<N> *> list{{&node}};
    node.sort(list);
    return node.sum(3);
}}
template <int... N> int all(std::integer_sequence<int, N...>) {{
    return (... + one<N + {first}>());
}}
int part{part}() {{ return all(std::make_integer_sequence<int, {count}>()); }}
"""


def make_cpp(directory: Path) -> None:
    """Three sources of many template instances each, one heavier than the others; and a main."""
    directory.mkdir()
    for part, count in enumerate((8, 16, 36)):
        source = CPP.format(first=part * 1000, part=part, count=count)
        (directory / f"part{part}.cpp").write_text(source, encoding="ascii")
    (directory / "main.cpp").write_text(
        "int part0(), part1(), part2();\n"
        "int main() { return (part0() + part1() + part2()) & 1; }\n",
        encoding="ascii",
    )


SUITE = """
import json
import random

import pytest


@pytest.fixture(scope="module")
def records():
    rng = random.Random({seed})
    return [{{"id": i, "name": str(rng.random()), "tags": [rng.random() for _ in range(8)]}}
            for i in range({n})]


def test_round_trip(records):
    assert json.loads(json.dumps(records)) == records


def test_index(records):
    index = {{record["name"]: record for record in records}}
    assert len(index) == len(records)


@pytest.mark.parametrize("key", range(40))
def test_sorted(records, key):
    found = sorted(records, key=lambda record: record["tags"][key % 8])
    assert found[0]["tags"][key % 8] <= found[-1]["tags"][key % 8]
"""


def make_suite(directory: Path) -> None:
    """Modules whose fixtures hold some hundred megabytes, one after the other."""
    directory.mkdir()
    for number, n in enumerate((20_000, 120_000, 300_000)):
        source = SUITE.format(seed=number, n=n)
        (directory / f"test_part{number}.py").write_text(source, encoding="ascii")


def main() -> None:
    """Make the named parts (all, if none is named) below the given directory."""
    work, names = Path(sys.argv[1]), sys.argv[2:]
    rng = random.Random(7)
    parts: dict[str, Callable[[Path], None]] = {
        "repo": lambda directory: make_repo(directory, rng),
        "wheels": lambda directory: make_wheel(directory, rng),
        "data": lambda directory: make_data(directory, rng),
        "cpp": make_cpp,
        "suite": make_suite,
    }
    work.mkdir(parents=True, exist_ok=True)
    for name in names or parts:
        parts[name](work / name)


if __name__ == "__main__":
    main()
