"""Whether one thing says anything about another: a test that looks for linear traces of any kind, and one for made-up noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PERMUTATIONS = 100
_WIDE = 5.0  # standard deviations of the chi-square statistic
_UNIFORM_KURTOSIS, _NORMAL_KURTOSIS = 1.8, 3.0

Matrix = NDArray[np.float64]


def dependence_z(x: Matrix, y: Matrix) -> float:
    """How many standard deviations the dependence of `y` `(N, K)` on `x` `(N, D)` lies above that of pairs put together at random.

    Hilbert-Schmidt independence criterion with linear kernels on standardised columns (Gretton et al. 2005); the null by cyclic shifts.
    0 where one of the two is constant, or with fewer than eight rows.
    """
    x, y = _standard(x), _standard(y)
    count = len(x)
    if count < 8 or not x.shape[1] or not y.shape[1]:
        return 0.0
    kernel_x, kernel_y = x @ x.T, y @ y.T
    # What a row has with itself is the same however the pairs are put together; it only adds noise.
    np.fill_diagonal(kernel_x, 0.0)
    np.fill_diagonal(kernel_y, 0.0)
    true = float((kernel_x * kernel_y).sum())
    rng = np.random.default_rng(0)
    shuffled = []
    for _ in range(PERMUTATIONS):
        order = rng.permutation(count)
        shuffled.append(float((kernel_x * kernel_y[np.ix_(order, order)]).sum()))
    spread = float(np.std(shuffled))
    return (true - float(np.mean(shuffled))) / spread if spread > 0 else 0.0


def is_uniform_noise(tokens: NDArray[np.int64]) -> bool:
    """True if `tokens` `(N,)` are spread over their range as `randint` spreads them: text never is. Chi-square within five deviations."""
    if len(tokens) < 32:
        return True
    low, high = int(tokens.min()), int(tokens.max())
    kinds = high - low + 1
    if kinds < 2:
        return False
    bins = min(kinds, max(2, len(tokens) // 8))
    counts = np.bincount((tokens - low) * bins // kinds, minlength=bins).astype(np.float64)
    sizes = np.bincount(np.arange(kinds) * bins // kinds, minlength=bins) if kinds < 1 << 20 else np.ones(bins)
    expected = len(tokens) * sizes / sizes.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return statistic < bins - 1 + _WIDE * float(np.sqrt(2 * (bins - 1)))


def is_independent_noise(features: Matrix) -> bool:
    """True if the columns of `features` `(N, D)` are normal or uniform and know nothing of each other, as `randn` and `rand` make them."""
    features = _standard(features)
    count, columns = features.shape
    if count < 32 or columns < 2:
        return True
    kurtosis = float((features**4).mean())
    margin = _WIDE * float(np.sqrt(24 / (count * columns))) + 0.05
    if min(abs(kurtosis - _UNIFORM_KURTOSIS), abs(kurtosis - _NORMAL_KURTOSIS)) > margin:
        return False
    correlation = features.T @ features / count
    np.fill_diagonal(correlation, 0.0)
    mean_square = float((correlation**2).sum() / (columns * (columns - 1)))
    return bool(mean_square * count < 1 + _WIDE * float(np.sqrt(2 / max(1, columns * (columns - 1) // 2))))


def _standard(columns: Matrix) -> Matrix:
    """Each column with mean 0 and variance 1; constant ones left out."""
    columns = np.asarray(columns, dtype=np.float64).reshape(len(columns), -1)
    if not len(columns):
        return columns[:, :0]
    spread = columns.std(axis=0)
    kept = spread > 1e-12 * (1.0 + np.abs(columns).max(axis=0))
    standard: Matrix = (columns[:, kept] - columns[:, kept].mean(axis=0)) / spread[kept]
    return standard
