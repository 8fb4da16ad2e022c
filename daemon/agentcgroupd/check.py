"""`agentcgroupd --check`: what would keep the daemon from starting with a configuration."""

from __future__ import annotations

import os
from pathlib import Path

from agentcgroupd.config import Config
from agentcgroupd.errors import ConfigError
from agentcgroupd.host.run_dir import RunDir
from agentcgroupd.policy.load import load_policy
from agentcgroupd.sessions.pool import check_place


def check(config: Config) -> None:
    """Check all that a start needs and does not depend on what runs now: a daemon that has the pool
    and the ports already may be the one that is to be started anew. Nothing is changed. Raises
    ConfigError, or OSError where there is no cgroup2."""
    load_policy(config.policy.path, config.policy.drop_in)
    check_place(config.pool)
    RunDir.check(config.server.run_dir)
    if config.audit.path is not None:
        _check_audit(config.audit.path)


def _check_audit(path: Path) -> None:
    """Check that the audit log is a file or could be made. Raises ConfigError."""

    def unusable(why: str) -> ConfigError:
        return ConfigError(f"audit.path: {str(path)!r} cannot be used: {why}")

    if path.is_symlink():
        raise unusable("it is a symbolic link")
    if path.exists() and not path.is_file():
        raise unusable("it is no regular file")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir():
        raise unusable(f"{above} is no directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise unusable(f"{above} may not be written to")
