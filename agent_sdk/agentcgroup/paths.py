"""Paths of the daemon's sockets and of the launcher."""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import cache

from agentcgroup.errors import LauncherNotFound

LAUNCHER = "agentcg-exec"
DEFAULT_RUN_DIR = "/run/agentcgroup"


def run_dir() -> str:
    """Return the directory of the daemon's sockets: $AGENTCG_RUN_DIR, else /run/agentcgroup."""
    return os.environ.get("AGENTCG_RUN_DIR") or DEFAULT_RUN_DIR


def agent_socket(directory: str) -> str:
    """Return the path of the gRPC socket for agents below a run directory."""
    return f"{directory}/agent/grpc.sock"


def attach_socket(directory: str) -> str:
    """Return the path of the attach socket for agents below a run directory."""
    return f"{directory}/agent/attach.sock"


def admin_socket(directory: str) -> str:
    """Return the path of the gRPC socket for the operator below a run directory."""
    return f"{directory}/admin/grpc.sock"


def admin_attach_socket(directory: str) -> str:
    """Return the path of the attach socket for the operator below a run directory."""
    return f"{directory}/admin/attach.sock"


def find_launcher() -> str:
    """Return the absolute path of agentcg-exec.

    $AGENTCG_EXEC, a path, is believed as it is; else the launcher is looked for beside this
    interpreter's scripts, then in $PATH. The search is made once per process and value of
    $AGENTCG_EXEC.

    Raises:
        LauncherNotFound: it is in none of these places.
    """
    return _find(os.environ.get("AGENTCG_EXEC", ""))


@cache
def _find(override: str) -> str:
    if override:
        if os.access(override, os.X_OK) and not os.path.isdir(override):
            return os.path.abspath(override)
        raise LauncherNotFound(f"AGENTCG_EXEC is {override}, which is not a program")
    beside = os.path.join(sysconfig.get_path("scripts"), LAUNCHER)
    if os.access(beside, os.X_OK):
        return beside
    found = shutil.which(LAUNCHER)
    if found is not None:
        return os.path.abspath(found)
    raise LauncherNotFound(
        f"{LAUNCHER} is neither in {os.path.dirname(beside)} nor in PATH; it comes with "
        "'pip install agentcgroup', or set AGENTCG_EXEC to where it is"
    )
