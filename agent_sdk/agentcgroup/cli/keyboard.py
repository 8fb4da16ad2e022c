"""The operator at the keyboard of `top`: what each key does. Whatever changes something is asked
for once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agentcgroup.admin import Admin
from agentcgroup.errors import AgentcgError
from agentcgroup.types import CallInfo, SessionInfo, Story

from .live import Look, Rates, is_paused, is_waiting
from .output import clock
from .screen import SORTS, View, calls_of, sessions_of

LIMITS = (
    "memory_low",
    "memory_high",
    "memory_max",
    "cpu_max",
    "cpu_weight",
    "io_weight",
    "io_latency",
    "pids_max",
    "priority",
)
PAGE = 10
_TEXT_MOST = 200


class Operator:
    """Changes the view, and the pool, by keys."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self.view = View()
        self.is_done = False
        self.look: Look | None = None
        self.rates = Rates()
        self._confirmed: Callable[[], str] | None = None
        """What is done after "y"; returns what to say."""
        self._typed: Callable[[str], None] | None = None
        """What gets the text that is being typed."""
        self._text, self._question = "", ""

    def refresh(self) -> None:
        """Ask the daemon how things are now. Raises AgentcgError."""
        before, self.look = self.look, Look.take(self._admin)
        self.rates = Rates.between(before, self.look)
        if self.view.mode == "call":
            self.view.story = self._story()

    def key(self, key: str) -> None:
        """Do what a key is for; an error of the daemon becomes the message."""
        self.view.message = ""
        try:
            if self._typed is not None:
                self._type(key)
            elif self._confirmed is not None:
                self._answer(key)
            else:
                self._do(key)
        except AgentcgError as error:
            self.view.message = error.sentence

    # Moving

    def _do(self, key: str) -> None:
        moves = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -PAGE, "page down": PAGE}
        actions = {
            "q": self._quit,
            "enter": self._deeper,
            "escape": self._back,
            "backspace": self._back,
            "s": self._sort_next,
            "/": self._filter,
            "p": self._ask_pause,
            "r": self._ask_resume,
            "e": self._ask_end,
            "l": self._ask_limits,
        }
        if key in moves:
            self._move(moves[key])
        elif key in actions:
            actions[key]()

    def _quit(self) -> None:
        self.is_done = True

    def _move(self, by: int) -> None:
        last = len(self.view.story) - 1 if self.view.mode == "call" else len(self._rows()) - 1
        self.view.chosen = min(max(0, self.view.chosen + by), max(0, last))

    def _rows(self) -> Sequence[SessionInfo | CallInfo]:
        if self.look is None:
            return ()
        if self.view.mode == "pool":
            return sessions_of(self.look, self.rates, self.view)
        return calls_of(self.look, self.rates, self.view)

    def _chosen(self) -> SessionInfo | CallInfo | None:
        if self.view.mode == "call":
            calls = self.look.calls if self.look is not None else ()
            return next((call for call in calls if call.id == self.view.call_id), None)
        rows = self._rows()
        return rows[min(self.view.chosen, len(rows) - 1)] if rows else None

    def _deeper(self) -> None:
        chosen = self._chosen()
        if self.view.mode == "pool" and chosen is not None:
            self.view.mode, self.view.session_id = "session", chosen.id
        elif self.view.mode == "session" and chosen is not None:
            self.view.call_id = chosen.id
            self.view.story = self._story()
            self.view.mode = "call"
        self.view.chosen, self.view.wanted = 0, ""

    def _back(self) -> None:
        above = {"call": "session", "session": "pool", "pool": "pool"}
        self.view.mode = above[self.view.mode]
        self.view.chosen, self.view.wanted = 0, ""

    def _sort_next(self) -> None:
        at = SORTS.index(self.view.sort) + 1
        self.view.sort = SORTS[at % len(SORTS)]
        self.view.message = f"sorted by {self.view.sort}"

    def _filter(self) -> None:
        def typed(text: str) -> None:
            self.view.wanted, self.view.chosen = text, 0

        self._ask_text("only what has this in its name: ", typed)

    def _story(self) -> list[str]:
        story = self._admin.story(self.view.call_id)
        return _lines_of(story, self._outlook())

    def _outlook(self) -> list[str]:
        """Say what the policy would do next with the call, where there is one."""
        try:
            explained = self._admin.explain_call(self.view.call_id)
        except AgentcgError:
            return []  # it has ended, waits, or no policy is there
        return [explained.sentence, *explained.outlook]

    # Changing

    def _targets(self, paused: bool) -> list[CallInfo]:
        """Give the calls that a key is for: the chosen one, or the outermost ones of a session."""
        chosen, look = self._chosen(), self.look
        if look is None or chosen is None:
            return []
        if isinstance(chosen, CallInfo):
            return [chosen]
        return [
            call
            for call in look.calls
            if call.session_id == chosen.id
            and not call.parent_call_id
            and not is_waiting(call)
            and is_paused(call) == paused
        ]

    def _ask_pause(self) -> None:
        calls = self._targets(paused=False)
        for_all = [lambda call=call: self._admin.pause_call(call.id) for call in calls]
        self._ask_for_calls("Pause", calls, for_all, "paused")

    def _ask_resume(self) -> None:
        calls = self._targets(paused=True)
        for_all = [lambda call=call: self._admin.resume_call(call.id) for call in calls]
        self._ask_for_calls("Resume", calls, for_all, "let go on")

    def _ask_for_calls(
        self,
        verb: str,
        calls: list[CallInfo],
        actions: Sequence[Callable[[], object]],
        done: str,
    ) -> None:
        if not calls:
            self.view.message = "there is no call for that"
            return
        one = calls[0]
        what = f"call {one.id} ({one.name} of {one.session_id})"
        if len(calls) > 1:
            what = f"all {len(calls)} such calls of session {one.session_id}"

        def confirmed() -> str:
            for action in actions:
                action()
            return f"{what}: {done}"

        self._ask(f"{verb} {what}?", confirmed)

    def _ask_end(self) -> None:
        chosen = self._chosen()
        if isinstance(chosen, CallInfo):
            call = chosen

            def end() -> str:
                report = self._admin.end_call(call.id)
                return f"call {call.id}: {report.sentence}"

            self._ask(f"End call {call.id} ({call.name} of {call.session_id})?", end)
        elif chosen is not None:
            session = chosen.id

            def close() -> str:
                ended = self._admin.close_session(session)
                return f"session {session} is closed; calls ended: {ended}"

            self._ask(f"Close session {session} with its agent and all its calls?", close)

    def _ask_limits(self) -> None:
        chosen = self._chosen()
        session = chosen.id if isinstance(chosen, SessionInfo) else self.view.session_id
        if not session:
            return

        def typed(text: str) -> None:
            limits = dict(_limit(word) for word in text.split())

            def confirmed() -> str:
                self._admin.update_session(session, **limits)
                return f"session {session}: {text}"

            if limits:
                self._ask(f"Set {text} of session {session}?", confirmed)

        self._ask_text(f"limits of {session}, such as memory_max=2G cpu_max=1.5: ", typed)

    # Asking

    def _ask(self, question: str, confirmed: Callable[[], str]) -> None:
        self._confirmed = confirmed
        self.view.prompt = f"{question} y/n"

    def _answer(self, key: str) -> None:
        confirmed, self._confirmed, self.view.prompt = self._confirmed, None, ""
        if key == "y" and confirmed is not None:
            self.view.message = confirmed()
            self.refresh()
        else:
            self.view.message = "nothing was changed"

    def _ask_text(self, question: str, typed: Callable[[str], None]) -> None:
        self._typed, self._text, self._question = typed, "", question
        self.view.prompt = f"{question}_"

    def _type(self, key: str) -> None:
        typed = self._typed
        if key == "enter" and typed is not None:
            self._typed, self.view.prompt = None, ""
            typed(self._text)
            return
        if key == "escape":
            self._typed, self.view.prompt = None, ""
            return
        if key == "backspace":
            self._text = self._text[:-1]
        elif len(key) == 1 and len(self._text) < _TEXT_MOST:
            self._text += key
        self.view.prompt = f"{self._question}{self._text}_"


def _limit(word: str) -> tuple[str, str]:
    """Read `memory_max=2G`. Raises AgentcgError."""
    name, _, value = word.partition("=")
    name = name.strip("-").replace("-", "_")
    if name not in LIMITS or not value:
        raise AgentcgError(f"{word!r} is no limit; there are {', '.join(LIMITS)}, each with =VALUE")
    return name, value


def _lines_of(story: Story, outlook: Sequence[str]) -> list[str]:
    """Write the story of a call for a screen."""
    head = f"call {story.call_id}  {story.name}  (session {story.session_id})"
    lines = [head, *(f"now: {sentence}" for sentence in outlook), ""]
    half = (len(story.steps) + 1) // 2 if story.steps_left_out else None
    for number, step in enumerate(story.steps):
        if number == half:
            lines.append(f"... {story.steps_left_out} more")
        at = clock(step.at_unix_usec) if step.at_unix_usec else "        "
        lines.append(f"{at}  {step.sentence}")
    if story.advice:
        lines += ["", "what to know, and what to try", *story.advice]
    return lines
