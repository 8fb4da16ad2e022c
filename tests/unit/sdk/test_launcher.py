"""agentcg-exec and agentcg against a daemon that answers as a test wants it to."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb

ROOT = Path(__file__).resolve().parents[3]
OK = b"OK\0call=c1\0"
Handler = Callable[[socket.socket, bytes], None]
Result = subprocess.CompletedProcess[str]

# What a process can see of its surroundings; signal dispositions and mask come from the kernel.
LOOK = """
import json, os, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
fds = [n for n in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + n)]
json.dump({"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid(), "fds": sorted(fds),
           "blocked": status["SigBlk"], "ignored": status["SigIgn"], "cwd": os.getcwd(),
           "pending": status["ShdPnd"], "umask": status["Umask"]}, sys.stdout)
"""


# A program that changes what a tool inherits, then becomes the program under test.
PREPARE = """
import os, signal, sys
os.umask(0o027)
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
os.kill(os.getpid(), signal.SIGUSR2)
os.execv(sys.argv[1], sys.argv[1:])
"""


def reply(*packets: bytes) -> Handler:
    """Make a handler that sends the packets in order."""

    def handle(conn: socket.socket, request: bytes) -> None:
        for packet in packets:
            # After a refusal or garbage the launcher does not stay for more.
            with suppress(BrokenPipeError):
                conn.send(packet)

    return handle


@dataclass
class Daemon:
    """A stand-in for the daemon's attach socket; one connection at a time."""

    path: Path
    requests: list[list[bytes]] = field(default_factory=list)
    malformed: list[bytes] = field(default_factory=list)

    @property
    def keys(self) -> dict[bytes, bytes]:
        """Return the newest request's keys, without its arguments."""
        pairs = [item.split(b"=", 1) for item in self.requests[-1][2:]]
        return {key: value for key, value in pairs if key != b"arg"}

    @property
    def args(self) -> list[bytes]:
        """Return the newest request's arguments."""
        return [item[4:] for item in self.requests[-1] if item.startswith(b"arg=")]

    def serve(self, listener: socket.socket, handle: Handler) -> None:
        """Answer connections until the listener is shut down."""
        while True:
            try:
                conn, _ = listener.accept()
            except OSError:
                return
            with conn:
                packet = conn.recv(65536)
                if len(packet) > 16384 or not packet.endswith(b"\0"):
                    self.malformed.append(packet)
                self.requests.append(packet[:-1].split(b"\0"))
                handle(conn, packet)


@contextmanager
def daemon(path: Path, handle: Handler) -> Iterator[Daemon]:
    """Serve at `path` with the handler while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    it = Daemon(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(16)
        thread = threading.Thread(target=it.serve, args=(listener, handle))
        thread.start()
        try:
            yield it
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=20)
            assert not thread.is_alive() and not it.malformed


@dataclass
class Launcher:
    """The program with a run directory of its own."""

    programs: Path
    run_dir: Path

    @property
    def agent(self) -> Path:
        """Return the path of the socket where the program looks for the daemon."""
        return self.run_dir / "agent/attach.sock"

    @property
    def admin(self) -> Path:
        """Return the path of the socket where `--session` looks for the daemon."""
        return self.run_dir / "admin/attach.sock"

    def env(self, **more: str) -> dict[str, str]:
        """Return the environment that the program runs with."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("AGENTCG", "AGENT_"))}
        return {**env, "AGENTCG_RUN_DIR": str(self.run_dir), **more}

    def __call__(self, *args: str, **more: str) -> Result:
        """Run `agentcg-exec args...` to its end."""
        return subprocess.run(
            [str(self.programs / "agentcg-exec"), *args],
            env=self.env(**more),
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=60,
        )


@pytest.fixture
def launcher(programs: Path, tmp_path: Path) -> Launcher:
    """A launcher whose daemon is away until a test starts one."""
    return Launcher(programs, tmp_path)


def test_source_is_short() -> None:
    assert len((ROOT / "agent_sdk/exec/launch.h").read_text().splitlines()) < 300


def test_version_is_that_of_the_distribution(launcher: Launcher) -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    result = launcher("--version")
    assert (result.returncode, result.stdout) == (0, f"agentcg-exec {version[1]}\n")


def test_help_names_every_option(launcher: Launcher) -> None:
    result = launcher("--help")
    assert result.returncode == 0
    fields = [f"--{name.replace('_', '-')}" for name in pb.Intent.DESCRIPTOR.fields_by_name]
    for option in ("--call", "--session", "--name", "--socket", "--on-unavailable", *fields):
        assert option in result.stdout.split(), option


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_it_prints_is_written_or_it_is_told(programs: Path, option: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [programs / "agentcg-exec", option], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.endswith(": the output cannot be written: No space left on device\n")


# ---- what is asked


def test_begin_sends_name_and_arguments(launcher: Launcher) -> None:
    with daemon(launcher.agent, reply(OK)) as it:
        result = launcher("/bin/echo", "--memory", "", "x y")
    assert (result.returncode, result.stdout, result.stderr) == (0, "--memory  x y\n", "")
    assert it.requests[0][:2] == [b"ACG1", b"begin"]
    assert it.keys == {b"argc": b"4"}  # the daemon names it by its program
    assert it.args == [b"/bin/echo", b"--memory", b"", b"x y"]


def test_begin_sends_every_field_of_the_intent(launcher: Launcher) -> None:
    names = [name.replace("_", "-") for name in pb.Intent.DESCRIPTOR.fields_by_name]
    assert {"memory", "memory-max", "on-pressure", "hint", "gpu-device"} < set(names)
    fields = {name: f"the {name}" for name in ["name", *names]}
    expected = {k.replace("-", "_").encode(): v.encode() for k, v in fields.items()}
    with daemon(launcher.agent, reply(OK)) as it:
        launcher(*[word for k, v in fields.items() for word in (f"--{k}", v)], "--", "true")
        assert it.keys == {**expected, b"argc": b"1"}
        launcher(*[f"--{k}={v}" for k, v in fields.items()], "true", AGENT_RESOURCE_HINT="x")
        assert it.keys == {**expected, b"argc": b"1"}
        launcher("--name=a=b", "--memory=", "true", AGENT_RESOURCE_HINT="memory:2g")
        keys = {b"name": b"a=b", b"memory": b"", b"hint": b"memory:2g"}
        assert it.keys == {**keys, b"argc": b"1"}


def test_values_are_sent_as_they_are_not_as_keys(launcher: Launcher) -> None:
    with daemon(launcher.agent, reply(OK)) as it:
        launcher("--hint", "a-b=c-d", "true", "--x-y=z-z")
    assert it.keys[b"hint"] == b"a-b=c-d"
    assert it.args == [b"true", b"--x-y=z-z"]


def test_attach_and_enter(launcher: Launcher) -> None:
    with daemon(launcher.agent, reply(b"OK\0call=c7\0")) as it:
        result = launcher("--call", "c7", "echo", "hi", AGENT_RESOURCE_HINT="memory:low")
        assert (result.returncode, result.stdout, result.stderr) == (0, "hi\n", "")
        assert it.requests == [[b"ACG1", b"attach", b"call=c7"]]
    with daemon(launcher.admin, reply(b"OK\0session=s1\0")) as it:
        result = launcher("--session=s1", "--", "echo", "hi")
        assert (result.returncode, result.stdout, result.stderr) == (0, "hi\n", "")
        assert it.requests == [[b"ACG1", b"enter", b"session=s1"]]


def test_socket_option_wins(launcher: Launcher, tmp_path: Path) -> None:
    with daemon(tmp_path / "other.sock", reply(OK)) as it:
        assert launcher("--socket", str(it.path), "true").stderr == ""
        assert launcher(f"--socket={it.path}", "true", AGENTCG_RUN_DIR="/nowhere").stderr == ""
    assert len(it.requests) == 2


def test_command_line_of_a_megabyte(launcher: Launcher) -> None:
    words = ["x" * 100_000] * 10 + ["end"]
    with daemon(launcher.agent, reply(OK)) as it:
        result = launcher("--", sys.executable, "-c", "import sys; print(sys.argv[11])", *words)
    assert (result.returncode, result.stdout) == (0, "end\n")
    assert it.keys[b"argc"] == b"14"
    assert sum(map(len, it.args)) == 4096
    assert it.args[3] == b"x" * len(it.args[3])


def test_a_great_many_arguments(launcher: Launcher) -> None:
    with daemon(launcher.agent, reply(OK)) as it:
        assert launcher("true", *[""] * 50_000).returncode == 0
        assert it.keys[b"argc"] == b"50001"
        assert it.args[0] == b"true" and not any(it.args[1:])
        assert launcher("true", *["ab"] * 50_000).returncode == 0
        assert sum(map(len, it.args)) <= 4096


@pytest.mark.parametrize("shift", range(4))
def test_cut_between_characters(launcher: Launcher, shift: int) -> None:
    text = "a" * shift + "\N{SNOWMAN}" * 3000
    with daemon(launcher.agent, reply(OK)) as it:
        launcher("true", text)
        assert text.startswith(it.args[1].decode())
        assert 4096 - 4 - 3 < len(it.args[1]) <= 4096 - 4


@pytest.mark.parametrize("length", [16_300, 16_384, 100_000])
def test_request_too_long_names_the_field(launcher: Launcher, length: int) -> None:
    with daemon(launcher.agent, reply(OK)) as it:
        result = launcher("--memory", "1" * length, "--name", "n" * 100, "true")
        assert result.returncode == 125
        assert "memory" in result.stderr and str(length) in result.stderr
        result = launcher("true", AGENT_RESOURCE_HINT="h" * length)
        if length > 16_300:
            assert result.returncode == 125 and "hint" in result.stderr
    assert len(it.requests) == (length == 16_300)


# ---- what the tool becomes


def test_tool_sees_the_same_world(launcher: Launcher, tmp_path: Path) -> None:
    env = launcher.env(ODD="\udcff\nx=y", EMPTY="")
    tool = [sys.executable, "-S", "-c", LOOK, "a", "", "--", "b c", "\udcfe"]
    passed, other = os.pipe()

    def look(*argv: str) -> dict[str, object]:
        command = [sys.executable, "-S", "-c", PREPARE, *argv]
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, cwd=tmp_path, pass_fds=[passed]
        ) as process:
            assert process.stdout is not None
            seen: dict[str, object] = json.loads(process.stdout.read())
            assert seen.pop("pid") == process.pid
        assert process.returncode == 0
        return seen

    bare = look(*tool)
    with daemon(launcher.agent, reply(OK)):
        ours = look(str(launcher.programs / "agentcg-exec"), "--memory=1G", "--", *tool)
    os.close(passed)
    os.close(other)
    assert ours == bare
    assert ours["fds"] == sorted(["0", "1", "2", str(passed)])
    assert ours["blocked"] != ours["pending"] != ours["ignored"]


def test_no_fd_is_left_even_where_stdio_was_closed(launcher: Launcher) -> None:
    program = launcher.programs / "agentcg-exec"
    script = f'"{program}" ls /proc/self/fd <&- 2>&-'
    with daemon(launcher.agent, reply(OK)):
        ours = subprocess.run(["sh", "-c", script], env=launcher.env(), capture_output=True)
    bare = subprocess.run(["sh", "-c", "ls /proc/self/fd <&- 2>&-"], capture_output=True)
    assert ours.stdout == bare.stdout


def test_stdio_goes_through(launcher: Launcher) -> None:
    with daemon(launcher.agent, reply(OK)):
        result = subprocess.run(
            [str(launcher.programs / "agentcg-exec"), "sh", "-c", "cat; echo err >&2"],
            env=launcher.env(),
            input=b"\x00binary\xff",
            capture_output=True,
        )
    assert (result.stdout, result.stderr) == (b"\x00binary\xff", b"err\n")


@pytest.mark.parametrize("status", [0, 1, 125, 255])
def test_exit_status(launcher: Launcher, status: int) -> None:
    with daemon(launcher.agent, reply(OK)):
        assert launcher("sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_death_by_signal(launcher: Launcher, number: signal.Signals) -> None:
    with daemon(launcher.agent, reply(OK)):
        assert launcher("sh", "-c", f"kill -{int(number)} $$").returncode == -number


def test_own_group(launcher: Launcher) -> None:
    """Each child here starts in a session without a terminal, in its parent's group."""
    code = (
        "import os, subprocess, sys; print(os.getpgrp(), flush=True); subprocess.run(sys.argv[1:])"
    )
    look = ["sh", "-c", "echo $$ $(ps -o pgid= -p $$)"]
    program = str(launcher.programs / "agentcg-exec")

    def groups(*options: str, code: str = code) -> tuple[str, str, str]:
        argv = [sys.executable, "-c", code, program, *options, "--", *look]
        run = subprocess.run(
            argv, env=launcher.env(), capture_output=True, text=True, start_new_session=True
        )
        theirs, pid, group = run.stdout.split()
        return theirs, pid, group

    with daemon(launcher.agent, reply(OK)):
        theirs, pid, group = groups("--own-group")
        assert group == pid != theirs
        theirs, pid, group = groups()
        assert group == theirs != pid  # who ends a group ends what it runs
        # In a terminal ^C has to reach the tool.
        in_terminal = (
            "import fcntl, os, pty, termios\nmaster, slave = pty.openpty()\n"
            f"fcntl.ioctl(slave, termios.TIOCSCTTY, 0)\n{code}"
        )
        theirs, pid, group = groups("--own-group", code=in_terminal)
        assert group == theirs != pid


def test_exec_failures_are_told_by_number_where_a_descriptor_is_given(
    launcher: Launcher, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    read, write = os.pipe()
    os.set_inheritable(write, True)
    with daemon(launcher.agent, reply(OK)):
        option = f"--error-fd={write}"
        argv = [str(launcher.programs / "agentcg-exec"), option, "--", str(script)]
        env = launcher.env()
        failed = subprocess.run(argv, env=env, pass_fds=[write], capture_output=True)
        assert (failed.returncode, failed.stderr) == (127, b"")
        assert os.read(read, 16) == b"2"  # ENOENT
        # The tool does not inherit it.
        argv[-1:] = ["sh", "-c", f"ls /proc/self/fd | grep -qx {write}"]
        assert subprocess.run(argv, env=env, pass_fds=[write]).returncode == 1
    os.close(read)
    os.close(write)


def test_exec_failures(launcher: Launcher, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("not executable")
    with daemon(launcher.agent, reply(OK)):
        result = launcher("no-such-tool-here")
        assert result.returncode == 127
        assert result.stderr == "agentcg-exec: no-such-tool-here: No such file or directory\n"
        result = launcher(str(plain))
        assert result.returncode == 126
        assert result.stderr == f"agentcg-exec: {plain}: Permission denied\n"


# ---- replies


def test_wait_then_ok(launcher: Launcher) -> None:
    def handle(conn: socket.socket, request: bytes) -> None:
        for _ in range(3):
            conn.send(b"WAIT\0seconds=1\0")
            time.sleep(0.1)
        conn.send(OK)

    with daemon(launcher.agent, handle):
        result = launcher("echo", "hi")
    assert (result.returncode, result.stdout, result.stderr) == (0, "hi\n", "")


@pytest.mark.waits
def test_wait_then_refused_or_gone(launcher: Launcher) -> None:
    waits = b"WAIT\0seconds=5\0"
    with daemon(launcher.agent, reply(waits, b"ERR\0DEADLINE_EXCEEDED\0no room in time\0")):
        result = launcher("--on-unavailable=run", "echo", "hi")
    assert (result.returncode, result.stdout) == (125, "")
    assert result.stderr == "agentcg-exec: no room in time\n"
    launcher.agent.unlink()
    with daemon(launcher.agent, reply(waits)):
        result = launcher("echo", "hi")
    assert (result.returncode, result.stdout) == (125, "")
    assert "hangs up" in result.stderr


@pytest.mark.parametrize("verb", [[], ["--call", "c1"]])
def test_refused_is_never_run(launcher: Launcher, verb: list[str]) -> None:
    err = b"ERR\0INVALID_ARGUMENT\0memory_max '9T' is more than the session's 2G\0"
    with daemon(launcher.agent, reply(err)):
        result = launcher(*verb, "--on-unavailable", "run", "echo", "hi")
    assert (result.returncode, result.stdout) == (125, "")
    assert result.stderr == "agentcg-exec: memory_max '9T' is more than the session's 2G\n"


def test_hung_up_with_the_refusal_unread(launcher: Launcher) -> None:
    """The daemon's reply counts even where the connection was reset by then."""
    launcher.agent.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(launcher.agent))
        listener.listen(1)
        process = subprocess.Popen(
            [str(launcher.programs / "agentcg-exec"), "echo", "hi"],
            env=launcher.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        conn, _ = listener.accept()
        conn.recv(1, socket.MSG_PEEK)  # the request is there, so it waits for a reply
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        conn.send(b"ERR\0PERMISSION_DENIED\0in no session\0")
        conn.close()
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (125, b"", b"agentcg-exec: in no session\n")


def test_stopped_and_continued_while_it_waits(launcher: Launcher) -> None:
    go = threading.Event()

    def handle(conn: socket.socket, request: bytes) -> None:
        go.wait(10)
        conn.send(OK)

    with daemon(launcher.agent, handle) as it:
        process = subprocess.Popen(
            [str(launcher.programs / "agentcg-exec"), "echo", "hi"],
            env=launcher.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        while not it.requests:
            time.sleep(0.001)
        for _ in range(20):
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            process.send_signal(signal.SIGCONT)
        go.set()
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, b"hi\n", b"")


GARBAGE = [
    b"\0",
    b"OK",
    b"OK\0",
    b"OK\0call=c1",
    b"OK call=c1\0",
    b"OK\0session=s1\0",
    b"OKAY\0call=c1\0",
    b"ERR",
    b"ERR\0A\0sentence without its end",
    b"WAIT\0",
    b"WAIT\0seconds=\0",
    b"WAIT\0seconds=x\0",
    b"WAIT\0seconds=1x\0",
    b"WAIT\0seconds=1",
    b"%n%n%n%s\0%s\0",
    b"\xff" * 16384,
    b"A" * 16384,
    b"ERR\0" + b"A" * 20000 + b"\0",
    b"OK\0call=" + b"A" * 20000 + b"\0",
]


@pytest.mark.parametrize("packet", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_never_consent(launcher: Launcher, packet: bytes) -> None:
    with daemon(launcher.agent, reply(packet, OK)):
        result = launcher("--on-unavailable=run", "echo", "hi")
    assert (result.returncode, result.stdout) == (125, "")
    assert "does not speak the attach protocol" in result.stderr


@pytest.mark.parametrize("packet", [b"ERR\0", b"ERR\0INTERNAL\0", b"ERR\0INTERNAL\0\0"])
def test_refused_without_a_sentence(launcher: Launcher, packet: bytes) -> None:
    with daemon(launcher.agent, reply(packet)):
        result = launcher("echo", "hi")
    assert (result.returncode, result.stdout) == (125, "")
    assert result.stderr == "agentcg-exec: refused without a reason\n"


def test_hostile_sentence_is_one_harmless_line(launcher: Launcher) -> None:
    sentence = b"%s%n \x1b]0;x\x07\nagentcg-exec: fine\r\x7f\xc2\x9b31m \xc3\xa9 \xff"
    with daemon(launcher.agent, reply(b"ERR\0INTERNAL\0" + sentence + b"\0")):
        result = launcher("echo", "hi")
    assert result.returncode == 125
    assert result.stderr.encode(errors="surrogateescape") == (
        b"agentcg-exec: %s%n ?]0;x??agentcg-exec: fine????31m \xc3\xa9 \xff\n"
    )


def test_longest_sentence(launcher: Launcher) -> None:
    head = b"ERR\0INTERNAL\0"
    sentence = b"s" * (16384 - len(head) - 1)
    with daemon(launcher.agent, reply(head + sentence + b"\0")):
        result = launcher("echo", "hi")
    assert result.returncode == 125
    assert result.stderr == f"agentcg-exec: {sentence.decode()}\n"


# ---- the daemon is away


@contextmanager
def away(path: Path, how: str) -> Iterator[None]:
    """Prepare a daemon that is away in one of the possible ways."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        if how != "no socket":
            listener.bind(str(path))
        if how != "nobody listens":
            yield
            return
    yield


@pytest.mark.parametrize("how", ["no socket", "nobody listens"])
def test_away(launcher: Launcher, how: str) -> None:
    def run(*args: str, **env: str) -> bool:
        result = launcher(*args, "echo", "hi", **env)
        lines = result.stderr.splitlines()
        assert len(lines) == 1
        if result.returncode == 0:
            assert result.stdout == "hi\n"
            assert lines[0].startswith("agentcg-exec: warning: ")
            assert lines[0].endswith("; running without limits")
            return True
        assert (result.returncode, result.stdout) == (125, "")
        assert lines[0].startswith("agentcg-exec: ") and "warning" not in lines[0]
        return False

    with away(launcher.agent, how):
        assert run()
        assert run("--on-unavailable", "run")
        assert not run("--on-unavailable=refuse")
        assert not run(AGENTCG_ON_UNAVAILABLE="refuse")
        assert run(AGENTCG_ON_UNAVAILABLE="")
        assert run("--on-unavailable=run", AGENTCG_ON_UNAVAILABLE="refuse")
        assert not run("--call=c1")
        assert not run("--call=c1", AGENTCG_ON_UNAVAILABLE="run")
        assert run("--call=c1", "--on-unavailable=run")
    with away(launcher.admin, how):
        assert not run("--session=s1")


def test_warning_that_nobody_reads_kills_nothing(launcher: Launcher) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [str(launcher.programs / "agentcg-exec"), "sh", "-c", "kill -PIPE $$"],
        env=launcher.env(),
        stderr=write,
        stdout=subprocess.PIPE,
        restore_signals=True,
    )
    os.close(write)
    # The tool ran, with the default action for SIGPIPE, as before.
    assert result.returncode == -signal.SIGPIPE


def test_not_a_daemon_at_all(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "stream.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        result = launcher("--socket", str(path), "echo", "hi")
        assert (result.returncode, result.stdout) == (125, "")
        assert str(path) in result.stderr
    result = launcher("--socket", str(tmp_path / "file/x"), "echo", "hi")
    assert (result.returncode, result.stdout) == (125, "")


@pytest.mark.waits
def test_silence_is_no_absence(launcher: Launcher, tmp_path: Path) -> None:
    """Three waits at the same time: no reply, nothing after WAIT, a backlog that stays full."""

    program = str(launcher.programs / "agentcg-exec")

    def listen(name: str, backlog: int) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(tmp_path / name))
        listener.listen(backlog)
        return listener

    def start(name: str, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [program, f"--socket={tmp_path / name}", *args, "date", "+%s.%N"],
            env=launcher.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with listen("silent", 4) as silent, listen("waits", 4) as waits, listen("full", 0) as full:
        filler = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        filler.connect(full.getsockname())
        began = time.time()
        runs = {
            "silent": start("silent"),
            "refuse": start("silent", "--on-unavailable=refuse"),
            "run": start("silent", "--on-unavailable=run"),
            "full": start("full"),
            "waits": start("waits"),
        }
        conn, _ = waits.accept()
        conn.send(b"WAIT\0seconds=2\0")
        results = {
            name: (*run.communicate(timeout=30), run.returncode) for name, run in runs.items()
        }
        silent.close()
        filler.close()
        conn.close()
        took = time.time() - began
    assert took < 16
    for out, err, status in results.values():
        assert (out, status) == ("", 125) and "no reply in time" in err


@pytest.mark.waits
def test_a_daemon_that_hangs_up_is_asked_again(launcher: Launcher, tmp_path: Path) -> None:
    """No answer is no absence: the tool never runs without limits for it."""
    asked: list[float] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "x"))
        listener.listen()

        def hang_up() -> None:
            while True:
                try:
                    conn, _ = listener.accept()
                except OSError:
                    return
                asked.append(time.monotonic())
                conn.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        result = launcher("--socket", str(tmp_path / "x"), "--on-unavailable=run", "echo", "hi")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert (result.returncode, result.stdout) == (125, "")
    assert "hangs up" in result.stderr and len(asked) == 8
    assert 3.0 < asked[-1] - asked[0] < 8.0


# ---- usage


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--memroy", "1G", "echo"], "--memroy"),
        (["--memroy=1G", "echo"], "--memroy"),
        (["-m", "echo"], "m"),
        (["--memory"], "--memory"),
        (["--help=x", "echo"], "--help"),
        (["--call=c1", "--memory=1G", "echo"], "--memory"),
        (["--call=c1", "--session=s1", "echo"], "--session"),
        (["--session=s1", "--name=x", "echo"], "--name"),
        (["--on-unavailable=maybe", "echo"], "--on-unavailable"),
        (["--socket", "/" + "x" * 200, "echo"], "socket path too long"),
        (["--memory", "1G"], "no command"),
        (["--"], "no command"),
        ([], "no command"),
        ([""], "no command"),
    ],
)
def test_usage_errors_name_the_option(launcher: Launcher, args: list[str], named: str) -> None:
    with daemon(launcher.agent, reply(OK)) as it:
        result = launcher(*args)
    assert result.returncode == 125
    assert named in result.stderr and len(result.stderr.splitlines()) == 1
    assert (result.stdout, it.requests) == ("", [])


def test_bad_environment_is_named(launcher: Launcher, tmp_path: Path) -> None:
    result = launcher("echo", AGENTCG_ON_UNAVAILABLE="perhaps")
    assert result.returncode == 125 and "'perhaps'" in result.stderr
    result = launcher("echo", AGENTCG_RUN_DIR="/" + "x" * 200)
    assert result.returncode == 125 and "socket path too long" in result.stderr


# ---- agentcg


def test_agentcg_finds_its_siblings(programs: Path, tmp_path: Path) -> None:
    for name in ("agentcg", "agentcg-exec"):
        (tmp_path / name).write_bytes((programs / name).read_bytes())
        (tmp_path / name).chmod(0o755)
    cli = tmp_path / "agentcg-cli"
    cli.write_text('#!/bin/sh\necho cli "$@"\n')
    cli.chmod(0o755)
    agentcg = str(tmp_path / "agentcg")
    env = {"PATH": "/usr/bin:/bin"}

    def run(*args: str, **more: str) -> Result:
        return subprocess.run(
            [agentcg, *args], env={**env, **more}, capture_output=True, text=True, timeout=60
        )

    assert run("status", "--json").stdout == "cli status --json\n"
    assert run().stdout == "cli\n"
    with daemon(tmp_path / "agent/attach.sock", reply(OK)) as it:
        result = run("exec", "--memory=1G", "--", "echo", "exec", AGENTCG_RUN_DIR=str(tmp_path))
        assert (result.returncode, result.stdout, result.stderr) == (0, "exec\n", "")
        assert it.keys[b"memory"] == b"1G"
    (tmp_path / "elsewhere").mkdir()
    cli.rename(tmp_path / "elsewhere/agentcg-cli")
    assert run("x", PATH=str(tmp_path / "elsewhere") + ":/bin").stdout == "cli x\n"
    result = run("x")
    assert result.returncode == 127 and "agentcg-cli" in result.stderr
