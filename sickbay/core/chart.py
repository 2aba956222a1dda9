"""Readings and the chart that holds them: what a run looked like, as plain numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sickbay.core.errors import SickbayError
from sickbay.core.signals import SIGNALS


@dataclass(frozen=True, slots=True)
class Reading:
    """One measured number: at optimizer step `step`, of `signal`, at `where` (a module or parameter path), from the user's `source` line."""

    step: int
    signal: str
    value: float
    where: str = ""
    note: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    seconds: float = 0.0


class Series(Sequence[Reading]):
    """The readings of one signal in order of step."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self._readings = sorted(readings, key=lambda reading: reading.step)

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
        return list(dict.fromkeys(reading.where for reading in self._readings))

    def at(self, where: str) -> Series:
        """The readings of one place."""
        return Series(reading for reading in self._readings if reading.where == where)

    def between(self, first: int, last: int) -> Series:
        """The readings with `first <= step <= last`."""
        return Series(reading for reading in self._readings if first <= reading.step <= last)

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


class Chart:
    """All readings of one run, what is known about it (`facts`) and why some signals could not be observed (`unobserved`)."""

    def __init__(
        self,
        readings: Iterable[Reading] = (),
        facts: Mapping[str, Any] | None = None,
        unobserved: Mapping[str, str] | None = None,
        allowed: frozenset[str] | None = None,
    ) -> None:
        self.facts: dict[str, Any] = dict(facts or {})
        self.unobserved: dict[str, str] = dict(unobserved or {})
        self._allowed = allowed
        self._series: dict[str, Series] = {}
        by_signal: dict[str, list[Reading]] = {}
        for reading in readings:
            by_signal.setdefault(reading.signal, []).append(reading)
        for signal, rows in by_signal.items():
            self._series[signal] = Series(rows)

    @property
    def last_step(self) -> int:
        """The newest optimizer step with any reading; 0 for an empty chart."""
        return max((series[-1].step for series in self._series.values() if len(series)), default=0)

    def __getitem__(self, signal: str) -> Series:
        if signal not in SIGNALS:
            raise SickbayError(f"unknown signal {signal!r}: it must be a row of core/signals.py")
        if self._allowed is not None and signal not in self._allowed:
            raise SickbayError(f"signal {signal!r} was read but not declared: add it to the condition's `needs` or `uses`")
        return self._series.get(signal, Series(()))

    def signals(self) -> list[str]:
        """The signals that have readings."""
        return list(self._series)

    def only(self, signals: Iterable[str]) -> Chart:
        """The same chart, able to answer for `signals` alone; any other raises."""
        view = Chart(facts=self.facts, unobserved=self.unobserved, allowed=frozenset(signals))
        view._series = self._series
        return view

    def why_unobserved(self, signal: str) -> str | None:
        """None if `signal` can be judged; otherwise the reason why not."""
        if signal in self.unobserved and not len(self._series.get(signal, ())):
            return self.unobserved[signal]
        if len(self._series.get(signal, ())):
            return None
        if SIGNALS[signal].event:
            return None if self.facts.get("watched", True) else "nothing was observed"
        return SIGNALS[signal].absent
