"""The README's commands, on a fresh Debian: how they are found, and, where it is asked for, that
they work as printed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tools import try_readme

README = (Path(__file__).resolve().parents[3] / "README.md").read_text(encoding="utf-8")
PACKAGES = pytest.mark.skipif(
    os.environ.get("AGENTCG_PACKAGES") != "1" or shutil.which("mmdebstrap") is None,
    reason="set AGENTCG_PACKAGES=1 and install mmdebstrap: it takes minutes, and Debian's archive",
)


def test_commands_are_found_as_they_are_pasted() -> None:
    found = try_readme.commands("# first\na b  # why\nc 'd\ne' f\n\ng\n")
    assert found == ["a b  # why", "c 'd\ne' f", "g"]
    with pytest.raises(try_readme.ReadmeError, match="never closed"):
        try_readme.commands("a 'b\n")


def test_the_readme_installs_in_four_commands_and_shows_itself_in_one() -> None:
    packages, venv, pip, install = try_readme.commands(try_readme.block(README, "Install"))
    assert packages.startswith("sudo apt-get install ") and " clang-19 " in packages
    assert (venv.split()[-1], pip.split()[-1]) == ("/opt/agentcgroup", "'.[daemon]'")
    assert install.startswith("sudo /opt/agentcgroup/bin/agentcg install")
    (tour,) = try_readme.commands(try_readme.block(README, "In 60 seconds"))
    assert tour.startswith("sudo agentcg session run demo ") and tour.endswith("\n'")
    with pytest.raises(try_readme.ReadmeError, match="no code under 'Elsewhere'"):
        try_readme.block(README, "Elsewhere")


def test_a_command_that_would_ask_is_answered() -> None:
    found = try_readme.unattended("sudo apt-get install gcc clang-19")
    assert found == "sudo apt-get install -y gcc clang-19"


@PACKAGES
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("suite", ["trixie", "bookworm"])
def test_every_command_works_on_a_fresh_debian(tmp_path: Path, suite: str) -> None:
    assert try_readme.main(["--suite", suite, "--root", str(tmp_path / "debian")]) == 0
