"""docs/sdk.md and docs/cli.md: their examples run, and their tables are complete."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import agentcgroup
from agentcgroup import cli
from agentcgroup.cli import commands, common
from agentcgroup.intent import INTENT_FIELDS
from tests.unit.fake_daemon import FakeDaemon, running

DOCS = Path(__file__).resolve().parents[3] / "docs"
SDK = (DOCS / "sdk.md").read_text()
CLI = (DOCS / "cli.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeDaemon]:
    for name in ("pytest", "make"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho done\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    yield from running(monkeypatch)


def test_sdk_examples_run(daemon: FakeDaemon, capfd: pytest.CaptureFixture[str]) -> None:
    examples = blocks(SDK, "python")
    assert len(examples) >= 6
    namespace: dict[str, object] = {"__name__": "docs"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for example in examples:
            exec(compile(example, "docs/sdk.md", "exec"), namespace)
    out = capfd.readouterr().out
    assert "memory_max lots bytes, e.g. 512M memory_max: 'lots' cannot be used" in out
    assert not daemon.calls
    names = [request.name for request in daemon.begun]
    assert names[:4] == ["pytest", "build", "sh", "run_tests"]
    assert sorted(names[4:]) == ["make", "pytest"]


def test_sdk_examples_pass_mypy_strict(tmp_path: Path) -> None:
    """Check them as those do who install the package, one after the other."""
    file = tmp_path / "examples.py"
    file.write_text("\n\n".join(blocks(SDK, "python")))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", str(file)]
    command += ["--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_sdk_names_are_complete() -> None:
    for field in INTENT_FIELDS:
        assert f"`{field}`" in SDK, field
    for name in re.findall(r"^\| `([A-Z]\w+)` \|", SDK, re.MULTILINE):
        assert name in agentcgroup.__all__


def test_cli_examples_run(daemon: FakeDaemon, capfd: pytest.CaptureFixture[str]) -> None:
    agentcgroup.Agent().run(["make"])
    lines = [line for block in blocks(CLI, "console") for line in block.splitlines()]
    assert len(lines) >= 10
    for line in lines:
        prompt, program, *argv = shlex.split(line)
        assert (prompt, program) == ("$", "agentcg")
        assert cli.main(argv) == 0, (line, capfd.readouterr().err)
    assert "in a session" in capfd.readouterr().out


def test_cli_commands_are_complete() -> None:
    documented = set(re.findall(r"^\| `([a-z]+)` \|", CLI, re.MULTILINE))
    (subparsers,) = (
        action
        for action in commands.build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    assert documented == set(subparsers.choices)


def test_cli_exit_codes_are_those_of_the_help() -> None:
    heading, *codes = common.EXIT_CODES.splitlines(keepends=True)
    assert heading == "exit codes:\n"
    assert blocks(CLI, "text") == [textwrap.dedent("".join(codes))]
