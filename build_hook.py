"""Build step run by hatchling: gRPC code from proto/, and the static C programs.

Runs for wheels and for editable installs alike, so that a checkout and an installed wheel hold the
same files. Nothing it makes is committed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO = Path("proto/agentcgroup/v1/agentcgroup.proto")
CFLAGS = ["-std=c11", "-O2", "-g0", "-static", "-Wall", "-Wextra", "-Werror", "-Wl,--build-id=none"]
PROGRAMS = {
    "agentcg-exec": Path("agent_sdk/exec/agentcg-exec.c"),
    "agentcg": Path("agent_sdk/exec/agentcg.c"),
    "agentcg-load": Path("daemon/load/agentcg-load.c"),
}


def generate_grpc(root: Path) -> None:
    """Write agentcgroup_pb2{,_grpc}.py and their stubs below agent_sdk/agentcgroup/v1."""
    out = root / "agent_sdk"
    well_known = str(files("grpc_tools") / "_proto")
    plugin_dir = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{plugin_dir}{os.pathsep}{os.environ.get('PATH', '')}"}
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc",
            f"-I{root / 'proto'}", f"-I{well_known}",
            f"--python_out={out}", f"--grpc_python_out={out}",
            f"--mypy_out={out}", f"--mypy_grpc_out={out}",
            str(root / PROTO),
        ],
        check=True,
        env=env,
    )  # fmt: skip
    (out / "agentcgroup/v1/__init__.py").write_text('"""Generated from proto/."""\n')


def compile_programs(root: Path) -> None:
    """Compile each C program to build/bin, statically, so that it starts in a fraction of a ms."""
    bin_dir = root / "build/bin"
    bin_dir.mkdir(parents=True, exist_ok=True)
    for name, source in PROGRAMS.items():
        target = bin_dir / name
        path = root / source
        if target.exists() and target.stat().st_mtime > path.stat().st_mtime:
            continue
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, *CFLAGS, "-o", str(target), str(path)], check=True)


class BuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling's entry point."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make everything that is built, then tell hatchling that the wheel is for one machine."""
        root = Path(self.root)
        generate_grpc(root)
        compile_programs(root)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{os.uname().machine}"
