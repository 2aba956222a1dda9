"""Readings and the chart that holds them: what a run looked like, as plain numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sickbay.core.errors import RecordError, SickbayError
from sickbay.core.json_text import from_text, to_text
from sickbay.core.reading import Reading
from sickbay.core.signals import SIGNALS
from sickbay.core.table import Table

__all__ = ["Chart", "Reading", "Recorded", "Series", "Table"]

SAVED_VERSION = 1


class Series(Sequence[Reading]):
    """The readings of one signal in order of step."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self._readings = sorted(readings, key=lambda reading: reading.step)
        self._by_place: dict[str, list[Reading]] | None = None

    def __len__(self) -> int:
        return len(self._readings)

    def __getitem__(self, index: Any) -> Any:
        return self._readings[index]

    def __iter__(self) -> Iterator[Reading]:
        return iter(self._readings)

    @property
    def steps(self) -> list[int]:
        return [reading.step for reading in self._readings]

    @property
    def values(self) -> list[float]:
        return [reading.value for reading in self._readings]

    def places(self) -> list[str]:
        """The distinct places in order of appearance."""
        return list(self._places())

    def at(self, where: str) -> Series:
        """The readings of one place."""
        return Series(self._places().get(where, ()))

    def _places(self) -> dict[str, list[Reading]]:
        if self._by_place is None:
            self._by_place = {}
            for reading in self._readings:
                self._by_place.setdefault(reading.where, []).append(reading)
        return self._by_place

    def between(self, first: int, last: int) -> Series:
        """The readings with `first <= step <= last`."""
        return Series(reading for reading in self._readings if first <= reading.step <= last)

    def of_one_training(self, step: int) -> Series:
        """The readings from the line that the newest one up to `step` came from: a script's second training has lines of its own."""
        line = next((reading.source for reading in reversed(self._readings) if reading.step <= step), None)
        return Series(reading for reading in self._readings if line is None or reading.source == line)

    def worst(self) -> Reading | None:
        """The reading with the largest value (NaN counts as largest); None if there is none."""
        return max(self._readings, key=lambda r: (r.value != r.value, r.value), default=None)

    def least(self) -> Reading | None:
        """The reading with the smallest value; None if there is none."""
        return min(self._readings, key=lambda r: (r.value != r.value, r.value), default=None)

    def finite(self) -> Series:
        """Without NaN and infinities."""
        return Series(r for r in self._readings if abs(r.value) < float("inf"))

    def median(self) -> float:
        """The median of the finite values; NaN if there is none."""
        values = self.finite().values
        return statistics.median(values) if values else float("nan")


class Recorded(Protocol):
    """Readings kept elsewhere and decoded only when asked for: a record on disk, a saved chart's tables."""

    def signals(self) -> list[str]:
        """The signals that have readings here."""

    def last_step(self) -> int:
        """The newest step of any of them; 0 if there is none."""

    def readings(self, signal: str) -> list[Reading]:
        """All readings of `signal`, those of tables too."""

    def table(self, signal: str) -> Table | None:
        """The table of a signal that was written as one; None for any other."""


class Chart:
    """All readings of one run, what is known about it (`facts`) and why some signals could not be observed (`unobserved`)."""

    def __init__(
        self,
        readings: Iterable[Reading] = (),
        facts: Mapping[str, Any] | None = None,
        unobserved: Mapping[str, str] | None = None,
        allowed: frozenset[str] | None = None,
        recorded: Recorded | None = None,
    ) -> None:
        self.facts: dict[str, Any] = dict(facts or {})
        self.unobserved: dict[str, str] = dict(unobserved or {})
        self._allowed = allowed
        self._recorded = recorded
        self._given: dict[str, list[Reading]] = {}
        self._series: dict[str, Series] = {}
        for reading in readings:
            self._given.setdefault(reading.signal, []).append(reading)
        self._last_given = max((reading.step for rows in self._given.values() for reading in rows), default=0)

    @property
    def last_step(self) -> int:
        """The newest optimizer step with any reading; 0 for an empty chart."""
        return max(self._last_given, self._recorded.last_step() if self._recorded else 0)

    def __getitem__(self, signal: str) -> Series:
        self._check(signal)
        series = self._series.get(signal)
        if series is None:
            recorded = self._recorded.readings(signal) if self._recorded else []
            series = self._series[signal] = Series([*recorded, *self._given.get(signal, ())])
        return series

    def table(self, signal: str) -> Table:
        """`signal` as an array of steps by places; empty if it was never read. Raises as `chart[signal]` does."""
        self._check(signal)
        table = self._recorded.table(signal) if self._recorded else None
        return table if table is not None else Table.of(signal, self[signal])

    def signals(self) -> list[str]:
        """The signals that have readings."""
        return list(dict.fromkeys([*(self._recorded.signals() if self._recorded else ()), *self._given]))

    def only(self, signals: Iterable[str]) -> Chart:
        """The same chart, able to answer for `signals` alone; any other raises."""
        view = Chart(facts=self.facts, unobserved=self.unobserved, allowed=frozenset(signals), recorded=self._recorded)
        view._given, view._series, view._last_given = self._given, self._series, self._last_given
        return view

    def why_unobserved(self, signal: str) -> str | None:
        """None if `signal` can be judged; otherwise the reason why not."""
        if signal in self.signals():
            return None
        if signal in self.unobserved:
            return self.unobserved[signal]
        if SIGNALS[signal].event:
            return None if self.facts.get("watched", True) else "nothing was observed"
        return SIGNALS[signal].absent

    def save(self, path: str | Path) -> None:
        """The whole chart lies in `path` as JSON. Raises RecordError if it cannot be written."""
        tables = {signal: self._recorded.table(signal) for signal in self._recorded.signals()} if self._recorded else {}
        kept = {signal: table.to_json() for signal, table in tables.items() if table is not None}
        rows = [
            [r.step, r.signal, r.value, r.where, dict(r.note), r.source, r.seconds]
            for signal in self.signals()
            for r in (self._given.get(signal, ()) if signal in kept else self[signal])
        ]
        fields = {"chart": SAVED_VERSION, "facts": self.facts, "unobserved": self.unobserved, "readings": rows, "tables": kept}
        try:
            Path(path).write_text(to_text(fields), encoding="ascii")
        except OSError as problem:
            raise RecordError(f"{path}: the chart cannot be written there: {problem.strerror or problem}") from problem

    @classmethod
    def load(cls, path: str | Path) -> Chart:
        """The chart that `save` wrote, exactly. Raises RecordError naming the file if it is none."""
        try:
            fields = from_text(Path(path).read_text(encoding="ascii"))
            if fields["chart"] != SAVED_VERSION:
                raise RecordError(f"{path}: a chart of version {fields['chart']}; this sickbay reads version {SAVED_VERSION}")
            rows = [Reading(*row) for row in fields["readings"]]
            tables = {signal: Table.from_json(table) for signal, table in fields["tables"].items()}
            return cls(rows, fields["facts"], fields["unobserved"], recorded=SavedTables(tables) if tables else None)
        except OSError as problem:
            raise RecordError(f"{path}: cannot be read: {problem.strerror or problem}") from problem
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise RecordError(f"{path}: not a chart saved by sickbay ({type(problem).__name__}: {problem})") from problem

    def _check(self, signal: str) -> None:
        if signal not in SIGNALS:
            raise SickbayError(f"unknown signal {signal!r}: it must be a row of core/signals.py")
        if self._allowed is not None and signal not in self._allowed:
            raise SickbayError(f"signal {signal!r} was read but not declared: add it to the condition's `needs` or `uses`")


class SavedTables:
    """The tables of a saved chart, as `Recorded`."""

    def __init__(self, tables: Mapping[str, Table]) -> None:
        self._tables = dict(tables)

    def signals(self) -> list[str]:
        return list(self._tables)

    def last_step(self) -> int:
        return max((int(table.steps.max()) for table in self._tables.values() if len(table)), default=0)

    def readings(self, signal: str) -> list[Reading]:
        return self._tables[signal].readings() if signal in self._tables else []

    def table(self, signal: str) -> Table | None:
        return self._tables.get(signal)
