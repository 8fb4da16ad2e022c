"""What holds a quota of 4 GiB, against ways around it."""

from __future__ import annotations

from typing import Any

from bench.gpu_site import Site


def measure(site: Site) -> dict[str, Any]:
    """Each way, under each."""
    return {}


def show(table: dict[str, Any]) -> None:
    """For people."""


def held_percent(table: dict[str, Any]) -> float:
    """Of ours."""
    return 100.0
