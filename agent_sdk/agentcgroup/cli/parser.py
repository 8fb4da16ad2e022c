"""The parser of the command line: argparse, which also suggests what may have been meant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from agentcgroup.meant import meant

from .output import complain, say

USAGE_CODE = 2
_MISSING = "the following arguments are required: "
"""How argparse begins to say so."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are two lines: what is wrong, and where help is.

    usage_code: the exit code for wrong usage.
    guesses: commands by what others than this one call them.
    """

    usage_code = USAGE_CODE
    guesses: Mapping[str, str] = {}

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Do what argparse does, and refuse here what this parser does not know: it knows what may
        have been meant, and the parser above it does not."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown[0])
        return found, []

    def _refuse(self, word: str) -> NoReturn:
        if word.startswith("-") and word != "-":
            option = word.partition("=")[0]
            self.error(f"there is no option {option}{meant(option, self._option_string_actions)}")
        self.error(f"there is one argument too many: {word!r}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            guess = self.guesses.get(str(value))
            hint = f"; did you mean {guess!r}?" if guess else meant(str(value), known)
            hint = hint or f"; there are {', '.join(known)}"
            self.error(f"there is no command {value!r}{hint}")
        name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
        self.error(f"{name}: {value!r} cannot be used; allowed is {' or '.join(known)}")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is, and exit."""
        what = message.removeprefix("argument ")
        if what.startswith(_MISSING):
            what += "".join(map(self._choices, what.removeprefix(_MISSING).split(", ")))
        self.exit(self.usage_code, f"{self.prog}: {what}\n  try: {self.prog} --help\n")

    def _choices(self, name: str) -> str:
        """Return what an argument takes, to stand behind its name where it is missing."""
        for action in self._actions:
            if action.metavar == name and action.choices is not None and not action.option_strings:
                return f"; {name} is {' or '.join(map(str, action.choices))}"
        return ""

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own says nothing where the help cannot be written.
        if file is sys.stderr:
            complain(message.rstrip("\n"))
        else:
            say(message, end="")

    def takes_value(self, option: str) -> bool | None:
        """Tell whether an option, or the only one that begins so, takes a value; None: there is no
        such option."""
        known = self._option_string_actions
        fitting = [option] if option in known else [o for o in known if o.startswith(option)]
        actions = {id(known[name]): known[name] for name in fitting}
        if option.startswith("--") and len(actions) == 1:
            (action,) = actions.values()
            return action.nargs != 0
        return known[option].nargs != 0 if option in known else None

    def split_command(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """Split `NAME [options] [--] COMMAND [ARGUMENT...]` before COMMAND, whose options are its
        own. Options of ours may stand before and after NAME."""
        at, has_name = 0, False
        while at < len(arguments):
            word = arguments[at]
            if word == "--":
                return [*arguments[:at]], [*arguments[at + 1 :]]
            if not word.startswith("-") or word == "-":
                if has_name:
                    break
                has_name = True
            elif "=" not in word and self.takes_value(word):
                at += 1
            at += 1
        return [*arguments[:at]], [*arguments[at:]]
