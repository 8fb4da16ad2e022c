"""What the daemon's metrics say of its pool."""

from __future__ import annotations

import math
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from agentcgroupd.errors import AgentcgroupdError
from agentcgroupd.headroom.estimate import Numbers

ANSWER_S = 5.0
BYTES_MAX = 16 << 20


class NoNumbers(AgentcgroupdError):
    """The daemon does not tell what its pool holds."""


def read(url: str) -> str:
    """The daemon's metrics as text. Raises NoNumbers."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
            data: bytes = answer.read(BYTES_MAX)
    except (OSError, ValueError) as error:
        raise NoNumbers(f"{url}: {error}") from None
    return data.decode("utf-8", "replace")


def numbers_of(text: str) -> Numbers:
    """The numbers in the text of the metrics. Raises NoNumbers where one is missing or unknown: a
    node without a limit has no headroom that could be told."""
    sums: dict[str, float] = {}
    peaks: list[tuple[float, float]] = []
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "agentcg_call_memory_peak_bytes_bucket":
                    peaks.append((float(sample.labels["le"]), sample.value))
                else:  # What is told by priority counts together.
                    sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    except (KeyError, ValueError) as error:
        raise NoNumbers(f"the metrics cannot be read: {error}") from None

    def value(name: str) -> int:
        found = sums.get(name, math.nan)
        if not math.isfinite(found):
            raise NoNumbers(f"{name} is not known")
        return int(found)

    return Numbers(
        pool_bytes=value("agentcg_pool_memory_max_bytes"),
        used_bytes=value("agentcg_pool_memory_held_bytes"),
        sessions=value("agentcg_sessions_open"),
        peaks=tuple(sorted(peaks)),
    )
