"""The losses of one evaluation, told apart where two sets of data were evaluated one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FEWEST = 2  # batches on either side of a seam
_SEAM = 8.0  # standard deviations within the two sides; the same data in another order stays below 4 with hundreds of batches
_STEP = 0.05  # share of the lower side: two passes that differ by less are as good as one
_FLOOR = 0.01  # share of the mean below which the spread of a few batches is chance


@dataclass(frozen=True)
class Pass:
    """One pass over some data: `mean` loss weighted by targets, its standard `error`, number of `batches`."""

    mean: float
    error: float
    batches: int


def highest_pass(losses: Sequence[float], weights: Sequence[float]) -> Pass:
    """The pass with the higher loss where the batches' `losses` step once from one level to another, else all of them as one pass.

    Scripts that evaluate on training and validation data in turn give such a step; validation is the higher one.
    """
    values, shares = np.asarray(losses, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    count = len(values)
    places = np.arange(_FEWEST, count - _FEWEST + 1)
    if not len(places):
        return _of(values, shares)
    total, first, second = (np.cumsum(part)[:, None] for part in (shares, shares * values, shares * values**2))
    sides = [np.concatenate(rows, axis=1) for rows in ((total, first, second), (total[-1] - total, first[-1] - first, second[-1] - second))]
    left, right = (side[places - 1] for side in sides)
    means = [side[:, 1] / side[:, 0] for side in (left, right)]
    spreads = [np.sqrt(np.maximum(0.0, side[:, 2] / side[:, 0] - mean**2)) for side, mean in zip((left, right), means)]
    low, apart = np.minimum(*np.abs(means)), np.abs(means[0] - means[1])
    within = np.sqrt(spreads[0] ** 2 + spreads[1] ** 2 + (_FLOOR * low) ** 2) + 1e-12
    score = np.where(apart > _STEP * low, apart / within, 0.0)
    if score.max() <= _SEAM:
        return _of(values, shares)
    seam = int(places[score.argmax()])
    return max(_of(values[:seam], shares[:seam]), _of(values[seam:], shares[seam:]), key=lambda part: part.mean)


def _of(values: NDArray[np.float64], weights: NDArray[np.float64]) -> Pass:
    mean = float((values * weights).sum() / weights.sum())
    variance = float((weights * (values - mean) ** 2).sum() / weights.sum())
    return Pass(mean, math.sqrt(variance / max(1, len(values) - 1)), len(values))
