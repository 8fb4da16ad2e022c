"""The benchmark `cpu`: what scx_flatcg says when it ends, and what becomes of rounds it lost."""

from __future__ import annotations

from bench.cpu.benchmark import Round, summary
from bench.cpu.flatcg import ENDED, last_words


def test_last_words() -> None:
    """The last EXIT line counts: a dump may come before; without one, whatever there is."""
    assert last_words(f"EXIT: {ENDED}\n") == ENDED
    stall = "runnable task stall (python[208] failed to run for 40.380s) on CPU 0"
    assert last_words(f"\nDEBUG DUMP\n====\nCPU states\nEXIT: {stall}\n") == stall
    assert last_words("[SCX_BUG] scx_flatcg.c:1\nFailed to load skel\n").endswith("load skel")
    assert last_words("") == "it said nothing"


def test_summary_leaves_out_what_was_not_measured() -> None:
    """Not zero, and not the rest of the rounds' number."""
    found = summary([Round(1, 2, 3, None, 4, 5), Round(3, 4, 5, None, 6, 7)])
    assert "share_error_points" not in found
    assert found["late_p50_ms"] == {"median": 2, "min": 1, "max": 3}
