"""The shape of learning rates: of a schedule that can be asked for any step, and of the series that a run has left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["decay", "restarts", "metric", "constant", "unknown"]

_DENSE, _FURTHEST, _GROWTH = 256, 300_000, 1.01  # steps asked one by one, the last one asked, and how they spread in between
_WHOLE, _RISE = 0.999, 0.9  # of the highest rate: reached, and below which a rise begins
_FLAT = 1e-6  # of the highest rate: differences below it are none
_JUMP = 0.3  # of the highest rate, upwards within one step: a restart
_TROUGH, _UP = 0.2, 0.25  # of the highest rate: how low a schedule has come, and how high it rises again
_MIRRORED = 0.04  # of the highest rate: two halves of a wave that differ by less are mirror images
_ROUND = 0.4  # of the height, half way up: a parabola has a quarter there, a triangle a half
_LATE, _FADED = 0.6, 0.01  # of the way down: what is left there of a plan with an end is more than this share of the highest rate
_STRAIGHT = 0.02  # of the highest rate: how far a straight rise strays from its line


@dataclass(frozen=True)
class Plan:
    """What a schedule is built for, in its own steps; None = not to be told.

    `kind`: "decay" falls once, "restarts" rises again by design, "metric" follows a measured value, "constant" stays.
    `length`: steps after which nothing more is planned. `warmup`: steps until the highest rate.
    """

    kind: Kind
    length: int | None = None
    warmup: int | None = None


def plan_of_function(function: Callable[[int], object]) -> Plan:
    """The plan behind a function of the step, which is asked about a thousand times and may refuse late steps."""
    steps = list(range(_DENSE))
    while steps[-1] < _FURTHEST:
        steps.append(max(steps[-1] + 1, int(steps[-1] * _GROWTH)))
    curve: list[tuple[int, float]] = []
    for step in steps:
        value = _value(function, step)
        if not math.isfinite(value):
            break
        curve.append((step, value))
    peak = max((value for _, value in curve), default=0.0)
    if len(curve) < 2 or peak <= 0:
        return Plan("unknown")
    top = _first_top([value for _, value in curve], peak)
    warmup = curve[top][0] if curve[0][1] < _RISE * peak else 0
    after = curve[top:]
    end = max((index + 1 for index, (_, value) in enumerate(after) if abs(value - after[-1][1]) > _FLAT * peak), default=0)
    if end == 0:
        return Plan("constant", None, warmup)
    for index in range(1, end + 1):
        (before, low), (step, value) = after[index - 1], after[min(index, len(after) - 1)]
        if value > low + _FLAT * peak:
            rising = [_value(function, at) for at in range(before, step + 1)]
            jumps = any(later - earlier > _JUMP * peak for earlier, later in itertools.pairwise(rising))
            waves = jumps or low > _TROUGH * peak or _straight_from(function, before, low, peak)
            return Plan("restarts", None, warmup) if waves else Plan("decay", before, warmup)
    length = after[end][0] if end < len(after) - 1 else None
    if length is not None and _value(function, round(warmup + _LATE * (length - warmup))) - after[-1][1] <= _FADED * peak:
        length = None  # an exponential fades for ever; where it is lost in rounding is no plan
    return Plan("decay", length, warmup)


def _first_top(values: Sequence[float], peak: float) -> int:
    """Where the warm-up ends: at the highest rate, or where a rate close to it turns down before."""
    for index, value in enumerate(values):
        turns = index + 1 < len(values) and values[index + 1] < value - _FLAT * peak
        if value >= _WHOLE * peak or (value >= _RISE * peak and turns):
            return index
    return 0


def _straight_from(function: Callable[[int], object], trough: int, low: float, peak: float) -> bool:
    """True if the rise after `trough` is straight, as in a triangle: a wave on purpose."""
    reach = next((d for d in range(1, trough + 2) if _value(function, trough + d) >= low + _UP * peak), 0)
    half = reach // 2
    return half > 0 and _value(function, trough + half) - low > _ROUND * (_value(function, trough + 2 * half) - low)


def _value(function: Callable[[int], object], step: int) -> float:
    try:
        return float(function(step))  # type: ignore[arg-type]
    except Exception:
        return math.nan


@dataclass(frozen=True)
class Rates:
    """The learning rate of one optimizer: `steps` `(N,)` ascending, `values` `(N,)`, one each."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, float]]) -> Rates | None:
        """None where a step has more than one rate (optimizers that cannot be told apart) or there are fewer than two."""
        kept = sorted((step, value) for step, value in pairs if math.isfinite(value))
        if len(kept) < 2 or len({step for step, _ in kept}) < len(kept):
            return None
        steps, values = zip(*kept)
        return cls(np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64))

    @property
    def peak(self) -> float:
        """The highest rate."""
        return float(self.values.max())

    @property
    def span(self) -> float:
        """Steps from the first to the last, both counted."""
        return float(self.steps[-1] - self.steps[0]) + 1

    def constant(self) -> bool:
        """True if the rate never changed."""
        return bool(np.ptp(self.values) <= _FLAT * abs(self.peak))

    def at(self, step: float) -> float:
        """The rate at `step`, interpolated."""
        return float(np.interp(step, self.steps, self.values))

    def tail_below(self, share: float) -> tuple[int, float, float]:
        """(first step, number of steps, rate before) of the stretch at the end whose rates are all at most `share` of the highest."""
        above = np.flatnonzero(self.values > share * self.peak)
        if not len(above) or above[-1] + 1 >= len(self.values):
            return int(self.steps[-1]) + 1, 0.0, float(self.values[-1])
        first = above[-1] + 1
        return int(self.steps[first]), float(self.steps[-1] - self.steps[first]) + 1, float(self.values[above[-1]])

    def rises_again(self) -> tuple[int, int, float] | None:
        """(step of the trough, last step of the rise, rate there) where a wave falls, turns round and rises as its own mirror image.

        None for jumps, triangles, straight rises and a rise that ends before a quarter of the highest rate.
        """
        top = _first_top(self.values.tolist(), self.peak)
        low = math.inf
        trough = -1
        for index in range(top, len(self.values)):
            value = float(self.values[index])
            if value < low:
                low, trough = value, index
            elif low <= _TROUGH * self.peak and value >= _UP * self.peak:
                return (int(self.steps[trough]), *self._end_of_rise(index)) if self._mirrored(trough, index, low) else None
        return None

    def _mirrored(self, trough: int, end: int, low: float) -> bool:
        reach = float(self.steps[end] - self.steps[trough])
        middle = float(self.steps[trough])
        if end - trough < 4 or middle - reach < self.steps[0]:
            return False
        distances = np.linspace(0, reach, 17)[1:]
        up = np.interp(middle + distances, self.steps, self.values)
        down = np.interp(middle - distances, self.steps, self.values)
        height = self.at(middle + reach) - low
        half = 0.5 * (self.at(middle + reach / 2) + self.at(middle - reach / 2)) - low
        return bool(np.abs(up - down).max() <= 2 * _MIRRORED * self.peak) and half < _ROUND * height

    def _end_of_rise(self, index: int) -> tuple[int, float]:
        while index + 1 < len(self.values) and self.values[index + 1] > self.values[index]:
            index += 1
        return int(self.steps[index]), float(self.values[index])

    def waves(self) -> int:
        """How often the rate comes down from above half of the highest to `_TROUGH` of it."""
        count, high = 0, False
        for value in self.values:
            if value >= 0.5 * self.peak:
                high = True
            elif high and value <= _TROUGH * self.peak:
                count, high = count + 1, False
        return count

    def straight_rise(self) -> bool:
        """True if the rate rises on one straight line from near zero to the end: a warm-up that never ends."""
        if self.values[0] > _TROUGH * self.values[-1] or bool((np.diff(self.values) < -_FLAT * self.peak).any()):
            return False
        line = np.polyval(np.polyfit(self.steps, self.values, 1), self.steps)
        return bool(np.abs(line - self.values).max() <= _STRAIGHT * self.peak) and float(self.values[-1]) > float(self.values[-2])
