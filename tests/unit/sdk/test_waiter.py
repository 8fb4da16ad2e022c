"""`agentcg exec` says how a call ended also where the daemon hangs up first, and never leaves it at
silence: a daemon that answers as it is told to stands in."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.harness import EXEC

FRONT = str(Path(EXEC).with_name("agentcg"))
SAID = b"OK\0say=It was ended at its timeout.\0"


def end(directory: Path, answers: Sequence[bytes]) -> str:
    """What `agentcg exec` says of a command that fails, where the daemon gives these answers to the
    question how it ended; an empty one: it hangs up."""
    path = directory / "agent/attach.sock"
    path.parent.mkdir()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        for answer in (b"OK\0call=c-1\0", *answers):
            client, _ = server.accept()
            with client:
                client.recv(16384)
                if answer:
                    client.send(answer)
        server.close()
        path.unlink()

    thread = threading.Thread(target=serve)
    thread.start()
    env = {"AGENTCG_RUN_DIR": str(directory)}
    words = [FRONT, "exec", "--", "/bin/sh", "-c", "exit 3"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    thread.join(60)
    assert done.returncode == 3
    return done.stderr


@pytest.mark.parametrize("hangs_up", [0, 1, 3])
def test_the_end_is_asked_for_again_where_the_daemon_hangs_up(
    tmp_path: Path, hangs_up: int
) -> None:
    said = end(tmp_path, [b""] * hangs_up + [SAID])
    assert said == "agentcg exec: call c-1: It was ended at its timeout.\n"


def test_an_end_that_nobody_tells_is_said_to_be_unknown(tmp_path: Path) -> None:
    said = end(tmp_path, [b""])
    assert said == (
        "agentcg exec: call c-1: how it ended is not known, because the daemon is away\n"
    )


def test_a_call_that_ended_by_itself_is_not_spoken_of(tmp_path: Path) -> None:
    assert end(tmp_path, [b"OK\0"]) == ""
