"""How a step's numbers lie in bytes, and how old steps are merged without losing their largest values, sums and counts.

A full row holds one step: `scalars` is an array of SCALAR, `tables` is `u32 n, n x u32 layout, float32 values of each layout in turn`,
`extras` is JSON `[[channel, step, value, note], ...]` for readings with a note or of another step.
A merged row covers several steps: `scalars` is an array of SPAN, `tables` as above with each layout's `float32 largest, float64 sum,
uint32 count`, `extras` the notes of the readings that the spans still name.
A channel is a (signal, where, source); a layout is a (signal, places). Little-endian throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sickbay.core.json_text import from_text, to_text

SCALAR = np.dtype([("channel", "<u4"), ("value", "<f8")])
_POINTS = ("first", "last", "largest", "least")
SPAN = np.dtype(
    [("channel", "<u4"), ("count", "<u4"), ("sum", "<f8")] + [pair for name in _POINTS for pair in ((name + "_step", "<i8"), (name, "<f8"))]
)

Point = tuple[int, float, Any]
Extra = tuple[int, int, float, Any]


@dataclass(slots=True)
class Row:
    """One row of the record: steps `first` to `last` (equal in a full row), ending `seconds` after the start."""

    first: int
    last: int
    seconds: float
    scalars: bytes
    tables: bytes
    extras: str

    @property
    def size(self) -> int:
        """Bytes on disk, about: the content and SQLite's own bookkeeping."""
        return len(self.scalars) + len(self.tables) + len(self.extras) + 40


@dataclass(slots=True)
class Span:
    """One channel over several steps: number, sum, and the readings that stand out, each at its true step."""

    count: int
    sum: float
    first: Point
    last: Point
    largest: Point
    least: Point

    def points(self) -> list[Point]:
        """The distinct readings kept, in order of step."""
        kept: dict[tuple[int, str], Point] = {}
        for point in (self.first, self.largest, self.least, self.last):
            kept.setdefault((point[0], repr(point[1])), point)
        return sorted(kept.values(), key=lambda point: point[0])


@dataclass(slots=True)
class Aggregate:
    """One layout over several steps, each `(P,)`: largest value (NaN counts as largest), float64 sum, number of values."""

    largest: NDArray[np.float32]
    sum: NDArray[np.float64]
    count: NDArray[np.uint32]


def unpack_tables(blob: bytes, widths: Mapping[int, int], merged: bool) -> Iterator[tuple[int, Aggregate]]:
    """Each (layout, Aggregate) of a row; `widths[layout]` is the layout's number of places."""
    if not blob:
        return
    number = int.from_bytes(blob[:4], "little")
    layouts = np.frombuffer(blob, "<u4", number, 4).tolist()
    at = 4 + 4 * number
    for layout in layouts:
        width = widths[layout]
        largest = np.frombuffer(blob, "<f4", width, at)
        at += 4 * width
        if not merged:
            yield layout, Aggregate(largest, largest.astype(np.float64), np.ones(width, np.uint32))
            continue
        total = np.frombuffer(blob, "<f8", width, at)
        count = np.frombuffer(blob, "<u4", width, at + 8 * width)
        at += 12 * width
        yield layout, Aggregate(largest, total, count)


def unpack_extras(text: str) -> list[Extra]:
    """The readings with notes of one row."""
    return [(channel, step, value, note) for channel, step, value, note in from_text(text)] if text else []


def unpack_spans(row: Row) -> dict[int, Span]:
    """The spans of a merged row by channel, their notes put back."""
    notes = {(channel, step, repr(value)): note for channel, step, value, note in unpack_extras(row.extras)}
    spans = {}
    for fields in np.frombuffer(row.scalars, SPAN).tolist():
        channel, count, total = fields[:3]
        pairs = zip(fields[3::2], fields[4::2], strict=True)
        spans[channel] = Span(count, total, *((step, value, notes.get((channel, step, repr(value)))) for step, value in pairs))
    return spans


def spans_of(row: Row) -> dict[int, Span]:
    """The spans of a full row: one per channel."""
    spans: dict[int, Span] = {}
    scalars: Iterable[Extra] = ((c, row.first, v, None) for c, v in np.frombuffer(row.scalars, SCALAR).tolist())
    for channel, step, value, note in (*scalars, *unpack_extras(row.extras)):
        point = (step, value, note)
        _join(spans, channel, Span(1, value, point, point, point, point))
    return spans


def _join(spans: dict[int, Span], channel: int, new: Span) -> None:
    old = spans.setdefault(channel, new)
    if old is new:
        return
    spans[channel] = Span(
        old.count + new.count,
        old.sum + new.sum,
        old.first if old.first[0] <= new.first[0] else new.first,
        new.last if new.last[0] >= old.last[0] else old.last,
        max(old.largest, new.largest, key=_rank),
        min(old.least, new.least, key=_rank),
    )


def _rank(point: Point) -> tuple[bool, float]:
    return (point[1] != point[1], point[1])


def merge(rows: Sequence[Row], merged: bool, layouts: Mapping[int, tuple[str, tuple[str, ...]]], layout_of: Callable[..., int]) -> Row:
    """`rows` (all full, or all merged) as one merged row covering their steps.

    `layouts[id]` is a (signal, places); `layout_of(signal, places)` gives the id of one that may be new.
    """
    spans: dict[int, Span] = {}
    for row in rows:
        for channel, span in (unpack_spans(row) if merged else spans_of(row)).items():
            _join(spans, channel, span)
    packed = np.array(
        [(c, s.count, s.sum, *(x for p in (s.first, s.last, s.largest, s.least) for x in p[:2])) for c, s in spans.items()], dtype=SPAN
    )
    extras = [(c, step, value, note) for c, span in spans.items() for step, value, note in span.points() if note]
    widths = {layout: len(places) for layout, (_, places) in layouts.items()}
    by_signal: dict[str, list[tuple[int, Aggregate]]] = {}
    for row in rows:
        for layout, aggregate in unpack_tables(row.tables, widths, merged):
            by_signal.setdefault(layouts[layout][0], []).append((layout, aggregate))
    tables = [_merge_tables(signal, parts, layouts, layout_of) for signal, parts in by_signal.items()]
    return Row(
        min(row.first for row in rows),
        max(row.last for row in rows),
        rows[-1].seconds,
        packed.tobytes(),
        _pack_aggregates(tables),
        to_text(extras) if extras else "",
    )


def _merge_tables(
    signal: str, parts: list[tuple[int, Aggregate]], layouts: Mapping[int, tuple[str, tuple[str, ...]]], layout_of: Callable[..., int]
) -> tuple[int, Aggregate]:
    first = parts[0][0]
    if any(layout != first for layout, _ in parts):  # tensors came or went: over the union of their places
        places = tuple(dict.fromkeys(place for layout, _ in parts for place in layouts[layout][1]))
        column = {place: index for index, place in enumerate(places)}
        parts = [(first, _spread(part, [column[place] for place in layouts[layout][1]], len(places))) for layout, part in parts]
        first = layout_of(signal, places)
    aggregates = [aggregate for _, aggregate in parts]
    largest = np.maximum.reduce([a.largest for a in aggregates])  # NaN wins
    with np.errstate(all="ignore"):  # inf - inf is NaN, and that is the truth about such a sum
        return first, Aggregate(largest, np.sum([a.sum for a in aggregates], axis=0), np.sum([a.count for a in aggregates], axis=0))


def _spread(part: Aggregate, columns: list[int], width: int) -> Aggregate:
    wide = Aggregate(np.full(width, -np.inf, np.float32), np.zeros(width), np.zeros(width, np.uint32))
    wide.largest[columns], wide.sum[columns], wide.count[columns] = part.largest, part.sum, part.count
    return wide


def _pack_aggregates(tables: list[tuple[int, Aggregate]]) -> bytes:
    if not tables:
        return b""
    head = np.array([len(tables), *(layout for layout, _ in tables)], "<u4").tobytes()
    arrays = (np.asarray(x, kind).tobytes() for _, a in tables for x, kind in ((a.largest, "<f4"), (a.sum, "<f8"), (a.count, "<u4")))
    return head + b"".join(arrays)
