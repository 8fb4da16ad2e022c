"""Counts of the lifecycle programs: a number that is not known is absent, never zero."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agentcgroupd.bpf import abi, loader
from agentcgroupd.bpf.lifecycle import Lifecycle
from agentcgroupd.bpf.loader import BpfObject


class Loaded(BpfObject):
    """An object whose counts a test sets, without anything in the kernel."""

    def __init__(self, missed: dict[str, int | None]) -> None:
        self.counts = missed

    def map(self, name: str, value: Any) -> Any:
        return {}

    def shared(self, name: str, kind: Any) -> Any:
        return kind()

    def attached(self) -> tuple[str, ...]:
        return tuple(self.counts)

    def missed(self, name: str) -> int | None:
        return self.counts[name]


def test_what_the_kernel_does_not_count_is_absent() -> None:
    counts = {"on_fork": 0, "on_exec": None, "on_exit": 7, "on_move": 2}
    assert Lifecycle(Loaded(counts)).missed() == {"fork": 0, "exit": 7, "left": 2}


def test_of_a_program_that_is_not_attached_nothing_is_asked() -> None:
    assert Lifecycle(Loaded({"on_fork": 0, "on_exec": 1, "on_exit": 7})).missed() == {
        "fork": 0,
        "exec": 1,
        "exit": 7,
    }


def test_lost_events_are_named_by_type() -> None:
    lifecycle = Lifecycle(Loaded({}))
    assert lifecycle.lost() == {}
    lifecycle.counters.lost[abi.EventType.EXEC] = 3
    assert lifecycle.lost() == {"exec": 3}


class NoTypes:
    """Types of a kernel that has no struct bpf_prog_info."""

    def find(self, name: str, *kinds: int) -> None:
        return None


def test_a_kernel_that_does_not_count_is_not_a_count_of_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "kernel_btf", NoTypes)
    assert BpfObject.missed(Loaded({}), "on_exec") is None


class CountedTypes:
    """Types of a kernel that counts, and how often somebody looked for them."""

    looked = 0

    def find(self, name: str, *kinds: int) -> int:
        self.looked += 1
        return 7

    def member(self, record: int, name: str) -> Any:
        return SimpleNamespace(offset_bits=64)

    def record(self, type_id: int) -> tuple[int, int, int, int]:
        return 0, 0, 0, 24


def test_where_the_kernel_counts_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    types = CountedTypes()

    def tell(what: str, name: str, fd: int, info: Any, size: Any) -> int:
        assert (name, fd, len(info)) == ("bpf_obj_get_info_by_fd", 5, 24)
        info[8] = 3
        return 0

    monkeypatch.setattr(loader, "kernel_btf", lambda: types)
    monkeypatch.setattr(loader, "libbpf", lambda: SimpleNamespace(check=tell))
    loaded: Any = SimpleNamespace(program_fd=lambda name: 5)
    assert [BpfObject.missed(loaded, "on_exec") for _ in range(3)] == [3, 3, 3]
    assert types.looked == 1
