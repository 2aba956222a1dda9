"""Translation pairs: a text and what it becomes, for an encoder-decoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from sickbay.reference.data.objectives import Ids, Inputs, stack
from sickbay.reference.data.shuffle import shuffled
from sickbay.reference.settings.demand import demand, is_count
from sickbay.reference.text.tokenizer import Tokenizer
from sickbay.reference.training.loss import IGNORED

Pair = tuple[Ids, Ids]


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
        read = [np.append(self.begin_id, target) for _, target in pairs]
        said = [np.append(target, self.end_id) for _, target in pairs]
        return (stack([source for source, _ in pairs], self.pad_id), stack(read, self.pad_id)), stack(said, IGNORED)

    def batches(self, pairs: Sequence[Pair], batch_size: int, seed: int, first: int = 0) -> Iterator[tuple[Inputs, Tensor]]:
        """Endless batches from number `first` on: each pair once in an epoch, in an order of its own, by `seed` and the number alone."""
        demand("pairs", len(pairs), len(pairs) > 0, "at least one")
        demand("batch_size", batch_size, is_count(batch_size), "an integer of at least 1")
        number = first
        while True:
            epochs, places = np.divmod(np.arange(number * batch_size, (number + 1) * batch_size), len(pairs))
            chosen = [int(shuffled(place[None], len(pairs), seed, epoch)[0]) for epoch, place in zip(epochs.tolist(), places)]
            yield self([pairs[place] for place in chosen])
            number += 1


def read_pairs(path: Path, tokenizer: Tokenizer, context: int) -> list[Pair]:
    """The pairs of a JSONL file, one `{"source": ..., "target": ...}` a line. Raises OSError, UnicodeDecodeError.

    ValueError naming the line: it is no such object, a text has no ids, or source or target with its end is longer than `context`.
    """
    pairs = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                pairs.append(_pair(line, tokenizer, context))
            except ValueError as problem:
                raise ValueError(f"{path}, line {number}: {problem}") from problem
    return pairs


def _pair(line: str, tokenizer: Tokenizer, context: int) -> Pair:
    entry = json.loads(line)
    if not isinstance(entry, dict) or not all(isinstance(entry.get(side), str) and entry[side] for side in ("source", "target")):
        raise ValueError('a pair is {"source": "...", "target": "..."}, neither of them empty')
    source, target = tokenizer.encode(entry["source"]), tokenizer.encode(entry["target"])
    if len(source) > context or len(target) + 1 > context:
        raise ValueError(f"source and target have {len(source)} and {len(target)} tokens; at most {context} and {context - 1} fit")
    return source, target
