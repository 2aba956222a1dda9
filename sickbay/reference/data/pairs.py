"""Pairs: a text and what it becomes (a translation, an answer, a summary), for an encoder-decoder."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from torch import Tensor

from sickbay.reference.data.batches import AHEAD, Tokens
from sickbay.reference.data.objectives import Ids, Inputs, stack
from sickbay.reference.data.shuffle import shuffled
from sickbay.reference.settings.demand import demand, is_count
from sickbay.reference.training.loss import IGNORED

Pair = tuple[Ids, Ids]
PIECE = 1 << 24  # tokens looked through at a time


@dataclass(frozen=True)
class Translation:
    """Pairs to inputs and targets. Three ids stand after the tokenizer's: padding, begin and end of a target.

    The model's `vocab_size` is `vocab_size + extra_ids`, its `pad_id` is `pad_id`. ValueError for a field outside its range.
    """

    vocab_size: int

    extra_ids = 3

    def __post_init__(self) -> None:
        demand("vocab_size", self.vocab_size, is_count(self.vocab_size), "an integer of at least 1")

    @property
    def pad_id(self) -> int:
        return self.vocab_size

    @property
    def begin_id(self) -> int:
        return self.vocab_size + 1

    @property
    def end_id(self) -> int:
        return self.vocab_size + 2

    def __call__(self, pairs: Sequence[Pair]) -> tuple[Inputs, Tensor]:
        """Inputs: source `(B, S)` and target `(B, T)` for the decoder to read, padded on the right; targets `(B, T)`, -100 at padding."""
        begin, end = np.array([self.begin_id]), np.array([self.end_id])
        read = [np.concatenate((begin, target)) for _, target in pairs]
        said = [np.concatenate((target, end)) for _, target in pairs]
        return (stack([source for source, _ in pairs], self.pad_id), stack(read, self.pad_id)), stack(said, IGNORED)

    def batches(self, pairs: Sequence[Pair], batch_size: int, seed: int, first: int = 0) -> Iterator[tuple[Inputs, Tensor]]:
        """Endless batches from number `first` on: each pair once in an epoch, in an order of its own, by `seed` and the number alone."""
        demand("pairs", len(pairs), len(pairs) > 0, "at least one")
        demand("batch_size", batch_size, is_count(batch_size), "an integer of at least 1")
        for number in itertools.count(first, AHEAD):
            # For many batches at once: a shuffle of twelve places takes as long as one of a thousand.
            epochs, places = np.divmod(np.arange(number * batch_size, (number + AHEAD) * batch_size), len(pairs))
            for epoch in np.unique(epochs).tolist():
                places[epochs == epoch] = shuffled(places[epochs == epoch], len(pairs), seed, epoch)
            for batch in places.reshape(AHEAD, batch_size).tolist():
                yield self([pairs[place] for place in batch])


class Pairs(Sequence[Pair]):
    """The pairs in `tokens` `(N,)`, where one after another stands as `source begin target end`; what is mapped stays mapped."""

    def __init__(self, tokens: Tokens, objective: Translation) -> None:
        self._tokens = np.asarray(tokens)  # still the mapped file, whose own indexing is several times slower
        self._middles, self._ends = (_places(tokens, id) for id in (objective.begin_id, objective.end_id))
        self._begins = np.append(np.int64(0), self._ends[:-1] + 1)[: len(self._ends)]

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> Pair: ...

    @overload
    def __getitem__(self, place: slice) -> list[Pair]: ...

    def __getitem__(self, place: int | slice) -> Pair | list[Pair]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        begin, middle, end = (int(places[place]) for places in (self._begins, self._middles, self._ends))
        source, target = self._tokens[begin:middle], self._tokens[middle + 1 : end]
        return source.astype(np.int64), target.astype(np.int64)

    def demand_fit(self, context: int) -> None:
        """Raises ValueError unless the longest source and the longest target, with its begin or end, have at most `context` tokens."""
        if len(self) == 0:
            return
        source, target = int((self._middles - self._begins).max()), int((self._ends - self._middles - 1).max())
        least = max(source, target + 1)
        long = f"at least {least}: the longest source has {source} tokens, the longest target {target} and its end"
        demand("context", context, least <= context, long)

    @property
    def mean_length(self) -> float:
        """Tokens of a source and its target, with begin and end."""
        return len(self._tokens) / max(1, len(self))


def _places(tokens: Tokens, id: int) -> Ids:
    pieces = [np.flatnonzero(tokens[begin : begin + PIECE] == id) + begin for begin in range(0, len(tokens), PIECE)]
    return np.concatenate([np.empty(0, dtype=np.int64), *pieces])
