"""What the command says to a person who guesses, mistypes, or cannot be answered."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from agentcgroup import Agent
from agentcgroup.cli import adopt, common, execute, forward
from agentcgroup.cli.commands import build_parser
from agentcgroup.cli.summaries import GUESSES
from agentcgroup.errors import NotFound
from agentcgroup.intent import INTENT_FIELDS
from tests.unit.fake_daemon import FakeDaemon, running
from tests.unit.sdk.test_cli import Cli, command_line, run

__all__ = ["run"]  # the fixture


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    yield from running(monkeypatch)


# Finding the way


def test_version_of_the_command(run: Cli) -> None:
    assert run("--version") == f"agentcg {version('agentcgroup')}\n"


@pytest.mark.parametrize(
    ("argv", "usage"),
    [
        ([], "usage: agentcg "),
        (["help"], "usage: agentcg "),
        (["session"], "usage: agentcg session "),
        (["policy"], "usage: agentcg policy "),
        (["call"], "usage: agentcg call "),
        (["help", "sessions"], "usage: agentcg sessions "),
        (["help", "session", "set"], "usage: agentcg session set "),
        (["help", "session", "run"], "usage: agentcg session run "),
    ],
)
def test_help_is_shown_to_who_asks_for_nothing_else(run: Cli, argv: list[str], usage: str) -> None:
    assert run(*argv).startswith(usage)


def test_other_words_for_the_same(daemon: FakeDaemon, run: Cli) -> None:
    with Agent() as agent:
        agent.run(["true"])
        with agent.tool_call("sleeper") as call:
            assert run("ps") == run("call", "list") == run("calls")
            assert run.json("call", "end", call.id)["call_id"] == call.id
    assert run("call", "report", "c1") == run("report", "c1")
    assert run("session", "list") == run("sessions")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sesions"], "there is no command 'sesions'; did you mean 'sessions'?"),
        (["session", "opne", "x"], "there is no command 'opne'; did you mean 'open'?"),
        (["frobnicate"], "there is no command 'frobnicate'; there are exec, status, "),
        (["adopt", "x"], "there is no command 'adopt'; did you mean 'session adopt'?"),
        (["kill", "x"], "there is no command 'kill'; did you mean 'end'?"),
        (["--json", "sessions"], "--json stands behind the command, as in: agentcg sessions"),
        (["sessions", "--jsn"], "there is no option --jsn; did you mean '--json'?"),
        (["session", "open", "x", "--memory-mx", "1G"], "did you mean '--memory-max'?"),
        (["session", "open", "x", "--memory-mx=1G"], "there is no option --memory-mx;"),
        (["sessions", "more"], "there is one argument too many: 'more'"),
        (["audit", "shw"], "'shw' cannot be used; allowed is show or verify"),
        (["report", "--limit", "x"], "'x' is not a whole number, 1 or more"),
        (["session", "open"], "the following arguments are required: NAME"),
        (["setup"], "required: AGENT; AGENT is claude or codex or gemini or opencode or openhands"),
        (["session", "set", "x"], "no limit is given"),
        (["session", "adopt", "x"], "--pid"),
    ],
)
def test_a_mistake_is_answered_with_what_may_have_been_meant(
    run: Cli, argv: list[str], said: str
) -> None:
    assert run(*argv, code=2) == ""
    first, advice = run.err.splitlines()
    assert said in first
    words = [*argv[:2]] if argv[0] == "session" and argv[1] != "opne" else argv[:1]
    known = argv[0] not in ("sesions", "frobnicate", "adopt", "kill", "--json")
    assert advice == f"  try: {' '.join(['agentcg', *words] if known else ['agentcg'])} --help"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["x", "--memory-mx", "1G", "true"], "there is no option --memory-mx"),
        (["x"], "no command is given"),
        ([], "required: NAME"),
    ],
)
def test_wrong_usage_of_session_run_is_no_status_of_a_command(
    run: Cli, argv: list[str], said: str
) -> None:
    run("session", "run", *argv, code=125)
    assert said in run.err


def test_a_command_needs_no_dashes_before_it(daemon: FakeDaemon, run: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f'echo "$@" > {out}; exit 7'
    cases = [
        ["a", "sh", "-c", script, "sh", "--json", "--", "--reuse"],
        ["a", "--", "sh", "-c", script, "sh", "--json", "--", "--reuse"],
        ["a", "--memory-max", "2G", "sh", "-c", script, "sh", "--json", "--", "--reuse"],
        ["--memory-max=2G", "a", "sh", "-c", script, "sh", "--json", "--", "--reuse"],
        ["--memory-ma", "2G", "a", "sh", "-c", script, "sh", "--json", "--", "--reuse"],
    ]
    for case in cases:
        assert run("session", "run", *case, code=7) == ""
        assert out.read_text() == "--json -- --reuse\n", case
    assert '"exit_status": 0' in run("session", "run", "a", "--json", "true")


def test_values_are_explained_where_they_are_asked_for(run: Cli) -> None:
    for argv in (["session", "open"], ["session", "set"], ["session", "run"], ["exec"]):
        text = run("help", *argv) if argv != ["exec"] else common.UNITS
        for word in ("SIZE", "512M", "CORES", "250m", "PRIORITY", "batch (20)"):
            assert word in text, (argv, word)


def test_the_options_of_exec_are_those_of_the_launcher(programs: Path) -> None:
    assert set(execute.INTENT) == INTENT_FIELDS
    done = subprocess.run([programs / "agentcg-exec", "--help"], capture_output=True, text=True)
    options = [*execute.INTENT, *execute.OTHERS, *execute.FLAGS]
    for name in options:
        assert f"--{name.replace('_', '-')}" in done.stdout, name
    shown = set(re.findall(r"^  --([a-z-]+)", done.stdout, re.MULTILINE))
    assert shown <= {name.replace("_", "-") for name in options}


# Errors in the words of who typed


def test_what_others_call_a_command_is_a_command() -> None:
    for word, meant in GUESSES.items():
        with pytest.raises(SystemExit) as ended:
            build_parser((word,)).parse_args([word])
        assert ended.value.code == 2
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args([*meant.split(), "--help"])
        assert ended.value.code == 0, meant


def test_an_error_names_the_option_that_was_typed(daemon: FakeDaemon, run: Cli) -> None:
    run("session", "set", "s1", "--memory-max", "1M", code=4)
    first = run.err.splitlines()[0]
    assert first == (
        "agentcg: --memory-max: '1M' cannot be used; allowed is at least --memory-low (5 MiB)"
    )
    error = run.json("session", "set", "s1", "--memory-max", "1M", code=4)["error"]
    assert error["field"] == "memory_max", "programs get the name of the protocol"


def test_reuse_changes_the_limits_that_are_named(daemon: FakeDaemon, run: Cli) -> None:
    run("session", "run", "s1", "--reuse", "true")
    assert "UpdateSession" not in daemon.attempts
    run("session", "run", "s1", "--reuse", "--memory-max", "2G", "true")
    assert daemon.sessions["s1"].memory_max_bytes == 2 << 30
    run("session", "run", "s1", "--reuse", "--memory-max", "1M", "true", code=125)
    assert "--memory-max" in run.err


def test_a_limit_that_is_not_enforced_is_said_once(daemon: FakeDaemon, run: Cli) -> None:
    daemon.not_enforced = ["memory.low", "memory.high", "memory.max", "pids.max"]
    run("session", "open", "a", "--memory-max", "2G", "--pids-max", "5", "--cpu-max", "1")
    (line,) = run.err.splitlines()
    assert line.startswith("agentcg: warning: --memory-max, --pids-max are not enforced on this")
    run("session", "run", "b", "--memory-max", "2G", "true")
    assert run.err.count("--memory-max is not enforced") == 1
    run("session", "open", "c")
    assert run.err == ""


def test_why_the_agent_died_is_said(daemon: FakeDaemon, run: Cli) -> None:
    daemon.agent_end = "the kernel killed a process of the agent itself for want of memory"
    run("session", "run", "a", "sh", "-c", "kill -KILL $$", code=137)
    assert run.err == f"agentcg: session a: {daemon.agent_end}\n"
    run("session", "run", "a", "true")
    assert run.err == "", "a command that ended well has nothing to be told"


def test_a_session_of_others_is_refused_inside_one(daemon: FakeDaemon, run: Cli) -> None:
    daemon.operator = False
    run("calls", "--session", "other", code=4)
    assert "this process is in session s1" in run.err
    assert run("calls", "--session", "s1") == "no call is open\n"


def test_a_budget_does_not_contradict_itself(daemon: FakeDaemon, run: Cli) -> None:
    assert "processes  no limit" in run("budget")
    daemon.budget.ClearField("memory_available_bytes")
    assert "a limit of 4.0 GiB, not kept on this host" in run("budget")


def test_nothing_to_show_is_said(daemon: FakeDaemon, run: Cli) -> None:
    assert "no feedback" in run("feedback")
    assert "no call has ended yet" in run("events")
    assert run("feedback", "--json") == run("events", "--json") == ""


# What must never be a traceback


def test_a_daemon_that_is_away_is_named_once(daemon: FakeDaemon, run: Cli) -> None:
    daemon.stop()
    for argv in (["sessions"], ["budget"], ["events", "--follow"], ["session", "open", "x"]):
        run(*argv, code=3)
        first, advice = run.err.splitlines()
        assert first.count(str(daemon.run_dir)) == 1
        assert first.startswith("agentcg: agentcgroupd cannot be reached at ")
        assert first.endswith(": No such file or directory")
        assert advice.startswith("  try: 'systemctl start agentcgroupd'")
    run("session", "run", "x", "true", code=125)


@pytest.mark.parametrize("argv", [["sessions"], ["sessions", "--json"], ["--help"], ["version"]])
def test_an_output_that_is_full(daemon: FakeDaemon, argv: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        process = command_line(*argv, stdout=full, stderr=subprocess.PIPE)
        error = process.communicate(timeout=20)[1]
    assert error == "agentcg: the output cannot be written: No space left on device\n"
    assert process.returncode == 1


@pytest.mark.parametrize("argv", [["sessions"], ["sessions", "--json"], ["calls"]])
def test_an_output_that_is_closed(daemon: FakeDaemon, argv: list[str]) -> None:
    code = "import sys; from agentcgroup.cli import main; sys.exit(main())"
    script = 'exec "$0" -c "$@" >&-'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, code, *argv], capture_output=True, text=True
    )
    assert done.stderr == "agentcg: the output cannot be written: it is closed\n"
    assert done.returncode == 1


def test_errors_that_nobody_reads(daemon: FakeDaemon) -> None:
    daemon.stop()
    code = "import sys; from agentcgroup.cli import main; sys.exit(main())"
    script = 'exec "$0" -c "$@" 2>&-'
    done = subprocess.run(["sh", "-c", script, sys.executable, code, "sessions"], stdout=-1)
    assert (done.returncode, done.stdout) == (3, b"")


def test_an_interrupt_while_a_query_waits(daemon: FakeDaemon) -> None:
    def interrupt(_: object) -> None:
        process.send_signal(signal.SIGINT)
        process.wait()

    daemon.before["GetBudget"] = interrupt
    process = command_line("budget", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = process.communicate(timeout=20)
    assert (process.returncode, out, error) == (130, "", "")


def test_a_file_that_cannot_be_read_is_named(run: Cli, tmp_path: Path) -> None:
    run("audit", "--file", str(tmp_path / "none"), code=5)
    assert run.err == f"agentcg: {tmp_path}/none: No such file or directory\n"


def test_record_ends_as_every_command_does(
    daemon: FakeDaemon, run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["record", "nobody", "-o", str(tmp_path / "out.jsonl")]
    run(*argv, code=5)
    assert "no session 'nobody' is open; open now: s1" in run.err
    assert run.json(*argv, code=5)["error"]["field"] == "session_id"
    argv[1] = "s1"
    assert run.json(*argv, "--period", "1h", code=1)["error"]["sentence"].startswith("recording s1")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    run(*argv, code=4)
    monkeypatch.undo()
    monkeypatch.setenv("AGENTCG_RUN_DIR", str(tmp_path / "none"))
    assert run.json(*argv, code=3)["error"]["code"] == "UNAVAILABLE"


@pytest.mark.parametrize(
    "argv",
    [
        ["replay", "/none.jsonl", "--pool", "1G"],
        ["policy", "simulate", "--trace", "/none", "--pool", "1G", "--sessions", "2"],
        ["policy", "check", "/none.toml"],
        ["policy", "show", "/none.toml"],
        ["config", "show", "/none.toml"],
    ],
)
def test_what_cannot_be_done_is_told_as_json_too(run: Cli, argv: list[str]) -> None:
    sentence = run.json(*argv, code=1)["error"]["sentence"]
    assert "/none" in sentence
    assert sentence.splitlines()[0] in run.err and "Traceback" not in run.err


def test_a_configuration_that_cannot_be_used(run: Cli, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[pool]\ncgroup = "/a/../b"\n')
    assert run("config", "check", str(file), code=1) == ""
    assert run.err.startswith(f"{file}:2: pool.cgroup: '/a/../b' cannot be used")
    (mistake,) = run.json("config", "check", str(file), code=1)["mistakes"]
    assert (mistake["line"], mistake["key"]) == (2, "pool.cgroup")


# Which cgroup, which user


def test_a_cgroup_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    mount = adopt.cgroup2_mount()
    for path in ("/x.slice/y.scope", f"{mount}/x.slice/y.scope", f"{mount}//x.slice/y.scope/"):
        assert adopt.cgroup_to_adopt(path, None, None) == "/x.slice/y.scope"


def test_a_cgroup_by_a_process() -> None:
    with open("/proc/self/cgroup") as file:
        mine = next(line[3:-1] for line in file if line.startswith("0::"))
    assert adopt.cgroup_to_adopt(None, os.getpid(), None) == mine
    with pytest.raises(NotFound, match="there is no process 4194305"):
        adopt.cgroup_to_adopt(None, 4_194_305, None)


def test_a_cgroup_by_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, daemon: FakeDaemon, run: Cli
) -> None:
    docker = tmp_path / "docker"
    answer = f'[{{"State": {{"Pid": {os.getpid()}}}}}]'
    docker.write_text(f"#!/bin/sh\n[ \"$5\" = web ] && echo '{answer}'\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    mine = adopt.cgroup_to_adopt(None, os.getpid(), None)
    assert adopt.cgroup_to_adopt(None, None, "web") == mine
    assert run.json("session", "adopt", "c", "--container", "web")["cgroup_path"] == mine
    run("session", "adopt", "d", "--container", "nobody", code=5)
    assert "--container: 'nobody' cannot be used: docker knows no running container" in run.err


def test_a_cgroup_by_the_id_in_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ids = ["1f" * 32, "2a" * 32]
    for path in (f"system.slice/docker-{ids[0]}.scope", f"docker/{ids[1]}", "other.slice"):
        (tmp_path / path / "inner").mkdir(parents=True)
    monkeypatch.setattr(adopt, "cgroup2_mount", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert adopt.cgroup_to_adopt(None, None, ids[0]) == f"/system.slice/docker-{ids[0]}.scope"
    assert adopt.cgroup_to_adopt(None, None, ids[1][:12]) == f"/docker/{ids[1]}"
    with pytest.raises(NotFound, match="no cgroup has that id"):
        adopt.cgroup_to_adopt(None, None, "3b" * 32)


def test_a_user_by_name_or_number() -> None:
    root = forward.User.named("root")
    assert (root.uid, root.gid) == (0, 0) and root.environment()["HOME"] == "/root"
    assert forward.User.named("12345:7").ids == "12345:7:7"
    assert forward.User.named("0").environment()["USER"] == "root"
    for wrong, word in (("nobody-here", "user"), ("root:nobody-here", "group"), ("12345", "user")):
        with pytest.raises(NotFound, match=f"there is no such {word}"):
            forward.User.named(wrong)
