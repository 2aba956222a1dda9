"""Writes what is observed, step by step, into one SQLite file per rank; never raises and never keeps training waiting.

Everything up to the last `end_step` survives a kill of the process. When the disk or the file system refuses, recording stops,
says when and why (`stopped`, `record-<rank>.stopped`), and goes on in memory within bounds.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sqlite3
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sickbay.core import database
from sickbay.core.bounds import Compactor, EventSlots
from sickbay.core.database import CHANNEL, EVENT, FACT, LAYOUT, STEP, UNOBSERVED, Statement
from sickbay.core.json_text import short_text, to_text
from sickbay.core.memory import Memory
from sickbay.core.settings import MEGABYTE
from sickbay.core.signals import SIGNALS
from sickbay.core.tail import Tail

MIN_BYTES = 256 * 1024
MAX_CHANNELS = 20_000  # distinct (signal, where, source); beyond it places are told apart no more
MAX_LAYOUTS = 2_000  # distinct sets of places; beyond it a table is stored reading by reading
MAX_PENDING = 4_096  # readings of one step before they are written without waiting for its end
MAX_BACKLOG = 20_000  # statements kept for later while a reader holds the file
RETRY_SECONDS = 0.5  # between two tries then, so that training does not wait at every step
COMMIT_SECONDS = 0.2  # between commits while only steps come in; until then they are in the tail
CLOSING_TRIES = 40  # to write the last steps while a reader holds the file, BUSY_SECONDS each
ROWS_SHARE = 0.6  # of max_bytes for the rows; the rest is for events, names, SQLite's pages and its log
EVENTS_SHARE = 0.15


class RecordWriter:
    """The one writer of `folder/record-<rank>.sqlite`.

    `step`: the optimizer step in progress, from 0. `started`: `time.monotonic()` at the start. `stopped`: empty, or "step N: reason".
    Any thread may call; a forked child's calls do nothing. No method raises for what a disk, a file system or a value does.
    """

    def __init__(self, folder: str | Path, rank: int = 0, max_bytes: int = 256 * MEGABYTE) -> None:
        self.folder = Path(folder)
        self.rank = rank
        self.step = 0
        self.started = time.monotonic()
        self.stopped = ""
        self.memory = Memory()
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may come back in while the lock is held
        self._busy = False
        self._closed = False
        self._max_bytes = max(MIN_BYTES, max_bytes)
        self._channels: dict[tuple[str, str, str], int] = {}
        self._channel_keys: dict[int, tuple[str, str, str]] = {}
        self._layout_ids: dict[tuple[str, tuple[str, ...]], int] = {}
        self._layouts: dict[int, tuple[str, tuple[str, ...]]] = {}
        self._ids = itertools.count()
        self._scalars: list[float] = []
        self._extras: list[str] = []
        self._tables: list[tuple[int, bytes]] = []
        self._batch: list[Statement] = []
        self._plain = 0  # of the batch's first statements, known to be steps
        self._slots = EventSlots()
        self._event_bytes = 0
        self._unmeasured = 0
        self._retry_at = 0.0
        self._commit_at, self._waiting = 0.0, 0
        self._compactor = Compactor(int(self._max_bytes * ROWS_SHARE))
        self.connection: sqlite3.Connection | None = None
        try:
            self.connection = database.create(self.folder, rank, self._max_bytes)
            # Never closed by the garbage collector: a forked child that ends must not close its parent's database.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.connection))
        except Exception as problem:
            self._stop(problem)
        self._tail = Tail(database.record_path(self.folder, rank)) if self.connection is not None else None

    @property
    def lock(self) -> threading.RLock:
        """Held while the connection is used."""
        return self._lock

    @property
    def here(self) -> bool:
        """True in the process that made the writer, False in one forked from it."""
        return self._pid == os.getpid()

    def read(
        self,
        signal: str,
        value: float,
        where: str = "",
        note: Mapping[str, Any] | None = None,
        source: str = "",
        step: int | None = None,
    ) -> None:
        """One Reading of this step (or of `step`) will be in the record with the next `end_step` or `flush`."""
        if self._closed or self._pid != os.getpid():
            return
        try:
            number = float(value)
            event = SIGNALS[signal].event
            text = short_text(note) if note else ""
            with self._lock:
                at = self.step if step is None else int(step)
                if event:
                    self._event(at, signal, number, where, text, source)
                    if len(self._batch) > MAX_PENDING:
                        self._commit()
                    return
                key = (signal, where, source)
                channel = self._channels.get(key)
                if channel is None:
                    channel = self._channel(key)
                if not text and step is None:
                    self._scalars.extend((channel, number))
                else:
                    self._extras.append(f"[{channel},{at},{to_text(number)},{text or 'null'}]")
                if len(self._scalars) > 2 * MAX_PENDING or len(self._extras) > MAX_PENDING:
                    self._commit()
        except Exception as problem:
            self.unobserved(signal, f"its reading could not be kept: {type(problem).__name__}: {problem}")

    def plain_step(self, readings: list[tuple[str, float, str]]) -> None:
        """`read` of each (signal, value, source) and `end_step`, at a fraction of their cost where nothing else waits to be written.

        The readings have neither place nor note and are no events.
        """
        if self._closed or self._pid != os.getpid():
            return
        with self._lock:
            if not self._kept_plain(readings):
                for signal, value, source in readings:
                    self.read(signal, value, source=source)
                self._commit(may_wait=True)
            self.step += 1

    def _kept_plain(self, readings: list[tuple[str, float, str]]) -> bool:
        """True when all of a plain step is in the tail; nothing was done where it is not."""
        unwritten = self._scalars or self._tables or self._extras or len(self._batch) != self._plain
        if self._busy or unwritten or not self._plain or self._due():
            return False
        numbers: list[float] = []
        for signal, value, source in readings:
            channel = self._channels.get((signal, "", source))
            if channel is None:
                return False
            numbers += (channel, value)
        row = (self.step, self.step, time.monotonic() - self.started, struct.pack("<" + "Id" * len(readings), *numbers), b"", "")
        if self._tail is None or not self._tail.keep(row):
            return False
        self._batch.append((STEP, row))
        self._plain += 1
        self._waiting += len(row[3]) + 40
        return True

    def table(self, signal: str, places: tuple[str, ...], values: Any) -> None:
        """One value per place (anything numpy takes, kept as float32) of this step will be in the record with the next `end_step`."""
        if self._closed or self._pid != os.getpid():
            return
        try:
            SIGNALS[signal]
            with np.errstate(all="ignore"):
                array = np.ascontiguousarray(values, dtype="<f4")
            if array.shape != (len(places),):
                raise ValueError(f"{len(places)} places but values of shape {array.shape}")
            with self._lock:
                if self.stopped:
                    return
                layout = self._layout_ids.get((signal, places))
                if layout is None and len(self._layouts) >= MAX_LAYOUTS:
                    for place, value in zip(places, array.tolist(), strict=True):
                        self.read(signal, value, place)
                    return
                self._tables.append((self._layout(signal, places) if layout is None else layout, array.tobytes()))
                if len(self._tables) > MAX_PENDING:
                    self._commit()
        except Exception as problem:
            self.unobserved(signal, f"its table could not be kept: {type(problem).__name__}: {problem}")

    def fact(self, key: str, value: Any) -> None:
        """`facts[key]` will be `value` (as JSON gives it back); the last one wins."""
        self._note_down(FACT, key, value)

    def unobserved(self, signal: str, reason: str) -> None:
        """`signal` counts as not observed, because of `reason`, unless it has readings; the last reason wins."""
        self._note_down(UNOBSERVED, signal, str(reason))

    def end_step(self) -> None:
        """This step is in the record, to survive a kill of the process, and the next one has begun."""
        if self._closed or self._pid != os.getpid():
            return
        with self._lock:
            self._commit(may_wait=True)
            self.step += 1

    def flush(self) -> None:
        """What was read so far is in the record; the step goes on."""
        if self._closed or self._pid != os.getpid():
            return
        with self._lock:
            self._retry_at = 0.0
            self._commit()

    def close(self) -> None:
        """Everything is in one tidy file and any further call does nothing."""
        if self._closed or self._pid != os.getpid():
            return
        with self._lock:
            for _ in range(CLOSING_TRIES):
                self._retry_at = 0.0
                self._commit()
                if not self._batch:
                    break
            self._closed = True
            if self.connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    self.connection.execute("INSERT OR REPLACE INTO meta VALUES ('pid', '0')")
                    self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    self.connection.execute("PRAGMA journal_mode=DELETE")  # refused while someone reads: then the log stays beside it
                with contextlib.suppress(sqlite3.Error):
                    self.connection.close()
            if self._tail is not None and not self.stopped:
                self._tail.close()

    def _note_down(self, statement: str, key: str, value: Any) -> None:
        if self._closed or self._pid != os.getpid():
            return
        try:
            text = to_text(value) if statement is FACT else _ascii(value)
            with self._lock:
                if self.stopped:
                    self.memory.take((statement, (str(key), text)), self._channel_keys)
                else:
                    self._batch.append((statement, (_ascii(str(key)), text)))
                    if len(self._batch) > MAX_PENDING:
                        self._commit()
        except Exception:  # a value that cannot even be turned into text says nothing
            return

    def _channel(self, key: tuple[str, str, str]) -> int:
        if len(self._channel_keys) >= MAX_CHANNELS:
            key = (key[0], "", "")
            if key in self._channels:
                return self._channels[key]
        channel = next(self._ids)
        self._channel_keys[channel] = key
        self._batch.append((CHANNEL, (channel, to_text(key))))
        self._channels[key] = channel
        return channel

    def _layout(self, signal: str, places: tuple[str, ...]) -> int:
        key = (signal, places)
        if key not in self._layout_ids:
            layout = next(self._ids)
            self._layouts[layout] = key
            self._batch.append((LAYOUT, (layout, signal, to_text(places))))
            self._layout_ids[key] = layout
        return self._layout_ids[key]

    def _event(self, step: int, signal: str, value: float, where: str, text: str, source: str) -> None:
        slot, number = self._slots.slot(signal, room=self._event_bytes < self._max_bytes * EVENTS_SHARE)
        self._event_bytes += len(text) + len(where) + len(source) + 80
        seconds = time.monotonic() - self.started
        self._batch.append((EVENT, (slot, number, step, signal, value, _ascii(where), text, _ascii(source), seconds)))

    def _commit(self, may_wait: bool = False) -> None:
        if self._busy:  # a signal handler came in while this was at work
            return
        self._busy = True
        try:
            size = self._pack()
            if may_wait and self._kept_in_tail(size):
                return
            size, self._waiting, self._commit_at = size + self._waiting, 0, time.monotonic() + COMMIT_SECONDS
            if self.stopped:
                self._remember_batch()
            elif self._batch and (not self._retry_at or time.monotonic() >= self._retry_at or len(self._batch) > MAX_BACKLOG):
                self._execute(size)
                self._retry_at = 0.0
        except Exception as problem:
            if not _is_busy(problem) or len(self._batch) > MAX_BACKLOG:
                self._stop(problem)
            self._retry_at = time.monotonic() + RETRY_SECONDS
        finally:
            self._busy = False

    def _due(self) -> bool:
        """True when what waits in the tail belongs into the record now, or there is no tail to wait in."""
        unsafe = self._tail is None or self.stopped or self._retry_at
        return bool(unsafe) or self._waiting > self._max_bytes // 64 or time.monotonic() >= self._commit_at

    def _kept_in_tail(self, size: int) -> bool:
        """True when nothing but steps waits to be written, and the newest is safe without a commit."""
        count = len(self._batch)  # a signal handler may add to it at any time
        if self._due() or not count or any(sql is not STEP for sql, _ in self._batch[self._plain : count]):
            return False
        self._plain = count
        self._waiting += size
        return not size or (self._tail is not None and self._tail.keep(self._batch[count - 1][1]))

    def _pack(self) -> int:
        if not (self._scalars or self._tables or self._extras):
            return 0
        pending, parts, readings = self._scalars[:], self._tables[:], self._extras[:]
        # Removed in place: what a signal handler adds meanwhile, or was adding to when it was interrupted, stays.
        del self._scalars[: len(pending)], self._tables[: len(parts)], self._extras[: len(readings)]
        scalars = struct.pack("<" + "Id" * (len(pending) // 2), *pending)
        tables = b""
        if parts:
            tables = struct.pack(f"<{len(parts) + 1}I", len(parts), *[layout for layout, _ in parts])
            tables += b"".join([values for _, values in parts])
        extras = f"[{','.join(readings)}]" if readings else ""
        self._batch.append((STEP, (self.step, self.step, time.monotonic() - self.started, scalars, tables, extras)))
        return len(scalars) + len(tables) + len(extras) + 40

    def _execute(self, size: int) -> None:
        connection = self.connection
        assert connection is not None
        changes, batch = connection.total_changes, self._batch[:]
        try:
            if len(batch) == 1:
                connection.execute(*batch[0])
            else:
                connection.execute("BEGIN IMMEDIATE")
                for statement in batch:
                    connection.execute(*statement)
                connection.execute("COMMIT")
        except BaseException as problem:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            elif not isinstance(problem, sqlite3.Error) and connection.total_changes > changes:
                self._written(batch, size)  # interrupted just after the commit: nothing may be written twice
            raise
        self._written(batch, size)
        if self._compactor.bytes > self._compactor.budget:
            possible = self._compactor.shrink(connection, self._layouts, self._union_layout)
            if not possible and self._used_bytes(connection) > self._max_bytes:
                raise OSError(f"the record has reached its limit of {self._max_bytes:,} bytes and its steps cannot be merged further")
        if self._unmeasured > self._max_bytes // 64:
            self._measure(connection)

    def _written(self, batch: list[Statement], size: int) -> None:
        for sql, values in batch:
            if sql is STEP:
                self._compactor.added(len(values[3]) + len(values[4]) + len(values[5]) + 40)
        del self._batch[: len(batch)]
        self._plain = 0
        if self._tail is not None:
            self._tail.committed()
        self._unmeasured += size

    def _union_layout(self, signal: str, places: tuple[str, ...]) -> int:
        layout = self._layout(signal, places)
        if self.connection is not None:  # in the same transaction as the merged row that names it
            self.connection.execute(LAYOUT, (layout, signal, to_text(places)))
        return layout

    def _measure(self, connection: sqlite3.Connection) -> None:
        """Gives the rows a smaller budget when the file grows faster than they do (half-empty pages, names, events)."""
        self._unmeasured = 0
        if self._used_bytes(connection) > 0.8 * self._max_bytes and self._compactor.budget > self._max_bytes // 8:
            self._compactor.budget = int(self._compactor.budget * 0.95)

    def _used_bytes(self, connection: sqlite3.Connection) -> int:
        used = connection.execute("PRAGMA page_count").fetchone()[0] - connection.execute("PRAGMA freelist_count").fetchone()[0]
        return int(used * connection.execute("PRAGMA page_size").fetchone()[0])

    def _stop(self, problem: BaseException) -> None:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        self.stopped = f"step {self.step}: {reason}"
        self._remember_batch()
        with contextlib.suppress(Exception):
            (self.folder / f"record-{self.rank}.stopped").write_text(self.stopped + "\n", encoding="utf-8")

    def _remember_batch(self) -> None:
        for statement in self._batch:
            with contextlib.suppress(Exception):
                self.memory.take(statement, self._channel_keys)
        self._batch = []


def _ascii(text: str) -> str:
    """`text` without what SQLite cannot hold: lone surrogates of undecodable file names."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_busy(problem: BaseException) -> bool:
    return isinstance(problem, sqlite3.OperationalError) and ("locked" in str(problem) or "busy" in str(problem))
