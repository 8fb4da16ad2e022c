"""The policy in force, and the files that it came from while they change.

The files are looked at, not watched: editors replace files, packages replace directories, and a
drop-in directory may come and go. A look is one stat(2) for each file.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from agentcgroupd.config import PolicyConfig
from agentcgroupd.errors import ConfigError
from agentcgroupd.policy.lint import lint
from agentcgroupd.policy.load import Loaded, find_sources, load_policy
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.toml import diff
from agentcgroupd.state.session import unix_usec
from agentcgroupd.telemetry.audit import Audit
from agentcgroupd.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0

Signature = tuple[tuple[Path, int, int, int, int] | Path | str, ...]
"""Of each file: path, inode, size, mtime and ctime in ns; a path alone: it
cannot be read."""


class PolicyFiles:
    """Always has a policy once `load` has returned: a wrong file changes nothing."""

    def __init__(self, config: PolicyConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._loaded: Loaded | None = None
        self._signature: Signature = ()
        """Of the files as they were read last."""
        self._seen: Signature = ()
        """As they were at the last look."""
        self.audit: Audit | None = None
        self.limit_bytes: int | None = None
        """The pool's size, for warnings."""
        self.error = ""
        """Why the files as they are now are not in force; empty: they are."""
        self.loaded_unix_usec = 0
        # Who works by the policy sets this; it is called with another policy than before only.
        self.on_change: Callable[[Policy], None] | None = None

    @property
    def loaded(self) -> Loaded:
        """What is in force."""
        assert self._loaded is not None, "load() comes first"
        return self._loaded

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.loaded.policy

    def load(self) -> None:
        """At start. Raises ConfigError."""
        self._signature = self._seen = self._sign()
        self._loaded = load_policy(self._config.path, self._config.drop_in)
        self.loaded_unix_usec = unix_usec()

    def started(self, limit_bytes: int | None, audit: Audit) -> None:
        """The pool's size is known now, and where to write down what changes."""
        self.limit_bytes, self.audit = limit_bytes, audit
        self._say()

    def reload(self) -> bool:
        """Read the files anew, changed or not; whether the policy is another now. Raises
        ConfigError, and then the one before stays in force."""
        self._signature = self._seen = self._sign()
        try:
            loaded = load_policy(self._config.path, self._config.drop_in)
        except ConfigError as error:
            self._refuse(str(error))
            raise
        changes = diff(self.policy, loaded.policy)
        self.error = ""
        self._metrics.policy_wrong.set(0)
        self._metrics.policy_reloads.labels("changed" if changes else "unchanged").inc()
        self._loaded, self.loaded_unix_usec = loaded, unix_usec()
        if not changes:
            return False
        self._say()
        if self.audit is not None:
            self.audit.write("policy", name=self.policy.name, changes=list(map(str, changes)))
        if self.on_change is not None:
            self.on_change(self.policy)
        return True

    def reload_quietly(self) -> None:
        """As `reload`; what is wrong has been logged."""
        try:
            self.reload()
        except ConfigError as error:
            log.debug("%s", error)

    def look(self) -> None:
        """Reload if the files are others than those read last, and stayed so since the last look:
        a file that is being written is not read."""
        try:
            now = self._sign()
        except OSError as error:
            log.warning("the policy's files cannot be looked at: %s", error)
            return
        if now != self._signature and now == self._seen:
            self.reload_quietly()
        self._seen = now

    async def look_forever(self) -> None:
        """`look`, again and again."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            self.look()

    def _sign(self) -> Signature:
        try:
            sources = find_sources(self._config.path, self._config.drop_in)
        except ConfigError as error:
            return (str(error),)
        return tuple(_signature(path) for path in sources)

    def _refuse(self, error: str) -> None:
        self._metrics.policy_wrong.set(1)
        self._metrics.policy_reloads.labels("refused").inc()
        if error == self.error:
            return
        self.error = error
        log.error("the policy's files cannot be used, policy %s stays in force:\n%s",
                  self.policy.name, error)  # fmt: skip
        if self.audit is not None:
            self.audit.write("policy_refused", name=self.policy.name, why=error)

    def _say(self) -> None:
        loaded = self.loaded
        log.info("policy %s in force: %s", loaded.policy.name, " ".join(map(str, loaded.sources)))
        for sentence in lint(loaded.policy, self.limit_bytes):
            log.warning("policy %s: %s", loaded.policy.name, sentence)


def _signature(path: Path) -> tuple[Path, int, int, int, int] | Path:
    try:
        found = os.stat(path)
    except OSError:
        return path
    return path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
