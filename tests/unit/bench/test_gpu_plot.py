"""What the picture of the benchmark `gpu` shows is what was measured, and nothing besides."""

from __future__ import annotations

import pytest

from bench.gpu.plot import bars, draw

DOCUMENT = {
    "kernel": "6.18",
    "sliced": {"2": {"got_percent": [50.0, 50.0]}},
    "turns": {
        "70/30": {"wanted": [70, 30], "got_percent": [69.0, 31.0]},
        "60/30/10": {"wanted": [60, 30, 10], "got_percent": [60.0, 30.0, 10.0]},
    },
    "mps": {"70/30": {"wanted": [70, 30], "share_percent": [{"p50": 68.0}, {"p50": 32.0}]}},
    "taken_back": {"all_ms": [0.0, 0.5, 1.5]},
}


def test_only_what_was_measured() -> None:
    found = bars(DOCUMENT)
    assert found["70/30"] == {
        "wanted": [70.0, 30.0],
        "turns": [69.0, 31.0],
        "mps": [68.0, 32.0],
        "sliced": [50.0, 50.0],
    }
    assert set(found["60/30/10"]) == {"wanted", "turns"}
    assert bars({"kernel": "6.18"}) == {}


def test_the_picture() -> None:
    pytest.importorskip("matplotlib")
    axes = draw(DOCUMENT).get_axes()
    assert len(axes) == 3
    heights = sorted(round(bar.get_height()) for bar in axes[0].patches)  # type: ignore[attr-defined]
    assert heights == [30, 31, 32, 50, 50, 68, 69, 70]
    assert "2 bursts" in axes[2].get_title(loc="left")
