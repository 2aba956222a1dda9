"""The SQLite file of a record: its tables, and how it is opened where a file system lacks this or that."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
from pathlib import Path
from typing import Any

from sickbay.core.json_text import from_text, to_text

VERSION = 1
BUSY_SECONDS = 0.05  # a reader may hold the file for a moment; the training step must not wait longer for it

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE unobserved (signal TEXT PRIMARY KEY, reason TEXT);
CREATE TABLE channels (id INTEGER PRIMARY KEY, name TEXT);
CREATE TABLE layouts (id INTEGER PRIMARY KEY, signal TEXT, places TEXT);
CREATE TABLE events (
    slot TEXT PRIMARY KEY, ordinal INTEGER, step INTEGER, signal TEXT, value REAL, place TEXT, note TEXT, source TEXT, seconds REAL
);
CREATE TABLE steps (id INTEGER PRIMARY KEY, first INTEGER, last INTEGER, seconds REAL, scalars BLOB, tables BLOB, extras TEXT);
CREATE TABLE merged (id INTEGER PRIMARY KEY, first INTEGER, last INTEGER, seconds REAL, scalars BLOB, tables BLOB, extras TEXT);
"""

STEP = "INSERT INTO steps (first, last, seconds, scalars, tables, extras) VALUES (?, ?, ?, ?, ?, ?)"
EVENT = "INSERT OR REPLACE INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
FACT = "INSERT OR REPLACE INTO facts VALUES (?, ?)"
UNOBSERVED = "INSERT OR REPLACE INTO unobserved VALUES (?, ?)"
CHANNEL = "INSERT OR REPLACE INTO channels VALUES (?, ?)"
LAYOUT = "INSERT OR REPLACE INTO layouts VALUES (?, ?, ?)"

Statement = tuple[str, tuple[Any, ...]]


def record_path(folder: str | Path, rank: int) -> Path:
    """Where rank `rank` records."""
    return Path(folder) / f"record-{rank}.sqlite"


def create(folder: str | Path, rank: int, max_bytes: int) -> sqlite3.Connection:
    """A new empty record, writable, in the best journal mode that works there. Raises OSError or sqlite3.Error.

    A record left by a process that has ended (a restarted worker) is kept under another name; one still being written is never touched.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = record_path(folder, rank)
    if path.exists():
        _set_aside(path)
    problem: Exception = OSError("no journal mode works")
    for mode in ("WAL", "TRUNCATE", "MEMORY"):
        connection = connect(path)
        try:
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute(f"PRAGMA wal_autocheckpoint={max(4, min(1000, max_bytes // 8 // 4096))}")
            granted = connection.execute(f"PRAGMA journal_mode={mode}").fetchone()[0]
            if granted.upper() != mode:
                raise sqlite3.OperationalError(f"journal mode {mode} is not supported there")
            connection.executescript("BEGIN;" + SCHEMA + "COMMIT;")
            meta = {"version": VERSION, "rank": rank, "pid": os.getpid(), "host": socket.gethostname(), "journal": mode}
            connection.executemany("INSERT INTO meta VALUES (?, ?)", [(key, to_text(value)) for key, value in meta.items()])
            return connection
        except sqlite3.Error as trouble:
            problem = trouble
            connection.close()
            for suffix in ("", "-wal", "-shm", "-journal"):
                with contextlib.suppress(OSError):
                    os.unlink(f"{path}{suffix}")
    raise problem


def connect(path: Path) -> sqlite3.Connection:
    """A connection for any thread in which every statement is its own transaction unless BEGIN says otherwise."""
    return sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64)


def _set_aside(path: Path) -> None:
    with contextlib.suppress(sqlite3.Error):
        connection = connect(path)
        try:
            meta = {key: from_text(value) for key, value in connection.execute("SELECT key, value FROM meta")}
        finally:
            connection.close()
        if meta.get("host") != socket.gethostname() or _alive(meta.get("pid", 0)):
            raise OSError(f"{path.name} is being written by process {meta.get('pid')} on {meta.get('host')}")
    number = next(n for n in range(1, 10_000) if not path.with_name(f"{path.stem}.before-{n}.sqlite").exists())
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{path.with_name(f'{path.stem}.before-{number}.sqlite')}{suffix}")


def _alive(pid: int) -> bool:
    if pid <= 0:  # closed in good order
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
