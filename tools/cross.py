"""Cross-compile what runs in the kernel and before it, for 64-bit ARM.

    python -m tools.cross [--out build/cross]

clang compiles for every machine; what it lacks is the other machine's C library and a linker, which
come from Debian's packages for cross-compiling. They are unpacked below build/, not installed. The
result is what a wheel for that machine has to hold beside its Python, and was never run on it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools import build_hook
from tools.bpf_toolchain import ToolchainError, ensure_libbpf, find_clang
from tools.debian_suites import Apt, SuiteError, find_mirror, twice, unpack

ROOT = Path(__file__).resolve().parents[1]
MACHINE, TRIPLE = "aarch64", "aarch64-linux-gnu"
SUITE, GCC, LLVM = "bookworm", "12", "14"
"""The oldest Debian whose clang can do this, so that its linker runs on all newer ones."""
PACKAGES = [
    "libc6-dev-arm64-cross",
    "libc6-arm64-cross",
    "linux-libc-dev-arm64-cross",
    f"libgcc-{GCC}-dev-arm64-cross",
    f"lld-{LLVM}",
    f"libllvm{LLVM}",
]


class CrossError(Exception):
    """Something could not be compiled; the text says what."""


def fetch(work: Path) -> Path:
    """Fetch and unpack what clang lacks; returns the directory. Raises SuiteError."""
    root = work / "sysroot"
    if (root / "usr" / TRIPLE / "lib/libc.a").exists():
        return root
    debs = work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    apt = Apt(work / "apt", SUITE, find_mirror())

    def download() -> list[Path]:
        apt.update()
        return apt.download(PACKAGES, debs)

    root.mkdir(exist_ok=True)
    unpack(twice(download, lambda line: print(f"cross: {line}", file=sys.stderr)), root)
    return root


def compile_program(root: Path, clang: str, source: Path, target: Path, version: str) -> None:
    """Compile and link one C program statically. Raises CrossError."""
    libraries = root / "usr" / TRIPLE / "lib"
    runtime = root / "usr/lib/gcc-cross" / TRIPLE / GCC
    places = [f"-{letter}{path}" for path in (libraries, runtime) for letter in "BL"]
    argv = [
        *(clang, "-target", TRIPLE, *build_hook.CFLAGS, f'-DAGENTCG_VERSION="{version}"'),
        *(f"-I{ROOT / 'build/include'}", "-isystem", str(root / "usr" / TRIPLE / "include")),
        *places,
        f"--ld-path={root / f'usr/lib/llvm-{LLVM}/bin/ld.lld'}",
        *("-o", str(target), str(source)),
    ]
    shared = os.pathsep.join(
        str(root / path) for path in ("usr/lib/x86_64-linux-gnu", f"usr/lib/llvm-{LLVM}/lib")
    )
    done = subprocess.run(
        argv,
        env={**os.environ, "LD_LIBRARY_PATH": shared},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CrossError(f"{source.name} for {MACHINE}: {done.stderr.strip()}")


def machine_of(path: Path) -> int:
    """Return e_machine of an ELF file (elf.h): 183 is AArch64, 247 BPF."""
    data = path.read_bytes()[:20]
    if data[:4] != b"\x7fELF":
        raise CrossError(f"{path} is no ELF file")
    return int.from_bytes(data[18:20], "little")


def build(out: Path, version: str) -> list[Path]:
    """Compile all programs and all BPF objects into `out`; returns them. Raises CrossError,
    SuiteError, ToolchainError, OSError."""
    libbpf, clang = ensure_libbpf(), find_clang()
    root = fetch(out)
    made = []
    for directory in (out / "bin", out / "objects"):
        directory.mkdir(parents=True, exist_ok=True)
    for name, source in build_hook.PROGRAMS.items():
        made.append(out / "bin" / name)
        compile_program(root, str(clang), ROOT / source, made[-1], version)
    for source in sorted((ROOT / "bpf").glob("*.bpf.c")):
        made.append(out / "objects" / f"{source.stem}.o")
        build_hook.compile_object(ROOT, clang, libbpf, source, made[-1], MACHINE)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    from agentcgroup import __version__

    parser = argparse.ArgumentParser(prog="python -m tools.cross", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=ROOT / "build/cross", metavar="DIR")
    try:
        for path in build(parser.parse_args(argv).out.absolute(), __version__):
            print(path)
    except (CrossError, SuiteError, ToolchainError, OSError) as error:
        print(f"cross: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
