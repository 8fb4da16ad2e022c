"""What reads bytes of others. A target returns for whatever it is given: what it raises is a
fault."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup_lab.trace import format as trace_format
from agentcgroupd.cgroup import knobs
from agentcgroupd.config import load_config
from agentcgroupd.errors import AgentcgroupdError, ConfigError
from agentcgroupd.host.mounts import parse_mountinfo
from agentcgroupd.host.proc import CgroupUnknown, parse_cgroup
from agentcgroupd.intents.request import request_of_proto, request_of_words
from agentcgroupd.policy.errors import PolicyError
from agentcgroupd.policy.load import load_policy
from agentcgroupd.rpc.agent_calls import refuse_unknown
from agentcgroupd.rpc.frames import BadFrame, Reader, Streams
from agentcgroupd.rpc.packets import RPC_PREFIX, Request, rpc_request
from agentcgroupd.rpc.sealed import request_in
from agentcgroupd.state.records import read_record
from agentcgroupd.telemetry.logs import escaped

Target = Callable[[bytes], None]


def packet(data: bytes) -> None:
    """A request of the attach socket, in words or with a message."""
    try:
        if data.startswith(RPC_PREFIX):
            message = rpc_request(data, "Agent").message
            if isinstance(message, pb.BeginCallRequest):
                request_of_proto(message)
            return
        request = Request(data)
        request_of_words(request.values, request.args)
    except AgentcgroupdError:
        return


def declared(data: bytes) -> None:
    """The arguments of a launcher that may use no socket."""
    try:
        request = request_in(b"agentcg-exec\0--sealed=0:0\0" + data)
        request_of_words(request.values, request.args)
    except AgentcgroupdError:
        return


def message(data: bytes) -> None:
    """A BeginCallRequest as gRPC hands it over."""
    try:
        request = pb.BeginCallRequest.FromString(data)
    except DecodeError:
        return
    try:
        refuse_unknown(request)
        request_of_proto(request)
    except AgentcgroupdError:
        return


def frames(data: bytes) -> None:
    """Frames of HTTP/2 in both directions, in pieces of any size."""
    streams = Streams()
    inward, outward = Reader(streams), Reader(streams)
    piece, at = data[:1], 1
    held = b""
    size = 1 + (piece[0] if piece else 0)
    while at < len(data):
        held += data[at : at + size]
        at += size
        position = inward.passed(held, 0)
        while (head := inward.head(held, position)) is not None:
            length, kind, flags, stream = head
            try:
                inward.from_client(length, kind, flags, stream, 0.0)
            except BadFrame:
                return
            outward.from_server(kind, flags, stream)
            inward.enter(length)
            position = inward.passed(held, position)
        held = held[position:]
        assert len(held) < 9
        assert set(streams.unfinished) <= streams.open


def proc_cgroup(data: bytes) -> None:
    """/proc/<pid>/cgroup."""
    try:
        assert "\n" not in parse_cgroup(data)
    except CgroupUnknown:
        return


def mountinfo(data: bytes) -> None:
    """/proc/self/mountinfo."""
    try:
        parse_mountinfo(data)
    except ValueError:
        return


def interface_files(data: bytes) -> None:
    """Interface files of cgroups: a value, or ValueError, KeyError for what the kernel never
    writes."""
    text = data.decode("utf-8", "replace")
    for name in dir(knobs):
        knob: Any = getattr(knobs, name)
        if isinstance(knob, knobs.Knob):
            try:
                knob.parse(text)
            except (ValueError, KeyError, IndexError):
                continue


def record(data: bytes) -> None:
    """The record of a session or a call on its cgroup."""
    for kind in ("session", "call", "pool"):
        read_record(data, kind)


def log_line(data: bytes) -> None:
    """A name that comes into the log."""
    line = escaped(data.decode("utf-8", "replace"))
    assert line.isprintable() or not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line)


def _file(data: bytes, name: str, read: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(data)
        read(path)


def config(data: bytes) -> None:
    """The configuration."""
    try:
        _file(data, "c.toml", load_config)
    except ConfigError:
        return


def policy(data: bytes) -> None:
    """A policy."""
    try:
        _file(data, "p.toml", lambda path: load_policy(path, None))
    except PolicyError:
        return


def trace(data: bytes) -> None:
    """A recording, plain and compressed."""
    for name, content in (("t.jsonl", data), ("t.jsonl.gz", data), ("u.jsonl.gz", _packed(data))):
        try:
            _file(content, name, trace_format.read)
        except trace_format.TraceError:
            continue


def _packed(data: bytes) -> bytes:
    return gzip.compress(data, 1)


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        packet,
        declared,
        message,
        frames,
        proc_cgroup,
        mountinfo,
        interface_files,
        record,
        log_line,
        config,
        policy,
        trace,
    )
}
