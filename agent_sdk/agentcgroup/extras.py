"""What `pip install agentcgroup` alone leaves out, and what is said where it is missing."""

from __future__ import annotations

import platform
import sys

from agentcgroup.errors import AgentcgError

# The daemon's package reads TOML with tomllib, which came with this version.
DAEMON_PYTHON = (3, 11)

EXTRA_OF = {"matplotlib": "lab", "opentelemetry": "otel", "pynvml": "gpu", "requests": "otel"}
"""Extra of pyproject.toml that brings a module; for all other modules it is `daemon`."""


class MissingExtra(AgentcgError):
    """A command needs more than the SDK; the sentence says what to install."""


def missing(error: ImportError) -> MissingExtra | None:
    """Make the error to show for a module that could not be imported.

    None for a module of this project: its absence is a mistake, and no extra brings it.
    """
    if sys.version_info < DAEMON_PYTHON:
        least = ".".join(map(str, DAEMON_PYTHON))
        return MissingExtra(
            f"this needs Python {least} or later, and this is {platform.python_version()} "
            "(the SDK alone works here)"
        )
    module = (error.name or "").partition(".")[0]
    if not module or module.startswith("agentcgroup"):
        return None
    return MissingExtra(
        f"this needs the Python package {module}, which is not installed; "
        f"try: pip install 'agentcgroup[{EXTRA_OF.get(module, 'daemon')}]'"
    )
