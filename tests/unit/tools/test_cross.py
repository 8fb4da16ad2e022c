"""Programs and objects for 64-bit ARM. What needs Debian's archive is done where
AGENTCG_PACKAGES=1 is set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from agentcgroup import __version__
from tools import build_hook, cross
from tools.bpf_toolchain import find_clang

AARCH64, BPF = 183, 247


def test_what_is_no_program_is_named(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no program")
    with pytest.raises(cross.CrossError, match="is no ELF file"):
        cross.machine_of(text)
    assert cross.machine_of(Path(sys.executable).resolve()) not in (AARCH64, BPF) or (
        os.uname().machine == cross.MACHINE
    )


def test_a_program_that_cannot_be_linked_is_named(tmp_path: Path) -> None:
    source = tmp_path / "one.c"
    source.write_text("int main(void) { return 0; }\n")
    with pytest.raises(cross.CrossError, match=r"one\.c for aarch64: .*ld\.lld"):
        cross.compile_program(tmp_path, str(find_clang()), source, tmp_path / "one", "1")


@pytest.mark.skipif(
    os.environ.get("AGENTCG_PACKAGES") != "1",
    reason="set AGENTCG_PACKAGES=1: it fetches a C library from Debian's archive",
)
@pytest.mark.timeout(600)
def test_everything_compiles_for_arm(tmp_path: Path) -> None:
    made = cross.build(tmp_path, __version__)
    programs = [path for path in made if path.parent.name == "bin"]
    assert {path.name for path in programs} == {*build_hook.PROGRAMS}
    assert {cross.machine_of(path) for path in programs} == {AARCH64}
    assert {cross.machine_of(path) for path in made if path not in programs} == {BPF}
