"""The work of benchmark `traffic`: two processes with a TCP connection on loopback.

Takes lines `bulk COUNT` and `turns COUNT` from its standard input, and answers each with the
nanoseconds that one took: a MiB that is sent and received, or a byte that goes there and back.
"""

from __future__ import annotations

import os
import socket
import sys
import time

MIB = 1 << 20
BULK, TURNS = b"b", b"t"


def receive(connection: socket.socket) -> None:
    """Serve the other process until it ends: read what is told, then answer; or answer each."""
    buffer = memoryview(bytearray(MIB))
    while head := connection.recv(9, socket.MSG_WAITALL):
        kind, count = head[:1], int.from_bytes(head[1:], "big")
        if kind == TURNS:
            for _ in range(count):
                connection.send(connection.recv(1))
            continue
        left = count * MIB
        while left > 0:
            left -= connection.recv_into(buffer, min(left, MIB))
        connection.send(b".")


def bulk(connection: socket.socket, count: int) -> None:
    """Send so many MiB, and wait until they are there."""
    block = bytes(MIB)
    for _ in range(count):
        connection.sendall(block)
    connection.recv(1)


def turns(connection: socket.socket, count: int) -> None:
    """Send a byte and wait for one, so many times."""
    for _ in range(count):
        connection.send(b".")
        connection.recv(1)


WORK = {"bulk": (BULK, bulk), "turns": (TURNS, turns)}


def main() -> None:
    """Fork the other process, each bound to a CPU of its own where there are two, and work."""
    listener = socket.create_server(("127.0.0.1", 0))
    cpus = sorted(os.sched_getaffinity(0))
    connecting = socket.create_connection(listener.getsockname())
    accepted, _ = listener.accept()
    for connection in (connecting, accepted):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if os.fork() == 0:
        connecting.close()
        os.sched_setaffinity(0, {cpus[-1]})
        receive(accepted)
        os._exit(0)
    accepted.close()
    os.sched_setaffinity(0, {cpus[0]})
    for line in sys.stdin:
        what, count = line.split()
        kind, work = WORK[what]
        started = time.perf_counter_ns()
        connecting.sendall(kind + int(count).to_bytes(8, "big"))
        work(connecting, int(count))
        print((time.perf_counter_ns() - started) / int(count), flush=True)


if __name__ == "__main__":
    main()
