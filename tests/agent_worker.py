"""The process inside a session that tests speak through: reads pickled code, answers its result.

Its argument is the session, which it enters as the launcher does (see docs/protocol.md); without,
it has been started there."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc

import agentcgroup
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import agentcgroup_pb2_grpc as pb_grpc
from tests.harness import EXEC, RemoteRpcError


def run_dir() -> Path:
    """The daemon's."""
    return Path(os.environ["AGENTCG_RUN_DIR"])


def packet(verb: str, *pairs: str, role: str = "agent") -> list[str]:
    """One exchange of the attach protocol by hand; moves this very process if it succeeds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(run_dir() / role / "attach.sock"))
        sock.send(b"".join(word.encode() + b"\0" for word in ("ACG1", verb, *pairs)))
        return sock.recv(16384).decode().split("\0")[:-1]


def enter(session_id: str) -> None:
    """Move this process there, with the environment that it is to have."""
    answer = packet("enter", f"session={session_id}", role="admin")
    assert answer[0] == "OK", answer
    for word in answer:
        kind, _, assignment = word.partition("=")
        if kind == "env":
            name, _, value = assignment.partition("=")
            os.environ[name] = value


def main() -> None:
    """Serve until stdin ends."""
    for session_id in sys.argv[1:]:
        enter(session_id)
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    channel = grpc.insecure_channel(f"unix:{run_dir()}/agent/grpc.sock")
    scope: dict[str, Any] = {
        "agent": agentcgroup.Agent(), "stub": pb_grpc.AgentStub(channel), "pb": pb, "grpc": grpc,
        "os": os, "signal": signal, "socket": socket, "subprocess": subprocess, "sys": sys,
        "threading": threading, "time": time, "packet": packet, "EXEC": EXEC, "RUN_DIR": run_dir(),
        "pb_grpc": pb_grpc, "agentcgroup": agentcgroup,
    }  # fmt: skip
    while True:
        try:
            code, values = pickle.load(stdin)
        except EOFError:
            os._exit(0)  # an interpreter's end takes an emulated CPU 2 s
        scope.update(values)
        scope["result"] = None
        try:
            exec(code, scope)
            data = pickle.dumps((True, scope["result"]))
        except grpc.RpcError as error:
            trailer: Any = error.trailing_metadata() or ()
            raw = dict(trailer).get("agentcg-error-bin", b"")
            remote = RemoteRpcError(error.code().name, error.details() or "", raw)
            data = pickle.dumps((False, remote))
        except BaseException as error:  # noqa: BLE001 (whatever it was, the test is to see it)
            data = pickle.dumps((False, AssertionError(f"{type(error).__name__}: {error}")))
        stdout.write(data)
        stdout.flush()


if __name__ == "__main__":
    main()
