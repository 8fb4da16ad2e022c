"""What a hostile session sends, and what a call of another one takes meanwhile."""

from __future__ import annotations

import statistics
from pathlib import Path

from tests.harness import AgentProcess, DaemonProcess

FLOOD_S = 4.0
"""How long a flood lasts, unless told otherwise."""
SETUP = """
import array
import threading
from tests import http2
from tests.http2 import DATA, END_HEADERS, HEADERS, connect, frame, pour, request, request_headers
SOCK = str(RUN_DIR / "agent/grpc.sock")
"""


def rss_bytes(daemon: DaemonProcess) -> int:
    """Memory that the daemon holds."""
    assert daemon.process is not None
    pages = int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1])
    return pages * 4096


CALL = """
def call():
    began = time.monotonic()
    call_id = agent.tool_call("x").begin().id
    agent.end_call(call_id)
    return time.monotonic() - began
end = time.monotonic() + seconds
result = []
while time.monotonic() < end:
    result.append(call() * 1000)
    time.sleep(0.01)
"""


def call_ms(victim: AgentProcess, seconds: float) -> tuple[float, float]:
    """Median and 99th percentile of a call's begin and end, in milliseconds."""
    times = sorted(victim.run(CALL, seconds=seconds))
    return statistics.median(times), times[min(len(times) - 1, int(len(times) * 0.99))]


ATTACKS = {
    "unknown fields": """
body = b"".join(bytes([0xF8, 0x3F, 1]) for _ in range(20_000))
sock = connect(SOCK)
pour(sock, b"".join(request(i, "Agent/GetBudget", body) for i in range(1, 81, 2)), seconds)
""",
    "connections": """
end = time.monotonic() + seconds
while time.monotonic() < end:
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(SOCK)
    except OSError:
        pass
""",
    "attach connections": """
end = time.monotonic() + seconds
while time.monotonic() < end:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.setblocking(False)
            sock.connect(str(RUN_DIR / "agent/attach.sock"))
            sock.send(b"ACG1\\0attach\\0call=x\\0")
    except OSError:
        pass
""",
    "pings": """
pour(connect(SOCK), frame(http2.PING, 0, 0, b"12345678") * 1000, seconds)
""",
    "settings": """
pour(connect(SOCK), http2.settings(window=70_000) * 1000, seconds)
""",
    "resets": """
sock, stream = connect(SOCK), 1
end = time.monotonic() + seconds
head = request_headers("Agent/GetSession")
try:
    while time.monotonic() < end:
        data = b""
        for _ in range(100):
            data += frame(HEADERS, END_HEADERS, stream, head)
            data += frame(http2.RST_STREAM, 0, stream, b"\\0\\0\\0\\x08")
            stream += 2
        sock.sendall(data)
except OSError:
    pass
""",
    "empty frames": """
head = frame(HEADERS, END_HEADERS, 1, request_headers("Agent/GetSession"))
sock = connect(SOCK, http2.settings() + head)
pour(sock, frame(DATA, 0, 1) * 2000, seconds)
""",
    "header lists": """
head = frame(HEADERS, 0, 1, request_headers("Agent/GetSession"))
more = frame(http2.CONTINUATION, 0, 1, http2._literal("x" * 100, "y" * 100) * 80)
end = time.monotonic() + seconds
while time.monotonic() < end:
    pour(connect(SOCK, http2.settings() + head), more, 0.3)
""",
    "requests": """
sock, stream = connect(SOCK), 1
end = time.monotonic() + seconds
sock.settimeout(0.2)
def drain():
    while time.monotonic() < end:
        try:
            if not sock.recv(65536):
                return
        except TimeoutError:
            pass
        except OSError:
            return
threading.Thread(target=drain, daemon=True).start()
try:
    while time.monotonic() < end:
        data = b"".join(request(stream + 2 * i, "Agent/GetBudget") for i in range(50))
        stream += 100
        while data:
            try:
                data = data[sock.send(data):]
            except TimeoutError:
                if time.monotonic() > end:
                    break
except OSError:
    pass
""",
    "calls": """
end = time.monotonic() + seconds
def work():
    mine = agentcgroup.Agent()
    while time.monotonic() < end:
        try:
            mine.end_call(mine.tool_call("x").begin().id)
        except agentcgroup.AgentcgError:
            pass
workers = [threading.Thread(target=work) for _ in range(8)]
[w.start() for w in workers]
[w.join() for w in workers]
""",
    "descriptors": """
end = time.monotonic() + seconds
null = os.open("/dev/null", os.O_RDONLY)
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null] * 250))]
while time.monotonic() < end:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(RUN_DIR / "agent/attach.sock"))
            sock.sendmsg([b"ACG1\\0attach\\0call=x\\0"], rights)
            sock.recv(1000)
    except OSError:
        pass
""",
}
SPIN = """
end = time.monotonic() + seconds
while time.monotonic() < end:
    pass
"""
IN_CHILD = """
result = os.fork()
if result == 0:
    try:
        exec(source, globals())
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""


def beside(
    hostile: AgentProcess, victim: AgentProcess, source: str, flood_s: float = FLOOD_S
) -> tuple[float, float]:
    """What a call takes while a process of the hostile session runs `source` for this many seconds,
    in milliseconds: median and 99th percentile."""
    child = hostile.run(IN_CHILD, source=SETUP + source, seconds=flood_s)
    try:
        return call_ms(victim, flood_s - 0.5)
    finally:
        status = hostile.run("result = os.waitpid(child, 0)[1]", child=child)
        assert status == 0, "the flood itself failed"
