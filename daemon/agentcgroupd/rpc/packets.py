"""Packets of the attach socket (docs/protocol.md): words each ended by a NUL byte, or a message of
agentcgroup.proto."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from google.protobuf import message

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.errors import InvalidField
from agentcgroupd.rpc.agent_calls import refuse_unknown
from agentcgroupd.units import suggestion

PACKET_BYTES_MAX = 16_384
MAGIC = "ACG1"
RPC_PREFIX = b"ACG1\0rpc\0"
ANSWER_BYTES_MAX = 131_072
"""The longest answer in a packet: a socket takes one of 208 KiB at once (net.core.wmem_default),
and nobody waits for a socket here. A longer answer has to be asked for over gRPC."""
TOO_LONG = b"LONG\0"


@dataclass(frozen=True, slots=True)
class RpcRequest:
    """A request of the verb `rpc`: a method of a service, and its message."""

    method: str
    message: message.Message


@cache
def _methods(service: str) -> dict[str, type[message.Message]]:
    """The requests of a service's methods by name, without those that are answered by a stream."""
    methods = pb.DESCRIPTOR.services_by_name[service].methods
    return {m.name: getattr(pb, m.input_type.name) for m in methods if not m.server_streaming}


def rpc_request(data: bytes, service: str) -> RpcRequest:
    """Read a packet that begins with RPC_PREFIX, for `Agent` or `Admin`. Raises InvalidField."""
    if len(data) > PACKET_BYTES_MAX:
        raise InvalidField("request", f"{len(data)} bytes", f"at most {PACKET_BYTES_MAX} bytes")
    method, separator, raw = data[len(RPC_PREFIX) :].partition(b"\0")
    name = method[:64].decode("utf-8", "replace")
    methods = _methods(service)
    kind = methods.get(name)
    if kind is None or not separator:
        raise InvalidField("method", name, "one of " + ", ".join(methods))
    try:
        request = kind.FromString(raw)
    except message.DecodeError:
        raise InvalidField("request", f"{len(raw)} bytes", f"a {kind.__name__} message") from None
    refuse_unknown(request)
    return RpcRequest(name, request)


def packet(words: Iterable[str]) -> bytes:
    """Make a packet of words."""
    return b"".join(word.encode("utf-8", "replace") + b"\0" for word in words)


class Request:
    """A request packet of words, read: a verb, values by key, and the `arg` words in order."""

    def __init__(self, data: bytes) -> None:
        """Read a packet. Raises InvalidField if it is not of the protocol's form."""
        if len(data) > PACKET_BYTES_MAX:
            value, allowed = f"{len(data)} bytes or more", f"at most {PACKET_BYTES_MAX} bytes"
            raise InvalidField("request", value, allowed)
        if not data.endswith(b"\0"):
            raise InvalidField("request", repr(data[:80]), "strings each ended by a NUL byte")
        # Names and arguments of Linux programs are bytes; what is no UTF-8 is shown as U+FFFD.
        words = data[:-1].decode("utf-8", "replace").split("\0")
        if words[0] != MAGIC or len(words) < 2:
            raise InvalidField("request", words[0], f"{MAGIC}, then a verb", "another protocol")
        self.verb = words[1]
        self.values: dict[str, str] = {}
        self.args: list[str] = []
        for word in words[2:]:
            key, separator, value = word.partition("=")
            if not separator:
                raise InvalidField("request", word, "key=value")
            if key == "arg":
                self.args.append(value)
            elif key in self.values:
                raise InvalidField(key, value, "each key once", "it is given twice")
            else:
                self.values[key] = value

    def only(self, *keys: str) -> None:
        """Refuse a key that the verb does not have. Raises InvalidField."""
        for key, value in self.values.items():
            if key not in keys:
                why = suggestion(key, keys) or "there is no such field"
                raise InvalidField(key, value, f"one of the fields {', '.join(keys)}", why)

    def value(self, key: str) -> str:
        """Return a value that must be there. Raises InvalidField."""
        if not self.values.get(key):
            raise InvalidField(key, "", f"a value for {key}", "it is missing")
        return self.values[key]
