"""The kernel's log of what the OOM killer has ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentcgroupd.host.kernel_log import OomLog, parse_victim

OF_A_CGROUP = (
    b"3,812,51000123,-;Memory cgroup out of memory: Killed process 417 (agentcg-load) "
    b"total-vm:160000kB, anon-rss:49000kB, file-rss:1kB, shmem-rss:0kB, UID:0 pgtables:1kB "
    b"oom_score_adj:750\n"
)


@pytest.mark.parametrize(
    ("record", "pid"),
    [
        (OF_A_CGROUP, 417),
        (OF_A_CGROUP.replace(b"Memory cgroup out of", b"Out of"), 417),
        (OF_A_CGROUP.replace(b"Memory cgroup out of memory", b"Out of memory (x)"), 417),
        # A name that looks like a record.
        (OF_A_CGROUP.replace(b"agentcg-load", b"1 (x)"), 417),
        # Anyone who may write to the log writes with a facility other than the kernel's.
        (OF_A_CGROUP.replace(b"3,812", b"11,812"), None),
        (OF_A_CGROUP.replace(b"3,812", b"4,812").replace(b"Memory cgroup", b"x Memory"), None),
        (b"6,1,2,-;Memory cgroup stats for /x:\n", None),
        (b"6,1,2,-;Out of memory: Killed process\n", None),
        (b"", None),
    ],
)
def test_a_record_names_its_victim(record: bytes, pid: int | None) -> None:
    assert parse_victim(record) == pid


def test_a_log_that_cannot_be_read_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("agentcgroupd.host.kernel_log.KMSG", str(tmp_path / "none"))
    log = OomLog.open()
    assert log.chose(os.getpid()) is None
    log.close()


def test_records_that_were_lost_leave_it_open_who_was_chosen() -> None:
    log = OomLog(None, lost=True)
    assert log.chose(1) is None
