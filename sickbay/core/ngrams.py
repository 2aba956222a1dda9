"""Counts of single tokens, pairs and triples: what a table, without any learning, would predict of the next token.

Interpolated absolute discounting (Ney, Essen & Kneser 1994; Chen & Goodman 1998, section 2.8): each order gives up a share of its mass
to the one below, down to the uniform guess over the vocabulary, so that every token has a probability and they sum to one.
Memory is bounded: a table keeps as many distinct n-grams as it has places, later ones fall back to the lower order.

    model = NGrams(vocabulary=65)
    model.add(ids)                      # (B, T) or (T,) int64, a negative id is a gap
    model.cross_entropy(ids, order=3)   # nats per token
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DISCOUNT = 0.75  # of each count: the value found best for small counts by Ney, Essen & Kneser 1994 lies at 0.7 to 0.8
ORDERS = (1, 2, 3)
GAP = -1  # an id that is not known or not counted
_ID_BITS = 21  # three ids make one key of 63 bits; larger ids share the places of smaller ones
_PLACES = 1 << 17  # of a table: 1.5 MB
_ROOM = 8  # places for each key that there can be
_PROBES = 8  # places in a row that a key may take
# The mixing steps of SplitMix64: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", figure 16 (shift, factor).
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))

Ids = NDArray[np.int64]
Keys = NDArray[np.uint64]


class Counts:
    """How often each key came, for as many distinct keys as there are places; a key whose places are all taken is not kept."""

    def __init__(self, places: int = _PLACES) -> None:
        self._shift, self._last = np.uint64(64 - (places.bit_length() - 1)), places - 1
        self._keys: Keys = np.zeros(places, dtype=np.uint64)
        self._counts: NDArray[np.uint32] = np.zeros(places, dtype=np.uint32)
        self.total = 0
        self.distinct = 0

    def _slots(self, keys: Keys) -> NDArray[np.intp]:
        """The place that holds each key, else the first empty one that it may take, else one that another key holds."""
        mixed = keys
        for shift, factor in _MIX:
            mixed = (mixed ^ (mixed >> shift)) * factor
        slots = (mixed >> self._shift).astype(np.intp)
        further = np.arange(len(keys))
        for _ in range(_PROBES - 1):
            held = self._keys[slots[further]]
            further = further[(held != keys[further]) & (held != 0)]
            if not len(further):
                break
            slots[further] = (slots[further] + 1) & self._last
        return slots

    def of(self, keys: Keys) -> NDArray[np.float64]:
        """The count of each key `(N,)`; 0 for one never kept."""
        slots = self._slots(keys)
        return np.where(self._keys[slots] == keys, self._counts[slots], 0).astype(np.float64)

    def add(self, keys: Keys, times: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Distinct `keys` came `times` more often; (kept, new) for each."""
        new = np.zeros(len(keys), dtype=bool)
        while True:
            slots = self._slots(keys)
            empty = self._keys[slots] == 0
            self._keys[slots[empty]] = keys[empty]
            kept = self._keys[slots] == keys
            new |= kept & empty
            if not (empty & ~kept).any():  # no two keys wanted the same empty place
                break
        self._counts[slots[kept]] += times[kept].astype(np.uint32)
        self.total += int(times[kept].sum())
        self.distinct += int(new.sum())
        return kept, new


@dataclass
class _Order:
    """n-grams of one length: their counts, and of each context how often it came and how many different tokens followed it."""

    grams: Counts
    contexts: Counts
    followers: Counts


class NGrams:
    """A model of token sequences by counting. `vocabulary`: number of classes that a uniform guess is over; `tokens`: counted so far.

    `places`: of each table at most, a power of two; 12 bytes each. A small vocabulary has smaller ones.
    """

    def __init__(self, vocabulary: int, places: int = _PLACES) -> None:
        self.vocabulary = max(1, vocabulary)
        self.tokens = 0
        sizes = [min(places, 1 << (_ROOM * self.vocabulary**length).bit_length()) for length in (0, *ORDERS)]
        self._orders = [_Order(Counts(grams), Counts(contexts), Counts(contexts)) for contexts, grams in itertools.pairwise(sizes)]

    def add(self, ids: Any) -> None:
        """Every token of `ids` `(B, T)` or `(T,)` is counted after the one and the two before it in its row."""
        self.add_grams(*windows(ids))

    def add_grams(self, first: Ids, second: Ids, target: Ids) -> None:
        """Each `target` `(N,)` is counted after `second` and after `first, second`; GAP where a context is not known."""
        known = target >= 0
        first, second, target = first[known], second[known], target[known]
        self.tokens += len(target)
        for order, grams, contexts in self._keys(first, second, target):
            keys, where, times = np.unique(grams, return_index=True, return_counts=True)
            kept, new = order.grams.add(keys, times)
            above = contexts[where]
            _add_all(order.contexts, above[kept], times[kept])
            _add_all(order.followers, above[new], np.ones(int(new.sum()), dtype=np.int64))

    def losses(self, first: Ids, second: Ids, target: Ids) -> NDArray[np.float64]:
        """`(3, N)` nats: -ln of the probability of each known target by single counts, after one, and after two tokens."""
        known = target >= 0
        first, second, target = first[known], second[known], target[known]
        chance = np.full(len(target), 1.0 / self.vocabulary)
        found = np.empty((len(ORDERS), len(target)))
        for index, length in enumerate(ORDERS):
            order = self._orders[index]
            usable = np.ones(len(target), dtype=bool) if length == 1 else (second >= 0) if length == 2 else (second >= 0) & (first >= 0)
            grams, contexts = _key(length, first, second, target), _key(length - 1, GAP * np.ones_like(first), first, second)
            seen, followers = order.contexts.of(contexts), order.followers.of(contexts)
            # A context is kept for every gram of its own, or for none: where its count is 0 the lower order answers alone.
            usable &= (seen > 0) & (followers > 0)
            own = np.maximum(order.grams.of(grams) - DISCOUNT, 0.0) + DISCOUNT * followers * chance
            chance = np.where(usable, own / np.maximum(seen, 1.0), chance)
            found[index] = -np.log(np.maximum(chance, 1e-30))
        return found

    def cross_entropy(self, ids: Any, order: int = 3) -> float:
        """Mean nats per token of `ids` `(B, T)` or `(T,)`; NaN without any token. The sequence itself is not counted."""
        losses = self.losses(*windows(ids))[order - 1]
        return float(losses.mean()) if losses.size else float("nan")

    def perplexity(self, ids: Any, order: int = 3) -> float:
        """exp of the cross-entropy: as uncertain as a uniform choice among so many tokens."""
        return math.exp(min(700.0, value)) if (value := self.cross_entropy(ids, order)) == value else value

    def _keys(self, first: Ids, second: Ids, target: Ids) -> list[tuple[_Order, Keys, Keys]]:
        none = np.full_like(first, GAP)
        pairs = second >= 0
        triples = pairs & (first >= 0)
        return [
            (self._orders[0], _key(1, none, none, target), _key(0, none, none, second)),
            (self._orders[1], _key(2, none, second[pairs], target[pairs]), _key(1, none, none, second[pairs])),
            (
                self._orders[2],
                _key(3, first[triples], second[triples], target[triples]),
                _key(2, none, first[triples], second[triples]),
            ),
        ]


def windows(ids: Any) -> tuple[Ids, Ids, Ids]:
    """(two before, one before, token) for every place of `ids` `(B, T)` or `(T,)`, each `(B*T,)` int64; GAP before a row's beginning."""
    rows = np.atleast_2d(np.asarray(ids, dtype=np.int64))
    rows = np.where(rows < 0, GAP, rows)
    edge = np.full((rows.shape[0], 2), GAP, dtype=np.int64)
    padded = np.concatenate([edge, rows], axis=1)
    return padded[:, :-2].reshape(-1), padded[:, 1:-1].reshape(-1), rows.reshape(-1)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte of the text: loss / ln 2 / bytes per token (Gao et al. 2020, arXiv 2101.00027, 3.1)."""
    return nats_per_token / math.log(2) / bytes_per_token


def _key(length: int, first: Ids, second: Ids, third: Ids) -> Keys:
    """The last `length` of three ids as one key above 0."""
    mask = (1 << _ID_BITS) - 1
    key = np.ones(len(third), dtype=np.uint64)
    for ids in (first, second, third)[3 - length :]:
        key = ((key - np.uint64(1)) << np.uint64(_ID_BITS)) + (ids & mask).astype(np.uint64) + np.uint64(1)
    return key


def _add_all(counts: Counts, keys: Keys, times: NDArray[np.int64]) -> None:
    """`keys`, not distinct, came `times` more often."""
    distinct, inverse = np.unique(keys, return_inverse=True)
    counts.add(distinct, np.bincount(inverse, weights=times, minlength=len(distinct)).astype(np.int64))
