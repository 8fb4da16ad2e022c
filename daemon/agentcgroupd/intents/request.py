"""A call that is asked for, read once from either encoding: protobuf, or words of the launcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentcgroup.unwrap import command_of
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import InvalidField
from agentcgroupd.intents.command import tool_name
from agentcgroupd.intents.parse import (
    PARSERS,
    Intent,
    check_name,
    cut_argv,
    name_of_program,
    parse_intent,
)
from agentcgroupd.units import parse_count

WORDS = ("name", "by_script", "argc", "arg", *PARSERS)
"""Keys of a `begin` packet of the attach protocol."""


ARGC_MOST = (1 << 31) - 1
"""The most arguments that a program can be told of (its argc is an int)."""


@dataclass(frozen=True, slots=True)
class CallRequest:
    """What is asked for a call, in the form that the queue, the call and its report use."""

    name: str
    argv: tuple[str, ...]
    """The command line as it was given, cut to 4,096 bytes."""
    intent: Intent
    observed: bool = False
    """Nobody asked: the daemon saw an agent execute a tool."""
    one_command: bool = False
    """Whether the call ends with its command, although somebody holds it open."""


NO_INTENT = Intent(leftovers="keep")


def observed_request(name: str, argv: Sequence[str], intent: Intent | None = None) -> CallRequest:
    """Make the request for a call that nobody asked for. `intent`: from its environment; None: it
    has none. Raises InvalidField for its name.

    A server that such a tool starts lives on, as it would without the daemon: whoever started it
    has never heard of calls.
    """
    return CallRequest(check_name(name), cut_argv(argv), intent or NO_INTENT, observed=True)


def intent_of_proto(message: pb.Intent) -> Intent:
    """Read an intent from its message. Raises InvalidField."""
    return parse_intent({field.name: text for field, text in message.ListFields()})


def request_of_proto(message: pb.BeginCallRequest) -> CallRequest:
    """Read a BeginCallRequest. Raises InvalidField."""
    name = check_name(message.name)
    intent = intent_of_proto(message.intent)
    return CallRequest(name, cut_argv(message.argv), intent, one_command=message.one_command)


def name_of_words(values: Mapping[str, str], args: Sequence[str]) -> str:
    """Name a call that its caller gives no name: by its program, or with `by_script` by what a
    shell's script is run for. Raises InvalidField."""
    if values.get("by_script", "no") not in ("yes", "no"):
        raise InvalidField("by_script", values["by_script"], "yes or no")
    if values.get("by_script") == "yes":
        return tool_name(name_of_program(args), ["sh", "-c", command_of(args)])
    return name_of_program(args)


def request_of_words(values: Mapping[str, str], args: Sequence[str]) -> CallRequest:
    """Read the words of a `begin` packet: `values` by key, and its `arg` words in order. Without a
    name the call is named by its program. Raises InvalidField."""
    if "argc" in values:
        parse_count("argc", values["argc"], 0, ARGC_MOST)
    texts = {key: text for key, text in values.items() if key in PARSERS}
    name = check_name(values["name"]) if "name" in values else name_of_words(values, args)
    return CallRequest(name, cut_argv(args), parse_intent(texts))
