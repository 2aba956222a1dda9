"""Statistics that one wild value cannot bend: medians, and distances in median absolute deviations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAD_TO_SIGMA = 1.4826  # makes the MAD of a normal sample its standard deviation: Rousseeuw & Croux 1993
UPPER, UPPER_SIGMAS = 0.9, 1.645  # this share of what lies above a normal sample's median is within so many standard deviations
FLOOR = 0.01  # share of the median below which a spread counts as rounding, so that constant series have a finite z


def finite(values: Sequence[float]) -> list[float]:
    """`values` without NaN and infinities."""
    return [value for value in values if abs(value) < float("inf")]


def median(values: Sequence[float]) -> float:
    """The median of the finite `values`; NaN if there is none."""
    kept = finite(values)
    return statistics.median(kept) if kept else float("nan")


def robust_z(value: float, history: Sequence[float]) -> float:
    """How many robust standard deviations `value` lies above the median of `history`; NaN without a finite history."""
    middle = median(history)
    spread = median([abs(past - middle) for past in finite(history)]) * MAD_TO_SIGMA
    scale = max(spread, FLOOR * abs(middle))
    if not scale > 0:
        return float("nan") if middle != middle else (0.0 if value <= middle else float("inf"))
    return (value - middle) / scale


def tail_z(value: float, history: Sequence[float]) -> float:
    """`robust_z` in a spread that is no less than the upper half's own: a series whose values often lie far above its median.

    Up to a tenth of the upper half may be wild. NaN without a finite history.
    """
    kept, middle = finite(history), median(history)
    upper = sorted(past - middle for past in kept if past > middle)
    sigma = upper[int(UPPER * (len(upper) - 1))] / UPPER_SIGMAS if upper else 0.0
    plain = robust_z(value, kept)
    return min(plain, (value - middle) / sigma) if sigma > 0 and plain > 0 else plain


def rolling_z(values: Sequence[float], history: int, fewest: int) -> NDArray[np.float64]:
    """`robust_z` of each finite value against the up to `history` values before it `(N,)`; NaN for the first `fewest`."""
    series = np.asarray(values, dtype=np.float64)
    z = np.full(len(series), np.nan)
    for index in range(fewest, min(history, len(series))):
        z[index] = robust_z(float(series[index]), series[:index].tolist())
    if len(series) > history:
        past = np.lib.stride_tricks.sliding_window_view(series, history)[:-1]
        middle = np.median(past, axis=1)
        spread = np.median(np.abs(past - middle[:, None]), axis=1) * MAD_TO_SIGMA
        with np.errstate(divide="ignore", invalid="ignore"):
            z[history:] = (series[history:] - middle) / np.maximum(spread, FLOOR * np.abs(middle))
    return z
