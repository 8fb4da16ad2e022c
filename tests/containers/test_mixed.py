"""Containers of all runtimes at once, mixed with restarts of everything: each becomes a session,
none fails because of that, and nothing is left."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter

import pytest

from tests.containers.host import WAYS, Host, Made, is_session, sessions
from tests.containers.runtimes import since
from tests.harness import wait_until

STARTS = int(os.environ.get("AGENTCG_STARTS") or 12)
SEED = int(os.environ.get("AGENTCG_STARTS_SEED") or 1)
LIVE_MOST = 5
ENDS = ("killed", "ended")
RESTARTED = ("daemon", "docker", "podman", "nri", "cri")


@pytest.mark.timeout(6000)
def test_starts_of_all_runtimes_mixed_with_restarts_of_all(host: Host) -> None:
    draw = random.Random(SEED)
    started, live = time.monotonic(), list[Made]()
    starts, restarts, early = Counter[str](), Counter[str](), Counter[str]()

    def leave(made: Made) -> None:
        where = host.check(made)
        if made.early:
            early[f"{made.way} {where}"] += 1
        host.remove(made)

    for number in range(STARTS):
        way = WAYS[number % len(WAYS)]
        if draw.random() < 0.12:
            what = f"{draw.choice(RESTARTED)} {draw.choice(ENDS)}"
            restarts[what] += 1
            host.disturb(what)
        away = draw.random() < 0.06
        if away:  # the container starts while nobody is there
            host.daemon.kill()
        made = host.start(way, f"m{number}")
        starts[way] += 1
        if away:
            restarts["container started without a daemon"] += 1
            host.daemon.start()
        live.append(made)
        if draw.random() < 0.15:
            again = draw.choice(live)
            is_session(host.daemon, again.session)
            host.restart(again)
            restarts[f"container of {again.way}"] += 1
        if len(live) > LIVE_MOST:
            leave(live.pop(draw.randrange(len(live))))
    for made in live:
        leave(made)
    wait_until("no cgroup is left", lambda: not host.leftovers(), 30)
    late = [line for line in host.daemon.log.read_text().split("\n") if "is not split" in line]
    entries = [json.loads(line) for line in host.daemon.audit_lines()]
    said = f"{STARTS} starts in {since(started)}: {dict(starts)}; restarts {dict(restarts)}; "
    print(f"{said}first instruction {dict(early)}; {len(host.paths)} cgroups")
    assert late == []
    assert [entry for entry in entries if entry["event"] == "container_refused"] == []
    assert {line.rpartition(" ")[2] for line in early} == {"/agent"}
    assert sessions(host.daemon) == {}
