"""Looks at the pool again and again, and remembers the last minutes.

One thread looks, one listens to events; both outlive the daemon's absence. Whoever asks for a page
gets what was found last, so that many readers cost the daemon no more than one.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from agentcgroup.admin import Admin
from agentcgroup.cli.live import Look, Rates, is_paused
from agentcgroup.cli.top import INTERVAL_S, rest_s
from agentcgroup.errors import AgentcgError, CallNotFound, Unavailable
from agentcgroup.listener import EventListener
from agentcgroup.text import escaped_json
from agentcgroup.types import CallInfo, Event, Story

from . import shown, timeline

IDLE_AFTER_S, IDLE_INTERVAL_S = 30.0, 10.0
"""Without a reader for so long, it is looked less often."""
CATCH_UP_S = 60.0
"""After so long the store is asked for what the events may have left out."""
REPORTS_MOST = 500
STORIES_MOST = 50
"""Calls that were open before anybody watched, and whose story is asked for, at most."""
TIMELINE_S = 1.0
"""A timeline that is younger than that is handed out again."""


def encode(value: Any) -> bytes:
    """Write a JSON document, with unsafe characters escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return escaped_json(text).encode()


def unix_usec() -> int:
    """Return the time of day in microseconds since 1970."""
    return time.time_ns() // 1000


class Watch:
    """What is known of the pool, kept current by threads between `start` and `close`.

    make_admin: connects to the daemon. minutes: what is remembered of the past.
    """

    def __init__(self, make_admin: Callable[[], Admin], minutes: int) -> None:
        self.minutes = minutes
        self._make_admin = make_admin
        self._memory = timeline.Memory(int(minutes * 60 / INTERVAL_S) + 1)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._wanted_at = time.monotonic()
        self._look: Look | None = None
        self._rates = Rates()
        self._looked_at = 0
        self._away: str | None = "The daemon was not asked yet."
        self._away_since = unix_usec()
        self._caught_up_at: float | None = None
        self._caught_up_to = 0
        self._daemon_began = 0
        self._timelines: dict[int, tuple[float, bytes]] = {}
        self._admin: Admin | None = None
        self._looker = threading.Thread(target=self._look_on, name="look", daemon=True)
        # That the daemon is away is told of by the thread that looks, which asks the same one.
        self._listener = EventListener(make_admin, self.heard, retry_s=INTERVAL_S)

    def start(self) -> None:
        """Begin to look and to listen."""
        self._looker.start()
        self._listener.start()

    def close(self) -> None:
        """End both."""
        self._stopping.set()
        self._listener.close()
        if self._looker.is_alive():
            self._looker.join(5)

    # What readers get

    def now(self) -> dict[str, Any]:
        """Return the pool as it was found last, and whether the daemon still answers."""
        self._wanted_at = time.monotonic()
        with self._lock:
            look, rates, at = self._look, self._rates, self._looked_at
            daemon = {
                "answers": self._away is None,
                "sentence": shown.text(self._away or ""),
                "since_unix_usec": self._away_since if self._away is not None else 0,
            }
        found = {} if look is None else shown.now(look, rates, at)
        return {"daemon": daemon, "minutes": self.minutes, "found": found or None}

    def now_json(self) -> bytes:
        """Return `now` as a document."""
        return encode(self.now())

    def timeline(self, minutes: int) -> dict[str, Any]:
        """Return the last minutes, at most as many as are remembered."""
        until = unix_usec()
        with self._lock:
            return timeline.document(
                self._memory, self._look, until - min(minutes, self.minutes) * 60_000_000, until
            )

    def timeline_json(self, minutes: int) -> bytes:
        """Return `timeline` as a document, which may be a second old."""
        self._wanted_at = time.monotonic()
        made_at, document = self._timelines.get(minutes, (0.0, b""))
        if not document or time.monotonic() - made_at >= TIMELINE_S:
            document = encode(self.timeline(minutes))
            if len(self._timelines) >= 16:
                self._timelines.clear()
            self._timelines[minutes] = (time.monotonic(), document)
        return document

    def story_json(self, call_id: str) -> bytes:
        """Return what happened to a call.

        Raises:
            CallNotFound: nothing is known of it.
            AgentcgError: the daemon did not answer.
        """
        with self._make_admin() as admin:
            return encode(shown.story(admin.story(call_id)))

    # Looking

    def look_once(self) -> float:
        """Look, and remember what was seen. Returns the seconds until the next look."""
        started, cpu_s = time.monotonic(), time.thread_time()
        try:
            if self._admin is None:
                self._admin = self._make_admin()
            look = Look.take(self._admin)
            self.remember(look)
            if self._wants_to_catch_up(look):
                self._catch_up(self._admin, look)
        except AgentcgError as error:
            self._gone(error)
        busy_s, cpu_s = time.monotonic() - started, time.thread_time() - cpu_s
        is_idle = started - self._wanted_at > IDLE_AFTER_S
        return rest_s(IDLE_INTERVAL_S if is_idle else INTERVAL_S, busy_s, cpu_s)

    def _look_on(self) -> None:
        while not self._stopping.wait(self.look_once()):
            continue

    def remember(self, look: Look) -> None:
        """Take over what was seen."""
        at = unix_usec()
        with self._lock:
            before = self._look if self._away is None else None
            self._rates = Rates.between(before, look)
            self._look, self._looked_at, self._away = look, at, None
            self._memory.samples.append(timeline.Sample.of(look, at))

    def _gone(self, error: AgentcgError) -> None:
        if self._admin is not None:
            self._admin.close()
            self._admin = None
        with self._lock:
            if self._away is None or self._look is None:
                self._away_since = unix_usec()
            sentence = "The daemon does not answer." if isinstance(error, Unavailable) else ""
            self._away = sentence or error.sentence
            self._caught_up_at = None

    def _wants_to_catch_up(self, look: Look) -> bool:
        at = self._caught_up_at
        restarted = look.pool.started_unix_usec != self._daemon_began
        return at is None or restarted or time.monotonic() - at >= CATCH_UP_S

    def _catch_up(self, admin: Admin, look: Look) -> None:
        """Ask the store for what ended, and for the stories of calls that were open before."""
        since = max(self._caught_up_to, unix_usec() - self.minutes * 60_000_000) / 1e6
        began_at = unix_usec()
        reports = admin.history(since=since, limit=REPORTS_MOST)
        past = admin.past_sessions(limit=2 * timeline.ENDED_SESSIONS)
        stories = _stories(admin, look.calls) if self._caught_up_at is None else []
        with self._lock:
            for report in reversed(reports):
                self._memory.add_report(report)
            self._memory.past = [each for each in past if each.closed_unix_usec]
            del self._memory.past[timeline.ENDED_SESSIONS :]
            for story in stories:
                self._memory.add_marks(
                    timeline.Mark.of(step.what, step, story.call_id, story.session_id)
                    for step in story.steps
                )
            # What is written to the store late, or by a clock that was set back, is asked for once
            # more the next time.
            self._caught_up_to = began_at - int(CATCH_UP_S * 1e6)
            self._caught_up_at = time.monotonic()
            self._daemon_began = look.pool.started_unix_usec

    # Listening

    def heard(self, event: Event) -> None:
        """Remember what happened in the pool."""
        with self._lock:
            if event.ended is not None:
                self._memory.add_report(event.ended)
            elif event.feedback is not None:
                each = event.feedback
                mark = timeline.Mark.of(each.code.value, each, each.call_id, each.session_id)
                self._memory.add_marks([mark])
            elif event.session_closed is not None:
                self._caught_up_at = self._caught_up_at and self._caught_up_at - CATCH_UP_S


def _stories(admin: Admin, calls: Iterable[CallInfo]) -> list[Story]:
    """Ask what happened to open calls before anybody watched, to those that are paused first."""
    found = []
    for call in sorted(calls, key=lambda call: not is_paused(call))[:STORIES_MOST]:
        try:
            found.append(admin.story(call.id))
        except CallNotFound:
            continue
    return found
