"""The daemon's own memory: above its limit, who has most open is disconnected, and nobody else."""

from __future__ import annotations

import re

import pytest

from tests.conftest import StartDaemon
from tests.floods import SETUP, call_ms, rss_bytes
from tests.harness import AgentProcess, DaemonProcess, wait_until

pytestmark = pytest.mark.full_speed
MIB = 1 << 20
ROOM_MIB = 2
FLOOD = (
    SETUP
    + """
socks = []
for _ in range(count):
    try:
        sock = connect(SOCK, http2.settings(window=0))
        socks.append(sock)
        for number in range(8):
            sock.send(request(2 * number + 1, "Agent/ListReports", b"\\x10\\x64"))
    except OSError:
        break
result = len(socks)
"""
)
CLOSED = """
import select
def ended(sock):
    try:
        while True:
            if not sock.recv(65536, socket.MSG_DONTWAIT):
                return True
    except BlockingIOError:
        return False
    except OSError:
        return True
result = sum(ended(sock) for sock in socks)
"""


def opened(daemon: DaemonProcess) -> tuple[AgentProcess, AgentProcess]:
    """A session with reports to ask for, and one that asks little."""
    hostile, quiet = daemon.open("hostile"), daemon.open("quiet")
    hostile.run(
        "for _ in range(100): subprocess.call([EXEC, '--name', 'x', '--', 'true', 'x' * 4000])"
    )
    quiet.run("watch = stub.WatchFeedback(pb.WatchFeedbackRequest()); watch.initial_metadata()")
    return hostile, quiet


def test_who_has_most_open_is_disconnected(start_daemon: StartDaemon) -> None:
    """200 connections with 1,600 requests cost some 6 MiB; there is room for 2."""
    unbounded = start_daemon("")
    opened(unbounded)
    limit = rss_bytes(unbounded) + ROOM_MIB * MIB
    daemon = start_daemon(f"[limits]\nmemory = {limit}\nanswer_bytes_all = {limit // 2}\n")
    hostile, quiet = opened(daemon)
    hostile.run(FLOOD, count=200)
    said = "the connections of session hostile are closed"
    pattern = re.compile(r"more than limits.memory .*: the \d+ connections of session hostile are")
    wait_until(said, lambda: pattern.search(daemon.log.read_text()) is not None, 20)
    wait_until("they are", lambda: hostile.run(CLOSED) > 100, 20)
    assert "connections of session quiet" not in daemon.log.read_text()
    assert not quiet.run("result = watch.done()")
    assert call_ms(quiet, 1.0)[0] < 100
    wait_until("its memory is given back", lambda: rss_bytes(daemon) < limit + 2 * MIB, 20)
    assert hostile.run("result = stub.GetSession(pb.GetSessionRequest(), timeout=5).id")
