"""Program of the process inside a session that runs code for tests: reads pickled code, writes its
pickled result.

The argument is the session, which the process enters as the launcher does (docs/protocol.md).
Without an argument it was started inside the session."""

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
    """The daemon's run directory."""
    return Path(os.environ["AGENTCG_RUN_DIR"])


def packet(verb: str, *pairs: str, role: str = "agent") -> list[str]:
    """Send a request of the attach protocol, and return the answer's words. If it succeeds, the
    daemon has moved this process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(run_dir() / role / "attach.sock"))
        sock.send(b"".join(word.encode() + b"\0" for word in ("ACG1", verb, *pairs)))
        return sock.recv(16384).decode().split("\0")[:-1]


def enter(session_id: str) -> None:
    """Move this process into a session, and set the variables that the daemon's answer names."""
    answer = packet("enter", f"session={session_id}", role="admin")
    assert answer[0] == "OK", answer
    for word in answer:
        kind, _, assignment = word.partition("=")
        if kind == "env":
            name, _, value = assignment.partition("=")
            os.environ[name] = value


def main() -> None:
    """Run what comes on stdin until it ends."""
    for session_id in sys.argv[1:]:
        enter(session_id)
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    channel = grpc.insecure_channel(f"unix:{run_dir()}/agent/grpc.sock")
    modules = (agentcgroup, grpc, os, signal, socket, subprocess, sys, threading, time)
    scope: dict[str, Any] = {module.__name__: module for module in modules}
    scope.update(
        agent=agentcgroup.Agent(),
        stub=pb_grpc.AgentStub(channel),
        pb=pb,
        pb_grpc=pb_grpc,
        packet=packet,
        EXEC=EXEC,
        RUN_DIR=run_dir(),
    )
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
