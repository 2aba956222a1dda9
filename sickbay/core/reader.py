"""Reads a record into a Chart: from a run's folder, also while it is being written or after a kill, or from the writer itself."""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sickbay.core.chart import Chart
from sickbay.core.database import VERSION, connect, record_path
from sickbay.core.errors import RecordError
from sickbay.core.json_text import from_text
from sickbay.core.packing import SCALAR, Row, unpack_extras, unpack_spans, unpack_tables
from sickbay.core.reading import Reading
from sickbay.core.record import RecordWriter
from sickbay.core.signals import SIGNALS
from sickbay.core.table import MAX_READINGS, MIN_ROWS, Table, lines
from sickbay.core.tail import content_of, steps_after

READ_SECONDS = 10.0  # how long a reader waits for the writer to let go of a file without WAL
_NAME = re.compile(r"record-(\d+)\.sqlite")
_COLUMNS = "first, last, seconds, scalars, tables, extras"
MAX_CELLS = 4_000_000  # of a table in memory: 64 MB
_NO_NOTE: dict[str, Any] = {}


def load_chart(folder: str | Path) -> Chart:
    """The chart of a run's folder: rank 0's readings, and of other ranks events and `per_rank` signals (`note["rank"]`).

    `facts["ranks"]` holds each rank's facts by rank, `facts["recording_stopped"]` when and why a rank's recording stopped, if one's did.
    Raises RecordError naming the file and the way out if there is no readable record.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such folder; give the folder that `sickbay run` printed at its end")
    ranks = sorted(int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name)))
    stopped = {rank: _text(path) for path in folder.glob("record-*.stopped") if (rank := path.stem.partition("-")[2]).isdigit()}
    if not ranks:
        why = "; ".join(f"recording stopped at {reason}" for reason in stopped.values())
        raise RecordError(f"{folder}: no record-<rank>.sqlite in it" + (f": {why}" if why else "; is it a run's folder?"))
    charts = {rank: _load(record_path(folder, rank)) for rank in ranks}
    main = charts.pop(ranks[0])
    facts = {str(ranks[0]): dict(main.facts), **{str(rank): chart.facts for rank, chart in charts.items()}}
    events = [
        Reading(r.step, r.signal, r.value, r.where, {**r.note, "rank": rank}, r.source, r.seconds)
        for rank, chart in charts.items()
        for signal in chart.signals()
        if SIGNALS[signal].event or SIGNALS[signal].per_rank
        for r in chart[signal]
    ]
    main.facts["ranks"] = facts
    if stopped:
        texts = {
            rank: text or f"after step {main.last_step}: no space was left on the disk, not even to say so"
            for rank, text in stopped.items()
        }
        main.facts["recording_stopped"] = "; ".join(
            text if len(facts) == 1 else f"rank {rank}, {text}" for rank, text in sorted(texts.items())
        )
    return Chart(events, main.facts, main.unobserved, recorded=main._recorded)


def chart_of(writer: RecordWriter) -> Chart:
    """The chart of what `writer` has seen so far, read through its own connection; from its memory where it stopped recording.

    Raises RecordError in a process forked from the writer's.
    """
    if not writer.here:
        raise RecordError(f"{writer.folder}: this process was forked from the one that records; only that one can read its own record")
    writer.flush()
    recorded: Record | None = None
    facts: dict[str, Any] = {}
    unobserved: dict[str, str] = {}
    with writer.lock:
        if writer.connection is not None:
            with contextlib.suppress(sqlite3.Error, ValueError):
                recorded, facts, unobserved = _read(writer.connection)
        facts.update(writer.memory.facts)
        unobserved.update(writer.memory.unobserved)
        if writer.stopped:
            facts["recording_stopped"] = writer.stopped
        return Chart(writer.memory.readings(), facts, unobserved, recorded=recorded)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as problem:
        return f"an unknown step ({problem})"


def _load(path: Path) -> Chart:
    try:
        recorded, facts, unobserved = _open(path)
    except (sqlite3.Error, OSError, ValueError, KeyError, IndexError, TypeError) as problem:
        raise RecordError(
            f"{path}: the record cannot be read ({type(problem).__name__}: {problem}); "
            "copy it together with its -wal file from where it was written, or run the script again"
        ) from problem
    return Chart((), facts, unobserved, recorded=recorded)


def _open(path: Path) -> tuple[Record, dict[str, Any], dict[str, str]]:
    connection, tail = None, content_of(path)
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=READ_SECONDS, isolation_level=None)
        return _read(connection, tail)
    except sqlite3.OperationalError as problem:
        if "unable to open" not in str(problem) and "readonly" not in str(problem):
            raise
    finally:
        if connection is not None:
            connection.close()
    # A folder that cannot be written cannot hold WAL's shared memory: read a copy.
    with tempfile.TemporaryDirectory(prefix="sickbay-") as scratch:
        for suffix in ("", "-wal", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{suffix}", Path(scratch) / f"{path.name}{suffix}")
        connection = connect(Path(scratch) / path.name)
        try:
            return _read(connection, tail)
        finally:
            connection.close()


def _read(connection: sqlite3.Connection, tail: bytes = b"") -> tuple[Record, dict[str, Any], dict[str, str]]:
    connection.execute("BEGIN")  # one snapshot, however fast the writer is
    try:
        version = from_text(dict(connection.execute("SELECT key, value FROM meta"))["version"])
        if version != VERSION:
            raise ValueError(f"written in version {version} of the format; this sickbay reads version {VERSION}")
        facts = {key: from_text(value) for key, value in connection.execute("SELECT key, value FROM facts")}
        unobserved: dict[str, str] = dict(connection.execute("SELECT signal, reason FROM unobserved"))
        return Record(connection, tail), facts, unobserved
    finally:
        connection.execute("ROLLBACK")


class Record:
    """What one record holds, read at once and decoded only when asked for (a `Recorded`)."""

    def __init__(self, connection: sqlite3.Connection, tail: bytes = b"") -> None:
        names = connection.execute("SELECT id, name FROM channels ORDER BY id")
        self._channels: dict[int, tuple[str, str, str]] = {channel: tuple(from_text(name)) for channel, name in names}
        rows = connection.execute("SELECT id, signal, places FROM layouts ORDER BY id")
        self._layouts: dict[int, tuple[str, tuple[str, ...]]] = {id_: (signal, tuple(from_text(places))) for id_, signal, places in rows}
        self._widths = {layout: len(places) for layout, (_, places) in self._layouts.items()}
        self._merged = [Row(*row) for row in connection.execute(f"SELECT {_COLUMNS} FROM merged ORDER BY first, id")]
        self._steps = [Row(*row) for row in connection.execute(f"SELECT {_COLUMNS} FROM steps ORDER BY id")]
        committed = max((row.last for row in (*self._merged, *self._steps)), default=-1)
        self._steps += [Row(*step) for step in steps_after(committed, tail)]
        self._events: dict[str, list[Reading]] = {}
        columns = "step, signal, value, place, note, source, seconds"
        for step, signal, value, where, note, source, seconds in connection.execute(f"SELECT {columns} FROM events ORDER BY ordinal"):
            number = float("nan") if value is None else value  # SQLite has no NaN
            self._events.setdefault(signal, []).append(
                Reading(step, signal, number, where, from_text(note) if note else {}, source, seconds)
            )
        self._points = self._decode_points()
        joined = b"".join([row.scalars for row in self._steps])
        self._scalars = np.frombuffer(joined, SCALAR)
        events = (reading.step for readings in self._events.values() for reading in readings)
        points = (reading.step for readings in self._points.values() for reading in readings)
        self._last_step = max((0, *events, *points, *(row.last for row in (*self._merged, *self._steps))))
        numbers = [len(row.scalars) // SCALAR.itemsize for row in self._steps]
        self._scalar_steps = np.repeat(np.array([row.first for row in self._steps], np.int64), numbers)
        self._scalar_seconds = np.repeat(np.array([row.seconds for row in self._steps], np.float64), numbers)

    def signals(self) -> list[str]:
        seen = [*self._events, *(signal for signal, _, _ in self._channels.values()), *(signal for signal, _ in self._layouts.values())]
        return list(dict.fromkeys(signal for signal in seen if signal in SIGNALS))

    def last_step(self) -> int:
        return self._last_step

    def readings(self, signal: str) -> list[Reading]:
        channels = [channel for channel, key in self._channels.items() if key[0] == signal]
        found = list(self._events.get(signal, ()))
        for channel in channels:
            found += self._points.get(channel, ())
            at = np.flatnonzero(self._scalars["channel"] == channel)
            at = at[_outstanding(self._scalars["value"][at], MAX_READINGS // len(channels))]
            _, where, source = self._channels[channel]
            columns = (self._scalar_steps[at], self._scalars["value"][at], self._scalar_seconds[at])
            for step, value, seconds in zip(*(column.tolist() for column in columns), strict=True):
                found.append(Reading(step, signal, value, where, _NO_NOTE, source, seconds))
        table = self.table(signal)
        return found + (table.readings() if table is not None else [])

    def table(self, signal: str) -> Table | None:
        layouts = {id_: places for id_, (owner, places) in self._layouts.items() if owner == signal}
        if not layouts:
            return None
        places = tuple(dict.fromkeys(place for names in layouts.values() for place in names))
        column = {place: index for index, place in enumerate(places)}
        columns = {id_: np.array([column[place] for place in names], np.int64) for id_, names in layouts.items()}
        rows = [(row, merged) for merged, group in ((True, self._merged), (False, self._steps)) for row in group if row.tables]
        rows.sort(key=lambda pair: pair[0].first)
        line = lines(len(rows), max(8 * MIN_ROWS, MAX_CELLS // max(1, len(places))))
        shape = (int(line[-1]) + 1 if len(rows) else 0, len(places))
        values, sums, counts = np.full(shape, -np.inf, np.float32), np.zeros(shape), np.zeros(shape, np.uint32)
        firsts, steps, seconds = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int64), np.zeros(shape[0])
        with np.errstate(all="ignore"):
            for (row, merged), at in zip(reversed(rows), reversed(line.tolist()), strict=True):
                firsts[at] = row.first
                steps[at], seconds[at] = max(steps[at], row.last), max(seconds[at], row.seconds)
                for layout, part in unpack_tables(row.tables, self._widths, merged):
                    if layout in columns:
                        cells = at, columns[layout]
                        values[cells] = np.maximum(values[cells], part.largest)
                        sums[cells] += part.sum
                        counts[cells] += part.count
        values[counts == 0] = np.nan
        kept = counts.any(axis=1)
        return Table(signal, places, firsts[kept], steps[kept], seconds[kept], values[kept], sums[kept], counts[kept])

    def _decode_points(self) -> dict[int, list[Reading]]:
        points: dict[int, list[Reading]] = {}

        def add(channel: int, step: int, value: float, note: Any, seconds: float) -> None:
            signal, where, source = self._channels[channel]
            points.setdefault(channel, []).append(Reading(step, signal, value, where, note or _NO_NOTE, source, seconds))

        for row in self._merged:
            for channel, span in unpack_spans(row).items():
                for step, value, note in span.points():
                    add(channel, step, value, note, row.seconds)
        for row in self._steps:
            if row.extras:
                for channel, step, value, note in unpack_extras(row.extras):
                    add(channel, step, value, note, row.seconds)
        return points


def _outstanding(values: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Indices into `values`: all, or about `most` of them: first and newest, and of each stretch between first, largest, least and last."""
    if len(values) <= most:
        return np.arange(len(values))
    starts = np.flatnonzero(np.diff(lines(len(values), max(1, most // 4)), prepend=-1))
    stretches = np.split(np.where(np.isnan(values), np.inf, values), starts[1:])
    largest = starts + np.array([stretch.argmax() for stretch in stretches])
    least = starts + np.array([stretch.argmin() for stretch in stretches])
    return np.unique(np.concatenate([starts, largest, least, np.append(starts[1:], len(values)) - 1]))
