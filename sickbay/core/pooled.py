"""Several measurements of one quantity, each with its own standard error, as one."""

from __future__ import annotations

import math
from collections.abc import Iterable

_LEAST_ERROR = 1e-6  # of a share: outputs that are all alike give an error of zero, and would drown all others


def pooled(measured: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(mean, standard error) of `(value, error)` pairs, each weighted by one over its error squared; (NaN, infinity) without any."""
    pairs = [(value, max(error, _LEAST_ERROR)) for value, error in measured if math.isfinite(value) and math.isfinite(error)]
    weight = sum(1 / error**2 for _, error in pairs)
    if not weight:
        return math.nan, math.inf
    return sum(value / error**2 for value, error in pairs) / weight, 1 / math.sqrt(weight)
