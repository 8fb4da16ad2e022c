"""Ten commands as agents run them, each of which asks the machine how much there is, and the files
that they need."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20

WORKER = """
import sys
mib, work = int(sys.argv[1]), int(sys.argv[2])
held = bytearray(mib << 20)
for page in range(0, len(held), 4096):
    held[page] = 1
total = 0
for number in range(work):
    total += number & 3
"""
POOL = """
import multiprocessing, os, subprocess, sys
worker, mib, work, counted_by = sys.argv[1:]
def one(number):
    return subprocess.run([sys.executable, worker, mib, work]).returncode
if __name__ == "__main__":
    count = len(os.sched_getaffinity(0)) if counted_by == "affinity" else None
    with multiprocessing.Pool(count) as pool:
        sys.exit(1 if any(pool.map(one, range(24), chunksize=1)) else 0)
"""
TESTS = """
import pytest, subprocess, sys
@pytest.mark.parametrize("number", range(24))
def test_one(number):
    subprocess.run([sys.executable, "worker.py", "{mib}", "{work}"], check=True)
"""
HEAVY = """
#include <bits/stdc++.h>
int f(const std::string &s)
{
	std::regex r("(a|b)*c+[0-9]{3}");
	std::map<std::string, std::vector<std::variant<int, std::string>>> m;
	std::smatch k;
	m[s].push_back(std::string("x"));
	return std::regex_search(s, k, r) + (int)m.size();
}
"""
THREADS = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
static size_t mib;
static void *one(void *unused)
{
	volatile unsigned long total = 0;
	char *volatile scratch = malloc(mib << 20);
	memset(scratch, 1, mib << 20);
	for (size_t i = 0; i < 100000000; i++)
		total += scratch[i % (mib << 20)];
	free(scratch);
	return unused;
}
int main(int argc, char **argv)
{
	mib = atoi(argv[argc - 1]);
#ifdef _OPENMP
#pragma omp parallel
	one(NULL);
#else
	pthread_t threads[1024];
	cpu_set_t may;
	sched_getaffinity(0, sizeof(may), &may);
	for (int i = 0; i < CPU_COUNT(&may); i++)
		pthread_create(&threads[i], NULL, one, NULL);
	for (int i = 0; i < CPU_COUNT(&may); i++)
		pthread_join(threads[i], NULL);
#endif
	return 0;
}
"""
LINES = """
import random, sys
chosen = random.Random(1)
block = b"".join(chosen.randbytes(200).hex().encode() + b"\\n" for _ in range(20000))
for number in range(int(sys.argv[1]) * 1048576 // len(block) + 1):
    sys.stdout.buffer.write(block)
"""
CACHE = """
import os, sys
size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(sys.argv[1])
held = bytearray(size)
for page in range(0, len(held), 4096):
    held[page] = 1
"""


@dataclass(frozen=True, slots=True)
class Command:
    """A shell command, and what counts the CPUs or the memory for it."""

    name: str
    script: str
    asks: str
    is_counted: bool = True
    """Whether it is one of the ten."""


def prepare(
    folder: Path, limit_mib: int, work: int, pool_python: str = sys.executable
) -> list[Command]:
    """Write the files of all commands; returns those whose programs are here.

    A worker takes a tenth of the call's memory: two fit well, sixteen do not. `work`: turns of its
    loop. `pool_python`: the Python that counts CPUs for a pool of processes.
    """
    mib = limit_mib // 10
    files = {"worker.py": WORKER, "pool.py": POOL, "lines.py": LINES, "cache.py": CACHE}
    files |= {"test_many.py": TESTS.replace("{mib}", str(mib)).replace("{work}", str(work))}
    # The last one keeps pytest from the settings of the checkout that this is in.
    files |= {"threads.c": THREADS, "heavy.cc": HEAVY, "pytest.ini": "[pytest]\n"}
    for name, text in files.items():
        (folder / name).write_text(text)
    objects = " ".join(f"{n}.o" for n in range(16))
    head = f".PHONY: all\nall: {objects}\n%.o:\n"
    worker = f"{sys.executable} {folder}/worker.py {mib} {work}"
    pool = f"{pool_python} pool.py worker.py {mib} {work}"
    compile = f"g++ -std=c++17 -c -o $@ {folder}/heavy.cc"
    (folder / "Makefile").write_text(f"{head}\t@{compile} && rm $@\n")
    (folder / "Makefile.small").write_text(f"{head}\t@{worker}\n")
    # g++ takes some 300 MiB for the file; a smaller call has workers in its place.
    makefile = "Makefile" if limit_mib >= 2048 and shutil.which("g++") else "Makefile.small"
    with (folder / "core").open("wb") as core:
        core.truncate(limit_mib * MIB * 2 // 5)
    # Sixteen blocks; a thread takes some 290 MiB at -7, and 12 MiB at -1.
    level = 7 if limit_mib >= 2048 else 1
    python = _with_xdist() or sys.executable
    commands = [
        Command("make", f"make -s -f {makefile} -j$(nproc)", "nproc"),
        Command("xargs", f"seq 24 | xargs -P$(nproc) -I@number@ {worker}", "nproc"),
        Command("shell", f"for i in $(seq $(nproc)); do {worker} & done; wait", "nproc"),
        Command(
            "pytest",
            f"{python} -m pytest -q -p no:cacheprovider -n auto test_many.py",
            "PYTEST_XDIST_AUTO_NUM_WORKERS",
        ),
        Command("OpenMP", f"./omp {mib}", "OMP_NUM_THREADS"),
        Command("threads", f"./threads {mib}", "sched_getaffinity"),
        Command("pool, affinity", f"{pool} affinity", "sched_getaffinity"),
        Command("pool", f"{pool} count", "os.cpu_count"),
        Command("xz", f"xz -{level} -T0 -c core", "sched_getaffinity"),
        Command(
            "sort",
            f"{sys.executable} lines.py {limit_mib * 5 // 4} | LC_ALL=C sort -T .",
            "nproc, RLIMIT_RSS",
        ),
        Command("cache", f"{sys.executable} cache.py 8", "sysconf(_SC_PHYS_PAGES)", False),
    ]
    missing = {name for name, is_here in _needed(folder).items() if not is_here}
    return [command for command in commands if command.name not in missing]


def _with_xdist() -> str:
    """The Python that has pytest-xdist; empty: none has."""
    for python in (sys.executable, shutil.which("python3") or sys.executable):
        words = [python, "-c", "import pytest, xdist"]
        if subprocess.run(words, capture_output=True).returncode == 0:
            return python
    return ""


def _needed(folder: Path) -> dict[str, bool]:
    """Whether the programs of the commands that need some are here; builds what is to be built."""
    needed = {"make": bool(shutil.which("make")), "xz": bool(shutil.which("xz"))}
    needed["pytest"] = bool(_with_xdist())
    for name, option in (("threads", "-pthread"), ("omp", "-fopenmp")):
        words = ["gcc", "-O1", option, "-o", name, "threads.c"]
        done = shutil.which("gcc") and subprocess.run(words, cwd=folder, capture_output=True)
        needed["OpenMP" if name == "omp" else name] = bool(done and done.returncode == 0)
    return needed
