"""Listening sockets: made here, or handed over by systemd."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from agentcgroupd.errors import ConfigError
from agentcgroupd.host.listening import LISTEN_FDS_START, handed_over, listen, remove_stale

STREAM, PACKETS = socket.SOCK_STREAM, socket.SOCK_SEQPACKET


def test_a_stale_socket_is_replaced_and_the_file_goes_with_the_listener(tmp_path: Path) -> None:
    path = tmp_path / "s"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    listener = listen(path, STREAM, 0o600, "x", {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()
    listener.close()
    assert not path.exists()


def test_what_is_no_socket_stays_and_is_named(tmp_path: Path) -> None:
    for name, what in (("d", "a directory"), ("f", "a file that is no socket")):
        path = tmp_path / name
        path.mkdir() if name == "d" else path.write_text("precious")
        with pytest.raises(ConfigError, match=f"{path} is {what}, where a socket belongs"):
            listen(path, STREAM, 0o600, "x", {})
        assert path.exists()
    link = tmp_path / "l"
    link.symlink_to("f")
    with pytest.raises(ConfigError, match="no socket"):
        remove_stale(link)


def test_a_socket_that_was_handed_over_is_taken_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, PACKETS) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        listener = listen(path, PACKETS, 0o600, "x", {"x": theirs.dup()})
        assert listener.handed_over and not listener.socket.getblocking()
        listener.close()
        assert path.exists()
        with socket.socket(socket.AF_UNIX, PACKETS) as client:
            client.connect(str(path))


def test_a_socket_of_another_kind_or_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, STREAM) as theirs:
        theirs.bind(str(path))
        with pytest.raises(ConfigError, match="no listening Unix socket of SOCK_STREAM"):
            listen(path, STREAM, 0o600, "x", {"x": theirs})
        theirs.listen()
        with pytest.raises(ConfigError, match="no listening Unix socket of SOCK_SEQPACKET"):
            listen(path, PACKETS, 0o600, "x", {"x": theirs})
        with pytest.raises(ConfigError, match="let ListenStream= or"):
            listen(tmp_path / "other", STREAM, 0o600, "x", {"x": theirs})


def test_descriptors_are_taken_by_name_and_only_once(tmp_path: Path) -> None:
    script = """
import os, socket
from agentcgroupd.host.listening import handed_over
os.environ["LISTEN_PID"] = str(os.getpid())
taken = handed_over()
assert list(taken) == ["one-grpc", "one-attach", "two-grpc"], taken
stream, packets = socket.SOCK_STREAM, socket.SOCK_SEQPACKET
assert [s.type for s in taken.values()] == [stream, packets, stream]
assert not any(os.get_inheritable(s.fileno()) for s in taken.values())
assert not [name for name in os.environ if name.startswith("LISTEN_")]
assert handed_over() == {}
"""
    one, two, three = (socket.socket(socket.AF_UNIX, kind) for kind in (STREAM, PACKETS, STREAM))
    with one, two, three:
        for number, sock in enumerate((one, two, three)):
            sock.bind(str(tmp_path / str(number)))
            sock.listen()
        # As systemd leaves them: from descriptor 3 on.
        numbers = range(LISTEN_FDS_START, LISTEN_FDS_START + 3)
        shell = "exec {}<&$A {}<&$B {}<&$C".format(*numbers) + ' "$0" -c "$1"'
        env = {**os.environ, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "one:one:two"}
        env |= {"A": str(one.fileno()), "B": str(two.fileno()), "C": str(three.fileno())}
        done = subprocess.run(
            ["bash", "-c", shell, sys.executable, script],
            env=env,
            pass_fds=(one.fileno(), two.fileno(), three.fileno()),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr


def test_what_is_meant_for_another_process_is_left_alone() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "X": "1"}
    assert handed_over(environment) == {}
    assert environment == {"X": "1"}
