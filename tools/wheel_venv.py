"""Make an environment with the wheel of this checkout, as it is installed on a host.

    python -m tools.wheel_venv [DIR]

What the wheel depends on is taken from the environment that runs this, so nothing is fetched.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tools import check_wheel

VENV = Path(__file__).resolve().parents[1] / "build/wheel-venv"


def make(directory: Path = VENV) -> Path:
    """Build the wheel, and make the environment anew; returns its directory of programs."""
    if directory.exists():
        shutil.rmtree(directory)
    with tempfile.TemporaryDirectory(prefix="agentcgroup-wheel-") as work:
        tree = check_wheel.copy_checkout(Path(work) / "tree", compiled=True)
        wheel = check_wheel.build(tree, "wheel")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        python = directory / "bin/python"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
        subprocess.run([*pip, *install], check=True)
    # Only now, or pip would take the checkout's own installation for this one.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = directory / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "compileall", "-q", site], check=True)
    return directory / "bin"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.wheel_venv", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", type=Path, nargs="?", default=VENV, metavar="DIR")
    arguments = parser.parse_args(argv)
    print(make(arguments.directory.absolute()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
