"""Keep the node's number of agents until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

from agentcgroupd.errors import ConfigError
from agentcgroupd.headroom.estimate import (
    EVERY_S,
    RISE_AFTER_S,
    Settings,
    Steady,
    agents_that_fit,
)
from agentcgroupd.headroom.metrics import NoNumbers, numbers_of, read
from agentcgroupd.headroom.node import Node, NotTold
from agentcgroupd.units import parse_bytes

log = logging.getLogger(__name__)

METRICS = "http://127.0.0.1:9464/metrics"
AGAIN_S = 300.0
"""The number is told again after this time, should the node have been made anew meanwhile."""


class Publisher:
    """Tells the node's number of agents when it has changed."""

    def __init__(
        self,
        read_metrics: Callable[[], str],
        tell: Callable[[int], None],
        settings: Settings,
        steady: Steady,
    ) -> None:
        self._read, self._tell = read_metrics, tell
        self._settings, self._steady = settings, steady
        self._told: tuple[int, float] | None = None

    def step(self, now_s: float) -> None:
        """Measure, and tell the number if it is another. What fails is logged and tried again."""
        try:
            agents = agents_that_fit(numbers_of(self._read()), self._settings)
        except NoNumbers as error:
            log.warning("nothing is told: %s", error)
            return
        value = self._steady.see(agents, now_s)
        if self._told is not None and self._told[0] == value and now_s < self._told[1] + AGAIN_S:
            return
        try:
            self._tell(value)
        except NotTold as error:
            log.warning("%s", error)
            return
        log.info("this node has room for %d agents", value)
        self._told = (value, now_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m agentcgroupd.headroom", description=__doc__)
    add = parser.add_argument
    add("--metrics", default=METRICS, metavar="URL", help="the daemon's (default %(default)s)")
    add("--least", default="128M", metavar="SIZE", help="what an agent is taken to hold at least")
    add("--least-call", default="1G", metavar="SIZE", help="what a large call needs at least")
    add("--agents-max", type=int, default=250, metavar="N", help="the most that is ever told")
    add("--rise-after", type=float, default=RISE_AFTER_S, metavar="SEC")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        node = Node.of_environment()
        settings = Settings(
            parse_bytes("--least", given.least),
            parse_bytes("--least-call", given.least_call),
            given.agents_max,
        )
    except (ConfigError, ValueError) as error:
        print(f"agentcgroupd.headroom: {error}", file=sys.stderr)
        return 78
    publisher = Publisher(
        lambda: read(given.metrics), node.tell, settings, Steady(given.rise_after)
    )
    while not stopping.is_set():
        publisher.step(time.monotonic())
        stopping.wait(EVERY_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
