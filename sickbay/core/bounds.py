"""Keeps a record within its size: first and newest steps in full, those between merged; likewise the first and newest events."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping

from sickbay.core.packing import Row, merge

GROUP = 16  # full steps in a first merge: fewer would not save bytes, as a merged value takes four times a full one
FIRST_FULL = 64  # steps that are never merged, as initialisation and warm-up show there, if they take at most an eighth of the budget
NEWEST_FULL = 4 * GROUP  # full steps that are kept whatever their size
MERGES_PER_STEP = 8  # bounds the pause of one training step
EVENTS_KEPT = 1000  # per signal: this many first ones, and as many newest ones
_LEVEL = 1 << 40  # ids of merged rows: level times this plus a running number, so that a level lies together
_COLUMNS = "first, last, seconds, scalars, tables, extras"


class EventSlots:
    """Where each event of each signal is stored: a slot used before is overwritten. `room` False stops any growth."""

    def __init__(self, kept: int = EVENTS_KEPT) -> None:
        self._kept = kept
        self._first: dict[str, int] = {}
        self._newest: dict[str, int] = {}
        self._counts: dict[str, int] = {}

    def slot(self, signal: str, room: bool = True) -> tuple[str, int]:
        """The slot's key and the event's running number within its signal."""
        number = self._counts[signal] = self._counts.get(signal, 0) + 1
        first, newest = self._first.get(signal, 0), self._newest.get(signal, 0)
        if newest == 0 and first < self._kept and (room or first == 0):
            self._first[signal] = first + 1
            return f"{signal} {first}", number
        if newest < self._kept and (room or newest == 0) and number == first + newest + 1:
            self._newest[signal] = newest + 1
            return f"{signal} new {newest}", number
        return f"{signal} new {(number - first - 1) % newest}", number


class Compactor:
    """Merges old rows of an open record until the rows' bytes are within `budget`; half of it belongs to full rows."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._first_bytes = 0
        self._first_rows = 0
        self._full_bytes = 0
        self._full_rows = 0
        self._level_bytes: dict[int, int] = {}
        self._level_rows: dict[int, int] = {}
        self._next_id = 1

    @property
    def bytes(self) -> int:
        """Of all rows, about."""
        return self._first_bytes + self._full_bytes + sum(self._level_bytes.values())

    def added(self, size: int) -> None:
        """A full row of `size` bytes was written."""
        no_more = self._full_rows or self._level_rows or self._first_rows == FIRST_FULL
        if no_more or 8 * (self._first_bytes + size) > self.budget:
            self._full_bytes += size
            self._full_rows += 1
        else:
            self._first_bytes += size
            self._first_rows += 1

    def shrink(
        self, connection: sqlite3.Connection, layouts: Mapping[int, tuple[str, tuple[str, ...]]], layout_of: Callable[..., int]
    ) -> bool:
        """Merges a few times if needed, as one transaction; False if the rows are over the budget and no more can be merged."""
        before = (self._full_bytes, self._full_rows, dict(self._level_bytes), dict(self._level_rows))
        connection.execute("BEGIN IMMEDIATE")
        try:
            possible = self._merge_some(connection, layouts, layout_of)
            connection.execute("COMMIT")
        except BaseException:
            self._full_bytes, self._full_rows, self._level_bytes, self._level_rows = before
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return possible

    def _merge_some(
        self, connection: sqlite3.Connection, layouts: Mapping[int, tuple[str, tuple[str, ...]]], layout_of: Callable[..., int]
    ) -> bool:
        for _ in range(MERGES_PER_STEP):
            if self.bytes <= self.budget:
                return True
            level = self._level()
            if level is None:
                return False
            self._merge(connection, level, layouts, layout_of)
        return True

    def _level(self) -> int | None:
        candidates = [level for level, rows in self._level_rows.items() if rows >= 2]
        if self._full_rows >= NEWEST_FULL + GROUP and (self._full_bytes > self.budget // 2 or not candidates):
            return 0
        return max(candidates, key=lambda level: self._level_bytes[level], default=None)

    def _merge(
        self,
        connection: sqlite3.Connection,
        level: int,
        layouts: Mapping[int, tuple[str, tuple[str, ...]]],
        layout_of: Callable[..., int],
    ) -> None:
        if level == 0:
            found = connection.execute(f"SELECT id, {_COLUMNS} FROM steps ORDER BY id LIMIT {GROUP} OFFSET {self._first_rows}").fetchall()
        else:
            where = f"WHERE id >= {level * _LEVEL} AND id < {(level + 1) * _LEVEL}"
            found = connection.execute(f"SELECT id, {_COLUMNS} FROM merged {where} ORDER BY id LIMIT 2").fetchall()
        rows = [Row(*fields[1:]) for fields in found]
        assert len(rows) >= 2, "the counts of rows follow the record"
        new = merge(rows, level > 0, layouts, layout_of)
        table = "merged" if level else "steps"
        connection.execute(f"DELETE FROM {table} WHERE id >= ? AND id <= ?", (found[0][0], found[-1][0]))
        id_ = (level + 1) * _LEVEL + self._next_id
        self._next_id += 1
        values = (id_, new.first, new.last, new.seconds, new.scalars, new.tables, new.extras)
        connection.execute(f"INSERT INTO merged (id, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        freed = sum(row.size for row in rows)
        if level == 0:
            self._full_bytes -= freed
            self._full_rows -= len(rows)
        else:
            self._level_bytes[level] -= freed
            self._level_rows[level] -= len(rows)
        self._level_bytes[level + 1] = self._level_bytes.get(level + 1, 0) + new.size
        self._level_rows[level + 1] = self._level_rows.get(level + 1, 0) + 1
