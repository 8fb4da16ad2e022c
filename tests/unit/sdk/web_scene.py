"""Twenty minutes of a pool for `agentcg web`, and a page's server for it: the end is what `top`
sees in top_scene, the first minutes nobody watched."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from agentcgroup.cli.live import memory_of
from agentcgroup.errors import CallNotFound
from agentcgroup.types import Event, PastSession, Report, Story
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.web.server import LOOPBACK_NAMES, Server, Site
from agentcgroup.web.timeline import Mark, Sample
from agentcgroup.web.watch import Watch, unix_usec
from tests.unit.sdk import top_scene
from tests.unit.sdk.top_scene import GIB, MIB

S, MINUTE = 1_000_000, 60_000_000
EVIL = "</script><img src=x onerror=\"document.title='owned'\"><b>\x1b[31m\u202e"


def report(
    number: int, owner: str, name: str, ago_s: float, for_s: float, peak: int, **rest: Any
) -> Report:
    """A call that began so many seconds ago. `feedback`: (seconds ago, code, sentence)."""
    told = rest.pop("feedback", ())
    values = {"verdict": pb.VERDICT_OK, "sentence": "It ended with status 0.", **rest}
    now = unix_usec()
    made = pb.Report(
        call_id=f"{number:012x}",
        session_id=owner,
        name=name,
        argv=[name, "-q"],
        began_unix_usec=now - int(ago_s * S),
        wall_usec=int(for_s * S),
        memory_peak_bytes=peak,
        **values,
    )
    for at, code, sentence in told:
        made.feedback.add(
            call_id=made.call_id, code=code, sentence=sentence, at_unix_usec=now - int(at * S)
        )
    return Report.from_proto(made)


def reports() -> list[Report]:
    """What has ended in the last twenty minutes."""
    found = [
        report(
            0x100 + n, "planner", "pytest", 1150 - 120 * n, 70 + 9 * (n % 4), (1500 + 200 * n) * MIB
        )
        for n in range(8)
    ]
    found += [
        report(0x200 + n, "refactor-7", name, 1080 - 130 * n, 95, (900 + 150 * n) * MIB)
        for n, name in enumerate(("cargo", "rustc", "clippy", "cargo", "link", "cargo"))
    ]
    found += [
        report(0x300, "nightly", "make", 900, 300, 2 * GIB, waited_usec=40 * S),
        report(
            0x301,
            "nightly",
            "make",
            520,
            200,
            3 * GIB,
            verdict=pb.VERDICT_OOM_CALL,
            sentence="It reached its own limit of 3.0 GiB and was ended by the kernel.",
            feedback=[
                (480, pb.FEEDBACK_CODE_MEMORY_THROTTLED, "It is slowed: near its limit."),
                (440, pb.FEEDBACK_CODE_FROZEN, "Paused: the pool is 92 % full."),
                (400, pb.FEEDBACK_CODE_THAWED, "It goes on: there is room again."),
                (320, pb.FEEDBACK_CODE_OOM, "The kernel ended cc1plus: the call was at its limit."),
            ],
        ),
        report(
            0x400,
            "scratch",
            "npm",
            700,
            45,
            700 * MIB,
            verdict=pb.VERDICT_FAILED,
            sentence="It ended with status 1.",
        ),
        report(
            0x401,
            "scratch",
            "node",
            600,
            150,
            900 * MIB,
            feedback=[(560, pb.FEEDBACK_CODE_GROWTH_DENIED, "It may not grow further for now.")],
        ),
    ]
    return found


def past() -> list[PastSession]:
    """Sessions that were closed."""
    now = unix_usec()
    rows = [
        ("review-12", 25, 9, "The operator closed it.", 14, 1, 3 * GIB),
        ("docs-bot", 90, 31, "Its agent ended.", 6, 0, 400 * MIB),
        ("triage", 200, 65, "Its container ended.", 131, 12, 1800 * MIB),
    ]
    found = []
    for name, opened, closed, why, calls, bad, peak in rows:
        made = pb.PastSession(closed_unix_usec=now - closed * MINUTE, closed_why=why)
        made.session.id, made.session.opened_unix_usec = name, now - opened * MINUTE
        made.sums.calls, made.sums.calls_not_ok = calls, bad
        made.sums.cpu_usage_usec, made.sums.memory_peak_bytes = calls * 11 * S, peak
        found.append(PastSession.from_proto(made))
    return found


class SceneAdmin:
    """A daemon's answers, without a daemon."""

    away = False

    def __init__(self) -> None:
        self._looks = 0

    def __enter__(self) -> SceneAdmin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def story(self, call_id: str) -> Story:
        """Return the story of a call that is paused."""
        if call_id != f"{0xC1:012x}":
            raise CallNotFound(f"nothing is known of a call {call_id!r}")
        at = unix_usec() - 90 * S
        made = pb.Story(call_id=call_id, session_id="nightly", name="make")
        made.state = pb.CALL_STATE_FROZEN
        made.advice.append("Give it less to do at once: make -j2.")
        for after, what, sentence in (
            (0, "asked", "It asked for memory 4.0 GiB."),
            (1, "granted", "It was granted 4.0 GiB, priority 20."),
            (77, "freeze", f"Paused: the pool is 93 % full. {EVIL}"),
        ):
            made.steps.add(at_unix_usec=at + after * S, what=what, sentence=sentence)
        return Story.from_proto(made)


def watch_of_scene(hostile: bool = False) -> Watch:
    """Make a watch that has seen it all, and looks no more."""
    watch = Watch(SceneAdmin, 20)  # type: ignore[arg-type]  # as much of one as is needed
    memory, now = watch._memory, unix_usec()
    before, look = top_scene.look(0), top_scene.look(2)
    names = [(each.id, memory_of(each)) for each in look.sessions]
    for ago in range(840, -1, -2):
        t = (840 - ago) / 840
        held = {
            name: int(most * (0.3 + 0.7 * t) * (1 - 0.2 * (1 - t) * math.sin(16 * t + 2 * n) ** 2))
            for n, (name, most) in enumerate(names)
        }
        memory.samples.append(Sample(now - ago * S, sum(held.values()) + 200 * MIB, held))
    for each in sorted(reports(), key=lambda made: made.began_unix_usec):
        watch.heard(Event(ended=each))
    pause = SimpleNamespace(
        at_unix_usec=now - 12 * S, sentence="Paused: the pool is 93 % full, and pytest is more."
    )
    memory.add_marks([Mark.of("freeze", pause, f"{0xC1:012x}", "nightly")])  # type: ignore[arg-type]
    memory.past = past()
    began = {0xA1: 150, 0xB1: 260, 0xC1: 90, 0xC2: 60, 0xD1: 420}
    for found in (before, look):
        for call in found.calls:
            since = began.get(int(call.id, 16))
            object.__setattr__(call, "began_unix_usec", now - since * S if since else 0)
            if hostile:
                object.__setattr__(call, "name", EVIL)
                object.__setattr__(call, "session_id", EVIL)
                object.__setattr__(call, "argv", (EVIL,))
                object.__setattr__(call, "paused_why", EVIL)
        for session in found.sessions if hostile else ():
            object.__setattr__(session, "id", EVIL + session.id)
    object.__setattr__(look.pool, "version", "0.1.0")
    object.__setattr__(look.pool, "kernel", "6.18.1")
    object.__setattr__(look.pool, "started_unix_usec", now - 26 * 3600 * S)
    for found in (before, look):
        watch.remember(found)
    return watch


@contextmanager
def served(watch: Watch, token: str = "t" * 43) -> Iterator[str]:
    """Serve it on a free port; gives the address without the token."""
    site = Site(watch, token, LOOPBACK_NAMES)
    with Server(("127.0.0.1", 0), site) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)
