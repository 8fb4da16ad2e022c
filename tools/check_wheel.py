"""Build the source archive and the wheel, install the wheel in fresh environments, and try it.

    python -m tools.check_wheel [--out DIR] [PYTHON...]

PYTHON is a name in PATH, such as python3.12; without one, every supported Python in PATH is tried.
Where the daemon is supported, it is installed and tried too; below, it has to say that it cannot
run. pip fetches what the wheel depends on.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.bpf_toolchain import LIBBPF_CACHE

ROOT = Path(__file__).resolve().parents[1]
SUPPORTED = [(3, minor) for minor in range(10, 15)]
DAEMON_LEAST = (3, 11)
COMPILED = ("build/bin", "build/include", "daemon/agentcgroupd/bpf/objects")
"""Where compilers put what they make in a checkout."""
EXIT_CONFIG = 78
"""What agentcgroupd ends with where it cannot run, from sysexits.h."""

Log = Callable[[str], None]


class CheckError(Exception):
    """Something about the archives or an installation is not as it has to be."""


# --- building ------------------------------------------------------------------------------------


def copy_checkout(into: Path, *, compiled: bool = False) -> Path:
    """Copy what git knows of this checkout, and a libbpf that was fetched before; returns `into`.

    Nothing that is built there comes back. With `compiled`, what compilers made here goes along: a
    build there leaves as it is what is newer than its sources.
    """
    listed = _run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, into / name
        if source.is_file():  # a file that was deleted is still listed
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    if LIBBPF_CACHE.exists():
        shutil.copytree(LIBBPF_CACHE, into / "build/libbpf")
    for made in COMPILED if compiled else ():
        shutil.copytree(ROOT / made, into / made, dirs_exist_ok=True)
    return into


def build(tree: Path, target: str) -> Path:
    """Build "sdist" or "wheel" of a source tree into its directory `out`; returns the archive."""
    hatchling = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", "out"]
    _run(hatchling, cwd=tree, timeout_sec=600)
    (archive,) = (tree / "out").glob("*.whl" if target == "wheel" else "*.tar.gz")
    return archive


def unpack_sdist(archive: Path, into: Path) -> Path:
    """Unpack a source archive; returns the directory that it holds."""
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")
    (directory,) = into.iterdir()
    return directory


# --- installing ----------------------------------------------------------------------------------


def find_pythons(names: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Find interpreters in PATH: their paths with their versions.

    Without `names` all supported ones that are there. Raises CheckError for a name that cannot be
    run or that is a Python that is not supported.
    """
    found = {}
    for name in names or [f"python{major}.{minor}" for major, minor in SUPPORTED]:
        path = shutil.which(name)
        version = _version(path) if path else None
        if path and version in SUPPORTED:
            found[path] = version
        elif names:
            raise CheckError(f"{name} is no Python that is supported")
    return found


def _version(python: str) -> tuple[int, int] | None:
    """Ask an interpreter its version; None where it does not run, as a shim may not."""
    code = "import sys; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    match = re.fullmatch(r"(\d+) (\d+)\n", done.stdout)
    return (int(match[1]), int(match[2])) if match else None


def check_install(wheel: Path, python: str, version: tuple[int, int], work: Path) -> None:
    """Install a wheel in an environment of its own below `work`, and try what it promises.

    Raises CheckError with what went wrong.
    """
    venv = work / f"python{version[0]}.{version[1]}"
    _run([python, "-m", "venv", str(venv)], timeout_sec=300)
    pip = [str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run([*pip, "install", str(wheel)], timeout_sec=600)
    expected = wheel.name.split("-")[1]
    code = "import agentcgroup; print(agentcgroup.__version__)"
    _expect(venv, "python", "-c", code, out=expected)
    _expect(venv, "agentcg", "--help", out="exit codes:")
    _expect(venv, "agentcg", "version", out=expected)
    _expect(venv, "agentcg-exec", "--version", out=f"agentcg-exec {expected}")
    _expect(venv, "agentcg", "exec", "--on-unavailable", "run", "--", "echo", "ran", out="ran")

    needs = "agentcgroup[daemon]" if version >= DAEMON_LEAST else "needs Python 3.11 or later"
    _expect(venv, "agentcgroupd", "--version", err=needs, code=EXIT_CONFIG)
    _expect(venv, "agentcg", "policy", "check", "default", err=needs, code=1)
    # These may work without the extra, or not; in both cases they end without a traceback.
    _expect(venv, "agentcg", "doctor", code=None)
    _expect(venv, "agentcg", "record", "s", "-o", "trace.jsonl", code=None)
    _expect(venv, "agentcg", "replay", "--pool", "1G", "trace.jsonl", code=None)
    if version < DAEMON_LEAST:
        return
    _run([*pip, "install", f"{wheel}[daemon]"], timeout_sec=600)
    _run([*pip, "check"])
    _expect(venv, "agentcgroupd", "--version", out=f"agentcgroupd {expected}")
    _expect(venv, "agentcgroupd", "--check", out="[pool]")
    _expect(venv, "agentcg", "policy", "check", "default", out="policy default: ok")


def _expect(
    venv: Path, program: str, *arguments: str, out: str = "", err: str = "", code: int | None = 0
) -> None:
    """Run a program of an environment; it has to end with `code` and to have written the texts.

    With None it may end with any code. A traceback is always an error.
    """
    command = [str(venv / "bin" / program), *arguments]
    # Away from the checkout, whose folders Python would take for packages, and from any daemon.
    env = {**os.environ, "AGENTCG_RUN_DIR": str(venv / "no-daemon")}
    done = _run(command, cwd=venv, env=env, code=code)
    shown = " ".join([program, *arguments])
    if out not in done.stdout or err not in done.stderr or "Traceback" in done.stderr:
        raise CheckError(f"{shown} wrote:\n{done.stdout}{done.stderr}\nexpected: {out or err}")


def _run(
    argv: list[str],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    timeout_sec: float = 120,
    code: int | None = 0,
) -> subprocess.CompletedProcess[str]:
    """Run a command. Raises CheckError, with what it wrote, for any exit status but `code`.

    With None any status will do.
    """
    done = subprocess.run(
        argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_sec, check=False
    )
    if code is not None and done.returncode != code:
        said = f"{done.stdout}{done.stderr}".strip()
        raise CheckError(f"{' '.join(argv)} ended with {done.returncode}, not {code}:\n{said}")
    return done


def main(argv: list[str] | None = None) -> int:
    """Build, install and try; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.check_wheel", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the archives here")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="agentcgroup-wheel-") as name:
            work = Path(name)
            tree = copy_checkout(work / "tree")
            sdist = build(tree, "sdist")
            # Built from the archive, so that a file that the archive lacks is missed here.
            wheel = build(unpack_sdist(sdist, work / "sdist"), "wheel")
            pythons = find_pythons(arguments.pythons)
            for python, version in pythons.items():
                check_install(wheel, python, version, work)
                print(f"{python} ({version[0]}.{version[1]}): ok", flush=True)
            if not pythons:
                raise CheckError("there is no supported Python in PATH")
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                for archive in (sdist, wheel):
                    print(shutil.copy(archive, arguments.out))
    except CheckError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
