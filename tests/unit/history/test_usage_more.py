"""Sums of disks, network and GPUs, and tables of an earlier daemon that had none of them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.cli.history import print_csv
from agentcgroup.types import SessionSums, Usages
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.history.schema import USAGE_MORE, VERSION, open_store
from agentcgroupd.history.usage import usages
from tests.unit.history.making import ALPHA, BETA, WAIT_S, ended, read_only, started

S = 1_000_000


def sums(path: Path) -> dict[str, pb.SessionSums]:
    with read_only(path) as db:
        return {u.key: u.sums for u in usages(db, pb.USAGE_BY_SESSION, "", 0, 100)}


def put_some(path: Path) -> None:
    """Two calls of alpha, one inside another, and one of beta that nothing was measured of."""
    store = started(path)
    gpu = pb.GpuUsage(energy_mj=2000, memory_peak_bytes=1 << 30)
    net = pb.NetUsage(receive_bytes=10, send_bytes=20)
    measured: dict[str, Any] = {"io_read_bytes": 4096, "io_write_bytes": 0, "net": net}
    store.put(ended(ALPHA, "a1", wall_usec=2 * S, gpu=gpu, **measured))
    store.put(ended(ALPHA, "a2", wall_usec=1 * S, **measured))
    store.put(ended(ALPHA, "in", parent_call_id="a1", **measured))
    store.put(ended(BETA, "b1"))
    assert store.close(WAIT_S)


def test_what_was_measured_is_summed_up_and_what_was_not_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    put_some(path)
    found = sums(path)
    alpha, beta = found["alpha"], found["beta"]
    assert (alpha.io_read_bytes, alpha.io_write_bytes) == (8192, 0)
    assert (alpha.net_receive_bytes, alpha.net_send_bytes) == (20, 40)
    assert alpha.gpu_energy_mj == 2000
    assert alpha.gpu_memory_byte_seconds == float(2 << 30)
    assert alpha.HasField("io_write_bytes"), "a measured zero"
    for name in USAGE_MORE:
        assert not beta.HasField(name), name  # type: ignore[arg-type]


def test_tables_of_version_1_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    put_some(path)
    with closing(sqlite3.connect(path)) as db:
        for name in USAGE_MORE:
            db.execute(f"ALTER TABLE usage DROP COLUMN {name}")
        db.execute("PRAGMA user_version = 1")
        db.commit()
    with closing(open_store(path, 64 << 20)) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == VERSION
    before = sums(path)
    assert before["alpha"].calls == 3 and not before["alpha"].HasField("io_read_bytes")
    store = started(path)
    store.put(ended(ALPHA, "a9", io_read_bytes=7))
    assert store.close(WAIT_S)
    after = sums(path)["alpha"]
    assert (after.calls, after.io_read_bytes) == (4, 7)


def test_an_upgrade_that_fails_leaves_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    put_some(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"ALTER TABLE usage DROP COLUMN {USAGE_MORE[0]}")
        db.execute("PRAGMA user_version = 1")  # the others are there already
        db.commit()
    with pytest.raises(sqlite3.Error, match="duplicate column"):
        open_store(path, 64 << 20)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == 1
        columns = [row[1] for row in db.execute("PRAGMA table_info(usage)")]
        assert USAGE_MORE[0] not in columns


def test_csv_has_a_column_for_each_sum_and_no_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    none = SessionSums.from_proto(pb.SessionSums(calls=2, io_read_bytes=4096))
    print_csv("tool", [Usages("=cmd|'x',\x1b[1m", none), Usages("make", none)])
    head, evil, plain = capsys.readouterr().out.rstrip("\n").split("\n")
    assert head.startswith("tool,calls,calls_not_ok,wall_usec") and "net_send_bytes" in head
    assert evil.startswith("\"'=cmd|'x',?[1m\",2,0,")
    assert dict(zip(head.split(","), plain.split(","), strict=True))["io_read_bytes"] == "4096"
    assert plain.endswith(",,,,")
