"""The command against a fake daemon."""

from __future__ import annotations

import errno
import importlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib

from agentcgroup import Admin, Agent, InvalidIntent, cli, extras
from agentcgroup.cli import common, output
from agentcgroup.extras import EXTRA_OF
from tests.unit.fake_daemon import FakeDaemon, running

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    yield from running(monkeypatch)


@pytest.fixture
def agent_only(daemon: FakeDaemon) -> FakeDaemon:
    """A daemon seen from a container, which has only the agent's sockets."""
    for name in ("grpc", "attach"):
        (daemon.run_dir / "admin" / f"{name}.sock").unlink()
    return daemon


class Cli:
    """A runner of command lines in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.err = ""

    def __call__(self, *argv: str, code: int = 0) -> str:
        self._capsys.readouterr()
        try:
            got = cli.main(argv)
        except SystemExit as stop:
            got = stop.code if isinstance(stop.code, int) else 1
        out, self.err = self._capsys.readouterr()
        assert got == code, (got, out, self.err)
        return out

    def json(self, *argv: str, code: int = 0) -> Any:
        return json.loads(self(*argv, "--json", code=code))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def test_status_of_the_pool(daemon: FakeDaemon, run: Cli) -> None:
    with Agent() as agent, agent.tool_call("pytest"):
        text = run("status")
        found = run.json("status")
    assert "300 MiB of 8.0 GiB" in text
    assert "pytest" in text and "s1" in text
    assert "\033" not in text
    assert found["view"] == "pool"
    assert found["pool"]["kernel"] == "7.3.4"
    assert found["pool"]["not_enforced"] == []
    assert found["sessions"][0]["memory_max_bytes"] is None
    assert found["calls"][0]["state"] == "pending"


def test_status_inside_a_session(agent_only: FakeDaemon, run: Cli) -> None:
    text = run("status")
    assert "s1" in text and "1.0 GiB left of 4.0 GiB" in text
    found = run.json("status")
    assert (found["view"], found["session"]["id"]) == ("session", "s1")


def test_status_of_root_inside_a_session(daemon: FakeDaemon, run: Cli) -> None:
    daemon.operator = False
    assert run.json("status")["view"] == "session"
    run("sessions", code=4)
    assert "outside every session" in run.err


def test_sessions(daemon: FakeDaemon, run: Cli) -> None:
    assert run("sessions").splitlines()[1].startswith("s1")
    assert [session["id"] for session in run.json("sessions")] == ["s1"]
    daemon.sessions.clear()
    assert "agentcg session run" in run("sessions")


def test_session_open_adopt_close(daemon: FakeDaemon, run: Cli) -> None:
    assert run.json("session", "open", "a", "--memory-max", "2G")["memory_max_bytes"] == 2 << 30
    assert "2.0 GiB" in run("session", "open", "b", "--memory-max=2G")
    run("session", "open", "a", code=4)
    assert "open already" in run.err and "--reuse" in run.err
    assert run.json("session", "adopt", "c", "/system.slice/x.scope")["adopted"] is True
    assert "adopted" in run("sessions")
    assert run.json("session", "close", "a") == {"session_id": "a", "calls_ended": 2}
    assert "calls ended with it: 2" in run("session", "close", "b")
    run("session", "close", "nobody", code=5)
    assert "'nobody'" in run.err and "agentcg sessions" in run.err


def test_labels_of_a_session(daemon: FakeDaemon, run: Cli) -> None:
    assert "LABELS" not in run("sessions")
    labels = ["--label", "team=web", "--label=user=a=b"]
    found = run.json("session", "open", "a", *labels)
    assert found["labels"] == {"team": "web", "user": "a=b"}
    head, *rows = run("sessions").splitlines()
    assert head.split()[-1] == "LABELS"
    assert {row.split()[0]: row.split()[-1] for row in rows} == {
        "s1": "-",
        "a": "team=web,user=a=b",
    }
    run("session", "open", "b", "--label", "team", code=2)
    assert "'team' is no label: allowed is KEY=VALUE" in run.err
    run("session", "open", "b", "--label", "team=a", "--label", "team=b", code=2)
    assert "given twice" in run.err
    run("session", "set", "a", "--label", "team=ops", code=2)
    with Admin() as admin:
        with pytest.raises(InvalidIntent, match="mapping of str to str"):
            admin.open_session("b", labels="team=web")
        with pytest.raises(InvalidIntent, match="7 is no text"):
            admin.open_session("b", labels={"team": 7})  # type: ignore[dict-item]


def test_session_run(daemon: FakeDaemon, run: Cli, tmp_path: Path) -> None:
    file = tmp_path / "out"
    command = ["sh", "-c", f'echo "$@" > {file}; exit 7', "sh", "--json", "--", "x"]
    run("session", "run", "a", "--memory-max", "2G", "--", *command, code=7)
    assert file.read_text() == "--json -- x\n"
    assert len(daemon.entered("a", "admin")) == 1
    assert list(daemon.sessions) == ["s1"]
    run("session", "run", "s1", "--", "true", code=125)
    run("session", "run", "s1", "--reuse", "--", "true")
    assert list(daemon.sessions) == ["s1"]
    run("session", "run", "a", "--keep", "--", "true")
    assert list(daemon.sessions) == ["s1", "a"]
    run("session", "run", "b", "--", "sh", "-c", "kill -KILL $$", code=128 + 9)
    result = json.loads(run("session", "run", "c", "--json", "--", "true"))
    assert result == {"session_id": "c", "exit_status": 0, "calls_ended": 2, "kept": False}
    run("session", "run", "d", code=125)
    assert "no command is given" in run.err
    run("session", "run", "e", "--", "no-such-program", code=127)
    assert list(daemon.sessions) == ["s1", "a"]


def command_line(*argv: str, **kwargs: Any) -> subprocess.Popen[str]:
    code = "import sys; from agentcgroup.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, *argv], text=True, **kwargs)


def test_session_run_forwards_signals(daemon: FakeDaemon) -> None:
    script = 'trap "echo got; exit 9" TERM; echo ready; while :; do sleep 0.05; done'
    argv = ["session", "run", "a", "--", "sh", "-c", script]
    process = command_line(*argv, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "got\n"
    assert process.returncode == 9
    assert list(daemon.sessions) == ["s1"]


def test_calls_end_report(daemon: FakeDaemon, run: Cli) -> None:
    assert "no call is open" in run("calls")
    run("report", code=5)
    assert "no report" in run.err and "agentcg calls" in run.err
    with Agent() as agent:
        agent.run(["true"])
        call = agent.tool_call("sleeper").begin()
        assert "sleeper" in run("calls")
        assert run.json("calls")[0]["id"] == call.id
        assert run.json("end", call.id)["verdict"] == "cancelled"
        run("end", call.id, code=5)
        other = agent.tool_call("other").begin()
        assert "ends when" in run("end", other.id, "--detach")
        third = agent.tool_call("third").begin()
        assert "cancelled" in run("end", third.id)
    text = run("report", "c1")
    assert "ok: true ended." in text
    assert "190 MiB" in text
    assert "feedback: thawed: It was frozen." in text
    assert run.json("report", "c1")["verdict"] == "ok"
    assert run.json("report", "--last")["name"] == run.json("report")["name"] == "third"
    table = run("report", "--limit", "2")
    assert [line.split()[2] for line in table.splitlines()[1:]] == ["third", "other"]
    assert len(run.json("report", "--limit", "2")) == 2
    run("report", "c1", "--check")
    run("report", "--last", "--check", code=1)
    for wrong in ("0", "-1", "x", "1.5"):
        run("report", f"--limit={wrong}", code=2)
        assert f"'{wrong}' is not a whole number, 1 or more" in run.err


def test_agents_commands_inside_a_session(agent_only: FakeDaemon, run: Cli) -> None:
    with Agent() as agent:
        agent.run(["true"])
    assert run.json("calls") == []
    assert run.json("report")["name"] == "true"
    assert len(run.json("report", "--limit", "5")) == 1
    assert "1.0 GiB left of 4.0 GiB" in run("budget")
    assert run.json("budget")["pids_limit"] is None


def test_feedback_and_events(daemon: FakeDaemon, run: Cli) -> None:
    with Agent() as agent:
        agent.run(["true"])
        agent.run(["false"])
    lines = [json.loads(line) for line in run("feedback", "--json").splitlines()]
    assert [line["code"] for line in lines] == ["thawed", "thawed"]
    assert run("feedback", "--call", "c2").count("thawed: It was frozen.") == 1
    events = run("events").splitlines()
    assert "c1" in events[0] and "ok" in events[0]
    assert "c2" in events[1] and "failed" in events[1]
    line = json.loads(run("events", "--json").splitlines()[0])
    assert line["ended"]["call_id"] == "c1" and line["begun"] is None


@pytest.mark.parametrize("what", ["feedback", "events"])
def test_follow(daemon: FakeDaemon, what: str) -> None:
    process = command_line(what, "--follow", "--json", stdout=subprocess.PIPE)
    assert process.stdout is not None
    daemon.say("one")
    line = json.loads(process.stdout.readline())
    assert (line["feedback"] if what == "events" else line)["sentence"] == "one"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 128 + signal.SIGINT
    process.stdout.close()


def test_daemon_away(daemon: FakeDaemon, run: Cli) -> None:
    daemon.stop()
    for argv in (["status"], ["sessions"], ["budget"], ["calls"], ["feedback", "--follow"]):
        run(*argv, code=3)
        assert "cannot be reached" in run.err
        assert "systemctl start agentcgroupd" in run.err
    found = run.json("status", code=3)
    assert found["error"]["code"] == "UNAVAILABLE"


def test_not_in_a_session(agent_only: FakeDaemon, run: Cli) -> None:
    agent_only.in_session = False
    run("budget", code=4)
    assert "in no session" in run.err
    assert "agentcg session run NAME COMMAND" in run.err


def test_version(daemon: FakeDaemon, run: Cli) -> None:
    assert run.json("version")["daemon"] == "1.2.3"
    daemon.stop()
    assert "not reachable" in run("version")
    assert run.json("version")["daemon"] is None


def test_exec_becomes_the_launcher(daemon: FakeDaemon) -> None:
    daemon.launcher.write_text('#!/bin/sh\necho "$@"\nexit 5\n')
    argv = ["exec", "--memory", "1G", "--", "tool", "--json"]
    process = command_line(*argv, stdout=subprocess.PIPE)
    assert process.communicate(timeout=20)[0] == "--memory 1G -- tool --json\n"
    assert process.returncode == 5


def test_exec_without_a_launcher(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTCG_EXEC", "/nowhere/at-all")
    run("exec", "--", "true", code=127)
    assert "/nowhere/at-all" in run.err


def test_usage(run: Cli) -> None:
    run("nonsense", code=2)
    assert "exit codes:" in run("--help")
    assert "--memory-max" in run("session", "run", "--help")


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


class Diagnosis:
    ok = False

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok}

    def render(self, paint: Callable[[str, str], str]) -> str:
        return paint("ok", "green") + " \x9b31m"


def test_doctor(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, "agentcgroupd.doctor.report", run=Diagnosis)
    assert run("doctor", code=1) == "ok ?31m\n"
    assert run.json("doctor", code=1) == {"ok": False}
    monkeypatch.setattr(Diagnosis, "ok", True)
    run("doctor")


def test_record_and_replay_are_delegated(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--speed", type=float)
        parser.add_argument("--json", action="store_true")
        parser.add_argument("rest", nargs="*")

    def go(args: Any) -> int:
        print(args.speed, args.rest, args.json)
        return 7

    fake_module(
        monkeypatch,
        "agentcgroup_lab.replay.cli",
        add_record_arguments=add,
        run_record=go,
        add_replay_arguments=add,
        run_replay=go,
    )
    assert run("record", "--speed", "2", "--", "a", code=7) == "2.0 ['a'] False\n"
    assert run("replay", "t.json", "--json", code=7) == "None ['t.json'] True\n"


@pytest.mark.parametrize("command", ["doctor", "record", "replay"])
def test_daemon_package_not_installed(
    run: Cli, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    monkeypatch.setattr("importlib.import_module", absent)
    run(command, "x", code=2 if command == "doctor" else 1)
    if command == "doctor":
        run(command, code=1)
    assert "pip install 'agentcgroup[daemon]'" in run.err and "pydantic" in run.err
    sentence = run.json(command, code=1)["error"]["sentence"]
    assert run.err == f"agentcg: {sentence}\n"


def test_a_module_that_is_missed_while_a_command_runs(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(args: Any) -> int:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.figure")

    def lose(args: Any) -> int:
        raise ModuleNotFoundError("No module named 'agentcgroup.x'", name="agentcgroup.x")

    def add(parser: Any) -> None:
        pass

    fakes: dict[str, Any] = {"add_record_arguments": add, "add_replay_arguments": add}
    fakes |= {"run_record": lose, "run_replay": draw}
    fake_module(monkeypatch, "agentcgroup_lab.replay.cli", **fakes)
    run("replay", code=1)
    assert "matplotlib" in run.err and f"agentcgroup[{EXTRA_OF['matplotlib']}]" in run.err
    with pytest.raises(ModuleNotFoundError, match=r"agentcgroup\.x"):
        run("record")


@pytest.mark.parametrize(
    "arguments",
    [
        ["replay", "t.jsonl", "--pool", "1G", "--plot", "p.png"],
        ["policy", "simulate", "--trace", "t", "--pool", "1G", "--sessions", "2", "--out", "p.png"],
    ],
)
def test_a_picture_without_its_extra_is_told_before_the_work(
    run: Cli, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(*arguments, code=1)
    assert "pip install 'agentcgroup[lab]'" in run.err and "matplotlib" in run.err


def test_extras_that_are_named_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*EXTRA_OF.values(), "daemon"} <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("least", "module", "said"),
    [
        ((3, 11), "pydantic.fields", "pip install 'agentcgroup[daemon]'"),
        ((3, 11), "pynvml", "pip install 'agentcgroup[gpu]'"),
        ((3, 99), "tomllib", "needs Python 3.99 or later"),
        ((3, 99), "typing", "needs Python 3.99 or later"),
    ],
)
def test_the_daemon_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    least: tuple[int, int],
    module: str,
    said: str,
) -> None:
    monkeypatch.delitem(sys.modules, "agentcgroupd.__main__", raising=False)
    monkeypatch.setattr(extras, "DAEMON_PYTHON", least)
    lacking = types.ModuleType("agentcgroupd.config")

    def get(name: str) -> Any:
        raise ImportError(f"no {module}", name=module)

    vars(lacking)["__getattr__"] = get
    monkeypatch.setitem(sys.modules, "agentcgroupd.config", lacking)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("agentcgroupd.__main__")
    assert ended.value.code == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("agentcgroupd: this needs ") and said in line


def test_colors_only_where_welcome(daemon: FakeDaemon) -> None:
    def shown(**env: str) -> bytes:
        master, slave = pty.openpty()
        process = command_line("sessions", stdout=slave, env={**os.environ, **env})
        os.close(slave)
        text = b""
        try:
            while chunk := os.read(master, 4096):
                text += chunk
        except OSError as error:
            assert error.errno == errno.EIO  # how a terminal says that its other side has closed
        os.close(master)
        assert process.wait() == 0
        return text

    assert b"\033[1m" in shown(TERM="xterm")
    assert b"\033" not in shown(TERM="xterm", NO_COLOR="1")


def test_nothing_raw_reaches_the_terminal(run: Cli, daemon: FakeDaemon) -> None:
    hostile = "a\x1b[31m\x9b32m\u202e\u2066\u200b\U000e0041\rb"
    with Agent() as agent, agent.tool_call(hostile, argv=[hostile, "two\nlines"]) as call:
        for command in (["calls"], ["status"]):
            shown = run(*command)
            assert not set(hostile) - {*"ab[312m"} & set(shown), command
            assert "a?[31m?32m" in shown
        document = run("calls", "--json")
        assert "\\u202e" in document and "\\udb40\\udc41" in document
        assert json.loads(document)[0]["name"] == hostile
    shown = run("report", call.id)
    assert "\nlines" not in shown  # a further line of a value is indented
    assert not set(hostile) - {*"ab[312m"} & set(shown)


def test_every_command_prints_through_one_function() -> None:
    for module in Path(cli.__file__).parent.glob("*.py"):
        if module.name != "output.py":
            text = module.read_text()
            assert not re.search(r"(?<![\w.])print\(|stdout\.write|stderr\.write", text), module


def test_reader_that_goes_away(daemon: FakeDaemon) -> None:
    process = command_line("sessions", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_readable_numbers() -> None:
    sizes = {None: "-", 0: "0 B", 2048: "2.0 KiB", 512 << 20: "512 MiB"}
    sizes |= {3 << 29: "1.5 GiB", 5 << 40: "5.0 TiB"}
    assert {count: output.size(count) for count in sizes} == sizes
    durations = {None: "-", 5: "5 us", 1500: "1.5 ms", 2_500_000: "2.50 s"}
    durations |= {90_000_000: "1 min 30 s", 12_000_000_000: "3 h 20 min"}
    durations |= {200_000_000_000: "2 d 7 h"}
    assert {usec: output.duration(usec) for usec in durations} == durations
    assert output.cores(1500) == "1.5"


def test_exit_codes_are_as_documented() -> None:
    codes = [common.OK, common.BAD, common.USAGE, common.UNAVAILABLE, common.REFUSED]
    assert [*codes, common.NOT_FOUND] == [0, 1, 2, 3, 4, 5]
    for code in range(6):
        assert f"\n  {code}  " in common.EXIT_CODES
