"""Sandboxes as agents put their commands in: a seccomp filter that refuses sockets, and bubblewrap
with namespaces of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("refuse.c")
NAMESPACES = (
    *("--unshare-user", "--unshare-pid", "--unshare-cgroup", "--unshare-ipc", "--unshare-uts"),
    *("--die-with-parent", "--new-session", "--ro-bind", "/", "/", "--dev", "/dev"),
    *("--proc", "/proc", "--tmpfs", "/run"),
)
"""bubblewrap's options: a mount namespace, in which the root is read-only, it makes always. The
daemon's sockets cannot be seen."""
KINDS = ("socket", "connect", "namespaces", "all", "all, connect")
"""Refused: sockets of the kind AF_UNIX, as Claude Code's sandbox does; connect(2), as Codex's does.
Or nothing is, but the namespaces are new; or these and the sockets; or these and connect(2)."""


def compile_filter(directory: Path) -> Path:
    """Compile the program that installs a filter, and return its path."""
    program = directory / "refuse"
    argv = ["cc", "-O2", "-Wall", "-Werror", "-static", "-o", str(program), str(SOURCE)]
    subprocess.run(argv, check=True)
    return program


def sandbox(kind: str, program: Path) -> list[str]:
    """Return the beginning of a command line whose rest runs in a sandbox of this kind."""
    refuse = {"all": "socket", "all, connect": "connect", "namespaces": ""}.get(kind, kind)
    inside = ["bwrap", *NAMESPACES, "--"] if kind not in ("socket", "connect") else []
    return [*inside, str(program), refuse] if refuse else inside
