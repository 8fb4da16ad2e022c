"""Ends drawn at random: every report says what happened.

AGENTCG_ENDS is how many (docs/testing.md), AGENTCG_ENDS_SEED the first seed. A mistake is printed
with its plan, whose seed alone draws it again.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from agentcgroupd.cgroup.tree import cgroup2_mount
from tests.conftest import StartDaemon
from tests.ends.carry import Carrier, describe
from tests.ends.oracle import mistakes
from tests.ends.plans import draw
from tests.harness import IN_GUEST, DaemonProcess

COUNT = int(os.environ.get("AGENTCG_ENDS", "30" if IN_GUEST else "60"))
FIRST = int(os.environ.get("AGENTCG_ENDS_SEED", "1"))
AT_A_TIME = 4
LIMIT_S = 120 + 5 * COUNT


def run(daemon: DaemonProcess, directory: Path, limits: bool) -> None:
    """Draw, carry out and compare COUNT ends; fails with all mistakes."""
    mount = cgroup2_mount()
    seeds = range(FIRST, FIRST + COUNT)
    print(f"seeds {seeds.start} to {seeds.stop - 1}")
    started, wrong = time.monotonic(), list[str]()

    def some(part: range) -> int:
        done = 0
        with closing(Carrier(daemon, directory, mount, limits)) as carrier:
            for seed in part:
                plan = draw(seed, limits)
                try:
                    seen = carrier.carry_out(plan)
                except Exception as error:  # noqa: BLE001 (the others are to be carried out)
                    wrong.append(f"{type(error).__name__}: {error}\n{plan}")
                    carrier.forget_agent()
                    continue
                found = mistakes(plan, seen)
                if found:
                    wrong.append("\n".join([f"seed {seed}:", *found, describe(plan, seen)]))
                done += 1
        return done

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        done = sum(pool.map(some, [seeds[at::AT_A_TIME] for at in range(AT_A_TIME)]))
    right = COUNT - len(wrong)
    text = f"{right} of {COUNT} ends told as they were, in {time.monotonic() - started:.0f} s"
    print(text, file=sys.stderr)
    assert not wrong, f"{text}\n" + "\n\n".join(wrong)
    assert done == COUNT


@pytest.mark.full_speed
@pytest.mark.timeout(LIMIT_S)
def test_ends_at_random(start_daemon: StartDaemon, tmp_path: Path) -> None:
    run(start_daemon(""), tmp_path, limits=False)


@pytest.mark.controllers
@pytest.mark.timeout(LIMIT_S)
def test_ends_at_random_with_limits(start_daemon: StartDaemon, tmp_path: Path) -> None:
    config = '[pool]\nmemory_max = "1G"\n[guard]\nenabled = false\n'
    daemon = start_daemon(config)
    daemon.forks_agents = False
    run(daemon, tmp_path, limits=True)
