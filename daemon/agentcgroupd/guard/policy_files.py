"""The policy in force, and the files that it came from while they change.

The files are compared, not watched: editors replace files, packages replace directories, and a
drop-in directory may come and go. Comparing takes one stat(2) for each file.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agentcgroupd.config import PolicyConfig
from agentcgroupd.errors import ConfigError
from agentcgroupd.host.journal import DETAIL
from agentcgroupd.policy.lint import lint
from agentcgroupd.policy.load import Loaded, find_sources, load_policy
from agentcgroupd.policy.schema import Policy
from agentcgroupd.policy.toml import diff
from agentcgroupd.state.session import unix_usec
from agentcgroupd.telemetry.notices import Notices

log = logging.getLogger(__name__)

COMPARE_INTERVAL_S = 1.0

Signature = tuple[tuple[Path, int, int, int, int] | Path | str, ...]
"""For each file its path, inode, size, mtime and ctime in ns; a path alone stands for a file that
cannot be read, a text for the reason why there are no files."""


@dataclass(frozen=True, slots=True)
class ReadPolicy:
    """A policy with the state of its files when they were read."""

    loaded: Loaded
    signature: Signature
    read_unix_usec: int


def read_policy(config: PolicyConfig) -> ReadPolicy:
    """Read the policy's files. Raises ConfigError."""
    signature = _sign(config)
    return ReadPolicy(load_policy(config.path, config.drop_in), signature, unix_usec())


class PolicyFiles:
    """The policy in force. A wrong file changes nothing: the policy before it stays."""

    def __init__(
        self, config: PolicyConfig, read: ReadPolicy, notices: Notices, limit_bytes: int | None
    ) -> None:
        """`limit_bytes`: the pool's size, for warnings about the policy; None: it has no limit."""
        self._config = config
        self._notices = notices
        self._limit_bytes = limit_bytes
        self._read = read
        self._signature = read.signature
        """The files as they were when they were read last, used or refused."""
        self._seen = read.signature
        """The files as they were when they were compared last."""
        self._followers: list[Callable[[Policy], None]] = []
        self.error = ""
        """Why the files as they are now are not in force; empty: they are."""
        self._log_policy()

    @property
    def loaded(self) -> Loaded:
        """What is in force, with its sources."""
        return self._read.loaded

    @property
    def loaded_unix_usec(self) -> int:
        """When that was read."""
        return self._read.read_unix_usec

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.loaded.policy

    def follow(self, follower: Callable[[Policy], None]) -> None:
        """Call `follower` with each policy that comes into force from now on and differs from the
        one before."""
        self._followers.append(follower)

    def reload(self) -> bool:
        """Read the files anew, changed or not; returns whether the policy is another now. Raises
        ConfigError, and then the policy before stays in force."""
        self._seen = self._signature = _sign(self._config)
        try:
            read = read_policy(self._config)
        except ConfigError as error:
            self._refuse(str(error))
            raise
        changes = diff(self.policy, read.loaded.policy)
        self.error = ""
        self._notices.metrics.policy_wrong.set(0)
        result = "changed" if changes else "unchanged"
        self._notices.metrics.policy_reloads.labels(result).inc()
        self._read = read
        self._signature = read.signature
        if not changes:
            return False
        self._log_policy()
        self._notices.audit.write(
            "policy", name=self.policy.name, changes=[str(c) for c in changes]
        )
        for follower in self._followers:
            follower(self.policy)
        return True

    def reload_quietly(self) -> None:
        """Reload for someone who waits for no answer: what is wrong with the files has been logged
        when this returns."""
        try:
            self.reload()
        except ConfigError as error:
            log.debug("%s", error)

    def compare(self) -> None:
        """Reload if the files differ from those read last and have not changed since they were
        compared last: a file that is being written is not read."""
        try:
            now = _sign(self._config)
        except OSError as error:
            log.warning("the policy's files cannot be compared: %s", error)
            return
        if now != self._signature and now == self._seen:
            self.reload_quietly()
        self._seen = now

    async def compare_forever(self) -> None:
        """Compare the files once in COMPARE_INTERVAL_S."""
        while True:
            await asyncio.sleep(COMPARE_INTERVAL_S)
            self.compare()

    def _refuse(self, error: str) -> None:
        self._notices.metrics.policy_wrong.set(1)
        self._notices.metrics.policy_reloads.labels("refused").inc()
        if error == self.error:
            return
        self.error = error
        name = self.policy.name
        log.error("the policy's files cannot be used, policy %s stays in force:\n%s", name, error)
        self._notices.audit.write("policy_refused", name=name, why=error)

    def _log_policy(self) -> None:
        policy = self.policy
        sources = " ".join(map(str, self.loaded.sources))
        log.info("policy %s in force: %s", policy.name, sources, extra=DETAIL)
        for sentence in lint(policy, self._limit_bytes):
            log.warning("policy %s: %s", policy.name, sentence)


def _sign(config: PolicyConfig) -> Signature:
    try:
        sources = find_sources(config.path, config.drop_in)
    except ConfigError as error:
        return (str(error),)
    return tuple(_sign_file(path) for path in sources)


def _sign_file(path: Path) -> tuple[Path, int, int, int, int] | Path:
    try:
        found = os.stat(path)
    except OSError:
        return path
    return path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
