"""Per-tensor statistics over many steps as one array: what the heat map draws and per-parameter series are decoded from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sickbay.core.reading import Reading

if TYPE_CHECKING:  # numpy is loaded only by those who hold a table: `--help` and `list` must not pay for it
    import numpy as np
    from numpy.typing import NDArray

MAX_READINGS = 100_000  # that one signal is decoded into
MIN_ROWS = 64
FIRST_IN_FULL = 64  # initialisation and warm-up show here
NEWEST_IN_FULL = 256


@dataclass(frozen=True)
class Table:
    """One signal over S rows and P places.

    `firsts`, `steps`: `(S,)` int64, the first and the last step a row covers (equal unless old steps were merged).
    `seconds`: `(S,)` float64 since the start. `values`: `(S, P)` float32, the largest value of the row's steps (NaN counts as largest).
    `sums`: `(S, P)` float64, `counts`: `(S, P)` uint32: their sum and number; a count of 0 says that the place was not measured there.
    """

    signal: str
    places: tuple[str, ...]
    firsts: NDArray[np.int64]
    steps: NDArray[np.int64]
    seconds: NDArray[np.float64]
    values: NDArray[np.float32]
    sums: NDArray[np.float64]
    counts: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def means(self) -> NDArray[np.float64]:
        """`(S, P)`: the mean over each row's steps; NaN where nothing was measured."""
        import numpy as np

        with np.errstate(all="ignore"):
            return self.sums / np.where(self.counts == 0, np.nan, self.counts)

    def readings(self) -> list[Reading]:
        """Every measured cell as a Reading in order of step; a merged row gives its largest value; note: steps, sum, count."""
        table = self.thinned(max(MIN_ROWS, MAX_READINGS // max(1, len(self.places))))
        return list(table._cells())

    def thinned(self, rows: int) -> Table:
        """At most `rows` rows: the first and the newest as they are, those between merged evenly (largest, sum and count stay exact)."""
        if len(self) <= rows:
            return self
        import numpy as np

        starts = np.flatnonzero(np.diff(lines(len(self), rows), prepend=-1))
        ends = np.append(starts[1:], len(self)) - 1
        measured = np.where(self.counts > 0, self.values, np.float32("-inf"))
        counts = np.add.reduceat(self.counts, starts, axis=0, dtype=np.uint32)
        with np.errstate(all="ignore"):
            values = np.where(counts > 0, np.maximum.reduceat(measured, starts, axis=0), np.float32("nan"))
            sums = np.add.reduceat(self.sums, starts, axis=0)
        return Table(self.signal, self.places, self.firsts[starts], self.steps[ends], self.seconds[ends], values, sums, counts)

    def _cells(self) -> Iterator[Reading]:
        values, counts = self.values.tolist(), self.counts.tolist()
        for row, (first, step, seconds) in enumerate(zip(self.firsts.tolist(), self.steps.tolist(), self.seconds.tolist(), strict=True)):
            for column, place in enumerate(self.places):
                count = counts[row][column]
                if count == 0:
                    continue
                note = {} if count == 1 else {"steps": [first, step], "sum": float(self.sums[row, column]), "count": count}
                yield Reading(step, self.signal, values[row][column], place, note, seconds=seconds)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for `from_json`."""
        columns = ("firsts", "steps", "seconds", "values", "sums", "counts")
        return {"signal": self.signal, "places": list(self.places), **{name: getattr(self, name).tolist() for name in columns}}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Table:
        """The table that `to_json` wrote. Raises KeyError or ValueError for anything else."""
        import numpy as np

        places = tuple(fields["places"])
        shape = (len(fields["steps"]), len(places))
        return cls(
            fields["signal"],
            places,
            np.array(fields["firsts"], np.int64),
            np.array(fields["steps"], np.int64),
            np.array(fields["seconds"], np.float64),
            np.array(fields["values"], np.float32).reshape(shape),
            np.array(fields["sums"], np.float64).reshape(shape),
            np.array(fields["counts"], np.uint32).reshape(shape),
        )

    @classmethod
    def of(cls, signal: str, readings: Iterable[Reading]) -> Table:
        """The readings of one signal as a table: one row per step; several readings of a place in a step count as merged."""
        import numpy as np

        kept = list(readings)
        places = {place: column for column, place in enumerate(dict.fromkeys(r.where for r in kept))}
        steps = {step: row for row, step in enumerate(sorted({r.step for r in kept}))}
        shape = (len(steps), len(places))
        values = np.full(shape, np.nan, np.float32)
        sums, counts, seconds = np.zeros(shape), np.zeros(shape, np.uint32), np.zeros(len(steps))
        with np.errstate(all="ignore"):
            for r in kept:
                cell = steps[r.step], places[r.where]
                values[cell] = np.float32(r.value) if counts[cell] == 0 else np.maximum(values[cell], np.float32(r.value))
                sums[cell] += r.value
                counts[cell] += 1
                seconds[cell[0]] = r.seconds
        ordered = np.array(list(steps), np.int64)
        return cls(signal, tuple(places), ordered, ordered, seconds, values, sums, counts)


def lines(rows: int, most: int) -> NDArray[np.int64]:
    """`(rows,)`, ascending from 0: the line each row goes to, `most` lines at most; first and newest rows have theirs alone."""
    import numpy as np

    if rows <= most:
        return np.arange(rows)
    first, newest = min(FIRST_IN_FULL, most // 8), min(NEWEST_IN_FULL, most // 2)
    between = rows - first - newest
    shared = first + np.arange(between) * (most - first - newest) // between
    return np.concatenate([np.arange(first), shared, most - newest + np.arange(newest)])
