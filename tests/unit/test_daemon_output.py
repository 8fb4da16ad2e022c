"""What `agentcgroupd` prints is written, or one line says why not."""

from __future__ import annotations

import subprocess
import sys

import pytest

RUN = [sys.executable, "-m", "agentcgroupd"]


def _said(option: str, redirection: str) -> tuple[int, str]:
    script = f'exec "$@" {redirection}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *RUN, option], stderr=subprocess.PIPE, text=True, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("option", ["--help", "--check"])
def test_an_output_that_is_full(option: str) -> None:
    said = "agentcgroupd: the output cannot be written: No space left on device\n"
    assert _said(option, ">/dev/full") == (1, said)


def test_an_output_that_is_closed() -> None:
    assert _said("--check", ">&-") == (
        1,
        "agentcgroupd: the output cannot be written: it is closed\n",
    )


def test_a_reader_that_has_gone() -> None:
    process = subprocess.Popen(
        [*RUN, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141
