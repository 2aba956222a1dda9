"""How much a sequence of token ids repeats itself, measured against stretches of the text that a model learned from.

A stretch is counted as repetitive when fewer of its n-grams are distinct (Li et al. 2016, arXiv 1510.03055, distinct-n) than in
almost every stretch of the training text: a corpus that repeats itself is its own excuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

SCALES = ((16, 2), (32, 3), (64, 4), (128, 6), (256, 8))  # tokens of a stretch and of its n-grams: loops of words to loops of paragraphs
ALMOST_EVERY = 0.99  # of the training text's stretches
LEAST_STRETCHES = 100  # of the training text, to know its hundredth
LEAST_PLACES = 8  # stretches of the sequence
LONGEST_PERIOD = 64
_MOST_STRETCHES = 4000


@dataclass(frozen=True)
class Repetition:
    """`share` of the sequence's stretches, `stretch` tokens long, that repeat more `gram`-grams than almost every stretch of the corpus.

    `own`, `usual`: median share of repeated n-grams in a stretch of the sequence, and of the corpus.
    """

    share: float
    stretch: int
    gram: int
    own: float
    usual: float


def repeated_shares(ids: Any, stretch: int, gram: int) -> NDArray[np.float64]:
    """Share of repeated n-grams (1 - distinct / all) in every stretch of `ids` `(N,)`; `(N - stretch + 1,)`, empty where N is smaller."""
    row = np.asarray(ids, dtype=np.int64)
    if len(row) < stretch:
        return np.empty(0)
    grams = gram_codes(row, gram)
    places = np.lib.stride_tricks.sliding_window_view(grams, stretch - gram + 1)
    if len(places) > _MOST_STRETCHES:
        places = places[:: -(-len(places) // _MOST_STRETCHES)]
    ordered = np.sort(places, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).sum(axis=1)
    shares: NDArray[np.float64] = repeated / ordered.shape[1]
    return shares


def repetition(rows: Sequence[Any], corpus: Any) -> Repetition | None:
    """The scale at which `rows` (each `(N,)`) repeat most beyond `corpus` `(M,)`; None where all of them are too short to say."""
    found: list[Repetition] = []
    for stretch, gram in SCALES:
        own = [shares for row in rows if len(shares := repeated_shares(row, stretch, gram)) >= LEAST_PLACES]
        if not own:
            continue
        usual = repeated_shares(corpus, stretch, gram)
        if len(usual) < LEAST_STRETCHES:
            continue
        limit = float(np.quantile(usual, ALMOST_EVERY))
        mine = np.concatenate(own)
        found.append(Repetition(float((mine > limit).mean()), stretch, gram, float(np.median(mine)), float(np.median(usual))))
    return max(found, key=lambda each: each.share, default=None)


def longest_loop(ids: Any) -> tuple[int, int]:
    """(tokens, period) of the longest part of `ids` `(N,)` that says one thing twice or more without a break; (0, 0) if there is none."""
    row = np.asarray(ids, dtype=np.int64)
    longest = (0, 0)
    for period in range(1, min(LONGEST_PERIOD, len(row) // 2) + 1):
        same = np.concatenate([[False], row[period:] == row[:-period], [False]])
        breaks = np.flatnonzero(~same)
        run = int(np.diff(breaks).max()) - 1 + period
        if run >= 2 * period and run > longest[0]:
            longest = (run, period)
    return longest


def distinct_share(rows: Sequence[Any], gram: int) -> float:
    """Distinct n-grams over all n-grams of `rows` together; 1 where there is none."""
    joined = np.concatenate([np.append(np.asarray(row, dtype=np.int64), np.full(gram, -1 - place)) for place, row in enumerate(rows)])
    whole = np.lib.stride_tricks.sliding_window_view(joined, gram).min(axis=1) >= 0  # within one row
    every = gram_codes(joined, gram)[whole]
    return len(np.unique(every)) / len(every) if len(every) else 1.0


def gram_codes(ids: Ids, gram: int) -> Ids:
    """A number for each n-gram of `ids` `(N,)`, `(N - gram + 1,)`: equal n-grams have equal numbers."""
    single = np.unique(ids, return_inverse=True)[1].astype(np.int64).reshape(-1)
    codes = single
    for later in range(1, gram):
        pairs = codes[: len(single) - later] * len(single) + single[later:]
        codes = np.unique(pairs, return_inverse=True)[1].astype(np.int64).reshape(-1)
    return codes
