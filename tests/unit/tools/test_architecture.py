"""The picture of the architecture and the documentation's links, held against the code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tools import draw_architecture
from tools.draw_architecture import Hop, NotCurrent

ROOT = Path(__file__).resolve().parents[3]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
SOURCE = re.compile(r"`((?:daemon|agent_sdk|lab|bench|bpf|tests|tools|policies|systemd)/[\w./-]+)`")


def documents() -> list[Path]:
    """Every Markdown file of the checkout that is not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split("\n") if name and (ROOT / name).exists()]


def test_the_picture_and_the_hops_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever moves a package or a hop draws the picture anew."""
    status = draw_architecture.main(["--check"])
    assert status == 0, capsys.readouterr().err


def test_a_hop_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that was renamed fails by its old name."""
    gone = Hop("daemon/agentcgroupd/policy/engine.py", "decide_nothing", "")
    monkeypatch.setattr(draw_architecture, "WAY", (gone,))
    with pytest.raises(NotCurrent, match="decide_nothing"):
        draw_architecture.check_hops()


def test_a_package_on_another_floor_changes_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floors are those of the contract, in its order."""
    before = draw_architecture.picture()
    rows = draw_architecture.floors()
    monkeypatch.setattr(draw_architecture, "floors", lambda: [*rows[1:], rows[0]])
    assert draw_architecture.picture() != before


def test_the_call_comes_down_to_the_kernel_in_at_most_twelve_hops() -> None:
    """The way of an intent through the daemon stays short."""
    inside = [hop for hop in draw_architecture.WAY if hop.file.startswith("daemon/")]
    assert 0 < len(inside) <= 12


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    """Each relative link, and each path of a source in backticks, is there."""
    text = document.read_text()
    links = [name for name in LINK.findall(text) if "://" not in name]
    missing = [name for name in links if not (document.parent / name).exists()]
    missing += [name for name in SOURCE.findall(text) if not (ROOT / name).exists()]
    assert not missing
