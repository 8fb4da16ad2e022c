"""What the kernel says of who has sent a message over a socket that several processes hold: why no
request is taken from one (docs/decisions/17-no-inherited-descriptor.md)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

CODE = """
import json, os, socket, struct

SO_PASSPIDFD, SCM_PIDFD = 76, 4
here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
there.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
there.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
told, tell = os.pipe()
victim = os.fork()
if not victim:
    os.close(tell)
    os.read(told, 1)
    os._exit(0)
sender = os.fork()
if not sender:
    claim = struct.pack("3i", victim, os.getuid(), os.getgid())
    try:
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, claim)])
    except PermissionError:
        here.send(b"refused")
    os._exit(0)
os.waitpid(sender, 0)
data, ancillary, _, _ = there.recvmsg(100, 200)
found = {"data": data.decode(), "victim": victim, "sender": sender}
for _, kind, raw in ancillary:
    if kind == socket.SCM_CREDENTIALS:
        found["credentials"] = struct.unpack("3i", raw)[0]
    if kind == SCM_PIDFD:
        lines = open(f"/proc/self/fdinfo/{struct.unpack('i', raw)[0]}").read().split("\\n")
        found["pidfd"] = next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))
os.close(tell)
os.waitpid(victim, 0)
print(json.dumps(found))
"""
RELEASE = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
NAMESPACES = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]


def sent(*before: str) -> dict[str, object]:
    argv = [*before, sys.executable, "-c", CODE]
    found: dict[str, object] = json.loads(
        subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout
    )
    return found


@pytest.mark.skipif(RELEASE < (6, 5), reason="SCM_PIDFD is of Linux 6.5")
@pytest.mark.parametrize("before", [[], NAMESPACES], ids=["root", "in namespaces of its own"])
def test_who_has_rights_over_its_pids_names_another_as_the_sender(before: list[str]) -> None:
    found = sent(*before)
    assert found["data"] == "x", found
    assert found["credentials"] == found["pidfd"] == found["victim"] != found["sender"]


def test_who_has_none_cannot() -> None:
    found = sent("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    assert found["data"] == "refused", found
    assert found["credentials"] == found["sender"] != found["victim"]
