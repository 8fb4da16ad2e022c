"""The file of the store: its tables, and what is done with one that cannot be used."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from pathlib import Path

VERSION = 3
"""Version of the tables, in `PRAGMA user_version`."""
USAGE_MORE = (
    "io_read_bytes",
    "io_write_bytes",
    "net_receive_bytes",
    "net_send_bytes",
    "gpu_energy_mj",
    "gpu_memory_byte_seconds",
)
"""Columns of `usage` that came with version 2; NULL: nothing was measured."""
APPLICATION = 0x61636748
"""`PRAGMA application_id` of our files: "acgH"."""
PAGE_BYTES = 4096
WAL_PAGES = 1000
"""The write-ahead log is written back into the file at this size."""
SIDE_FILES = ("", "-wal", "-shm")
BUSY_MS = 1000

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE sessions (
  key INTEGER PRIMARY KEY AUTOINCREMENT,
  name TEXT NOT NULL,
  opened_usec INTEGER NOT NULL,
  closed_usec INTEGER NOT NULL DEFAULT 0,
  closed_why TEXT NOT NULL DEFAULT '',
  bytes INTEGER NOT NULL DEFAULT 0,
  calls INTEGER NOT NULL DEFAULT 0,
  calls_not_ok INTEGER NOT NULL DEFAULT 0,
  wall_usec INTEGER NOT NULL DEFAULT 0,
  waited_usec INTEGER NOT NULL DEFAULT 0,
  frozen_usec INTEGER NOT NULL DEFAULT 0,
  cpu_usage_usec INTEGER NOT NULL DEFAULT 0,
  memory_peak_bytes INTEGER,
  memory_byte_seconds REAL,
  message BLOB NOT NULL,
  UNIQUE (name, opened_usec)
);
CREATE INDEX sessions_opened ON sessions (opened_usec);
CREATE TABLE calls (
  seq INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  session INTEGER NOT NULL,
  name TEXT NOT NULL,
  ended_usec INTEGER NOT NULL,
  verdict INTEGER NOT NULL,
  outer TEXT NOT NULL,
  bytes INTEGER NOT NULL,
  report BLOB NOT NULL
);
CREATE INDEX calls_ended ON calls (ended_usec);
CREATE INDEX calls_name ON calls (name, ended_usec);
CREATE INDEX calls_verdict ON calls (verdict, ended_usec);
CREATE INDEX calls_name_verdict ON calls (name, verdict, ended_usec);
CREATE INDEX calls_session ON calls (session);
CREATE INDEX calls_outer ON calls (outer) WHERE outer != '';
CREATE TABLE entries (
  seq INTEGER PRIMARY KEY,
  session INTEGER NOT NULL,
  call TEXT NOT NULL,
  at_usec INTEGER NOT NULL,
  event TEXT NOT NULL,
  bytes INTEGER NOT NULL,
  fields TEXT NOT NULL
);
CREATE INDEX entries_call ON entries (call, session);
CREATE INDEX entries_session ON entries (session);
CREATE INDEX entries_at ON entries (at_usec);
CREATE TABLE usage (
  day INTEGER NOT NULL,
  name TEXT NOT NULL,
  tool TEXT NOT NULL,
  calls INTEGER NOT NULL DEFAULT 0,
  calls_not_ok INTEGER NOT NULL DEFAULT 0,
  wall_usec INTEGER NOT NULL DEFAULT 0,
  waited_usec INTEGER NOT NULL DEFAULT 0,
  frozen_usec INTEGER NOT NULL DEFAULT 0,
  cpu_usage_usec INTEGER NOT NULL DEFAULT 0,
  memory_byte_seconds REAL,
  PRIMARY KEY (day, name, tool)
) WITHOUT ROWID;
"""
"""`name` of a call is that of its session. Rows of one session are found in their order by the
indexes on `session`, whose entries end in `seq`. The key of a session never comes again. `bytes`:
what a row takes, about, with its part of the indexes; of a session, the sum of its calls and
entries. `usage` has sums by day since 1970 in UTC, session name and tool, and outlives calls. These
are the tables of version 1; `_STEPS` makes later ones of them."""


_FROM_1 = "".join(f"ALTER TABLE usage ADD COLUMN {name} REAL;" for name in USAGE_MORE)
"""What makes tables of version 2 of those of version 1."""
_KEPT = ", ".join(
    (
        *("day", "name", "tool", "calls", "calls_not_ok", "wall_usec", "waited_usec"),
        *("frozen_usec", "cpu_usage_usec", "memory_byte_seconds", *USAGE_MORE),
    )
)
_FROM_2 = f"""
CREATE TABLE usage_3 (
  day INTEGER NOT NULL,
  name TEXT NOT NULL,
  tool TEXT NOT NULL,
  labels TEXT NOT NULL DEFAULT '',
  calls INTEGER NOT NULL DEFAULT 0,
  calls_not_ok INTEGER NOT NULL DEFAULT 0,
  wall_usec INTEGER NOT NULL DEFAULT 0,
  waited_usec INTEGER NOT NULL DEFAULT 0,
  frozen_usec INTEGER NOT NULL DEFAULT 0,
  cpu_usage_usec INTEGER NOT NULL DEFAULT 0,
  memory_byte_seconds REAL,
  {", ".join(f"{name} REAL" for name in USAGE_MORE)},
  PRIMARY KEY (day, name, tool, labels)
) WITHOUT ROWID;
INSERT INTO usage_3 ({_KEPT}) SELECT {_KEPT} FROM usage;
DROP TABLE usage;
ALTER TABLE usage_3 RENAME TO usage;
"""
"""What makes tables of version 3 of those of version 2: sums have the labels of their session, as
`history.usage` writes them. Those of earlier days have none."""
_STEPS = ("", _FROM_1, _FROM_2)
"""What makes tables of the version after that of its place."""


class NewerSchema(Exception):
    """The file is of a newer daemon, or of another program."""


def open_store(path: Path, max_bytes: int) -> sqlite3.Connection:
    """Open the file for writing, and make it where there is none. `max_bytes`: of the file alone.

    Raises NewerSchema, OSError, or sqlite3.Error where the file is damaged or cannot be written.
    """
    _make_file(path)
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        version, application = _pragma(db, "user_version"), _pragma(db, "application_id")
        is_new = not version and not application and not _pragma(db, "schema_version")
        if not is_new and (version > VERSION or application != APPLICATION):
            raise NewerSchema(_whose(path, version, application))
        if is_new:
            db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        # Enough against kill -9; after a loss of power the last moments may be missing, no more.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        db.execute(f"PRAGMA journal_size_limit = {WAL_PAGES * PAGE_BYTES}")
        if is_new:
            db.executescript(
                f"BEGIN IMMEDIATE; {_TABLES} {''.join(_STEPS)}"
                f"PRAGMA application_id = {APPLICATION};"
                f"PRAGMA user_version = {VERSION}; COMMIT;"
            )
        elif version < VERSION:
            _upgrade(db, version)
        db.execute(f"PRAGMA max_page_count = {max_bytes // PAGE_BYTES}")
        _check_tables(db)
    except BaseException:
        db.close()
        raise
    return db


def _upgrade(db: sqlite3.Connection, version: int) -> None:
    """Make the tables of an earlier daemon those of this one, with what is in them. Raises
    sqlite3.Error; then they are as they were."""
    steps = "".join(_STEPS[version:])
    script = f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {VERSION}; COMMIT;"
    try:
        db.executescript(script)
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open the file to be read. Raises sqlite3.Error."""
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
    )
    db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    return db


def _make_file(path: Path) -> None:
    """Make the file with its mode before SQLite would; a link is not followed. Raises OSError.

    One that is there is not opened: to close it again would let go of the locks that SQLite holds
    on it for this process.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
    except FileNotFoundError:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(path, flags, 0o600))


def _check_tables(db: sqlite3.Connection) -> None:
    """Read a row of each table, so that a file that is damaged there is found now. Raises
    sqlite3.Error."""
    for table in ("meta", "sessions", "calls", "entries", "usage"):
        db.execute(f"SELECT * FROM {table} LIMIT 1").fetchone()


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def _whose(path: Path, version: int, application: int) -> str:
    if application != APPLICATION:
        return f"{path} is a database of another program"
    return (
        f"{path} was written by a newer agentcgroupd (tables of version {version}, {VERSION} is "
        "known here)"
    )


def is_damaged(error: sqlite3.Error) -> bool:
    """Tell whether an error says that the file itself is no good."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def may_pass(error: sqlite3.Error) -> bool:
    """Tell whether an error may be gone when it is tried again: a full disk, a lock, no rights."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOMEM,
    )


def set_aside(path: Path) -> Path:
    """Rename a damaged file with its log; one that was set aside before goes. Returns the new path.
    Raises OSError."""
    aside = path.with_name(f"{path.name}.damaged")
    for end in SIDE_FILES:
        there = Path(f"{path}{end}")
        if there.exists():
            os.replace(there, f"{aside}{end}")
        else:
            Path(f"{aside}{end}").unlink(missing_ok=True)
    return aside
