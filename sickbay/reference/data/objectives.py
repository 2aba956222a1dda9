"""What a model is asked: rows of text to inputs and targets, for a decoder, an encoder and an encoder-decoder.

    inputs, targets = objective(rows, number)
    loss = cross_entropy(model(*inputs).flatten(0, 1), targets.flatten())

`rows`: ids `(B, N)` int64. Targets are -100 where nothing is asked. What is drawn depends on `seed` and the batch's `number`
alone, so the same row is spoiled otherwise when it comes again (Liu et al. 2019, section 4.1) and a run resumes by its number.
Ids that no text has (masks, sentinels) stand after the tokenizer's: the model's `vocab_size` is `vocab_size + extra_ids`.
Translation pairs are in pairs.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sickbay.reference.settings.demand import demand, is_count, is_number
from sickbay.reference.training.loss import IGNORED

Inputs = tuple[Tensor, ...]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NextToken:
    """Each token is predicted from those before it: for a decoder, `(B, N)` to inputs and targets `(B, N - 1)`."""

    extra_ids = 0

    def __call__(self, rows_BN: Tensor, number: int) -> tuple[Inputs, Tensor]:
        return (rows_BN[:, :-1].contiguous(),), rows_BN[:, 1:].contiguous()


@dataclass(frozen=True)
class MaskedToken:
    """Some tokens are hidden and predicted from all others: for an encoder, `(B, N)` to inputs and targets `(B, N)`.

    Of each row's tokens a `share`, at least one, is asked for: 80 % of those are replaced by `mask_id`, 10 % by a random token, 10 % stay
    (Devlin et al. 2019, section 3.1: so that what is not masked is also worth a good vector). `special`: ids that are never asked
    for, such as padding and the end of a text. A field outside its range raises ValueError.
    """

    vocab_size: int
    share: float = 0.15
    special: tuple[int, ...] = ()
    seed: int = 1337

    extra_ids = 1
    masked, randomised = 0.8, 0.1

    def __post_init__(self) -> None:
        demand("vocab_size", self.vocab_size, is_count(self.vocab_size), "an integer of at least 1")
        demand("share", self.share, is_number(self.share) and 0 < self.share < 1, "above 0 and below 1")
        demand("seed", self.seed, is_count(self.seed, 0), "an integer of at least 0")
        demand("special", self.special, len(set(self.special)) < self.vocab_size, f"fewer ids than vocab_size={self.vocab_size}")

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    def __call__(self, rows_BN: Tensor, number: int) -> tuple[Inputs, Tensor]:
        random = np.random.default_rng((self.seed, number))
        ids_BN = rows_BN.numpy().copy()
        special_BN = np.isin(ids_BN, self.special)
        # The tokens with the lowest lots are asked for: an exact share, so that no row is empty by chance.
        lots_BN = np.where(special_BN, 2.0, random.random(ids_BN.shape))
        real_B = (~special_BN).sum(axis=1)
        asked_B = np.minimum(real_B, np.maximum(1, np.round(self.share * real_B)))
        asked_BN = lots_BN.argsort(axis=1).argsort(axis=1) < asked_B[:, None]
        targets_BN = np.where(asked_BN, ids_BN, IGNORED)

        fate_BN = random.random(ids_BN.shape)
        ordinary = np.setdiff1d(np.arange(self.vocab_size), self.special)
        random_BN = random.choice(ordinary, size=ids_BN.shape)
        ids_BN[asked_BN & (fate_BN < self.masked)] = self.mask_id
        swapped_BN = asked_BN & (self.masked <= fate_BN) & (fate_BN < self.masked + self.randomised)
        ids_BN[swapped_BN] = random_BN[swapped_BN]
        return (torch.from_numpy(ids_BN),), torch.from_numpy(targets_BN)


@dataclass(frozen=True)
class SpanCorruption:
    """Spans are cut out and written down in order: for an encoder-decoder (Raffel et al. 2020, section 3.1.4 and figure 2).

        row      Thank you for inviting me to your party last week
        source   Thank you <0> me to your party <1> week
        target   <begin> <0> for inviting <1> last <2>

    `share`: of a row's tokens that are cut out. `mean_span`: their mean number in one span. `sentinels`: how many there are, one more
    than a row has spans. `pad_id`: padding in the rows, which is left out, and fills up the results where lengths differ; None = the
    rows have none, and all results are equally long. A field outside its range raises ValueError.
    """

    vocab_size: int
    share: float = 0.15
    mean_span: float = 3.0
    sentinels: int = 100
    pad_id: int | None = None
    seed: int = 1337

    def __post_init__(self) -> None:
        demand("vocab_size", self.vocab_size, is_count(self.vocab_size), "an integer of at least 1")
        demand("share", self.share, is_number(self.share) and 0 < self.share < 1, "above 0 and below 1")
        demand("mean_span", self.mean_span, is_number(self.mean_span) and self.mean_span >= 1, "at least 1")
        demand("sentinels", self.sentinels, is_count(self.sentinels, 2), "an integer of at least 2")
        demand("seed", self.seed, is_count(self.seed, 0), "an integer of at least 0")

    def for_rows(self, length: int) -> SpanCorruption:
        """The same with as many sentinels as rows of `length` tokens need. Raises ValueError where a target would be longer than they."""
        enough = replace(self, sentinels=length + 1)
        target = enough.lengths(length)[1]
        fits = f"such that a target, which has {target} tokens with mean_span={self.mean_span:g}, fits context={length}"
        demand("mask_share", self.share, target <= length, fits)
        return replace(self, sentinels=enough.cut(length)[1] + 1)

    @property
    def begin_id(self) -> int:
        return self.vocab_size

    @property
    def extra_ids(self) -> int:
        return 1 + self.sentinels

    def sentinel(self, span: int) -> int:
        return self.vocab_size + 1 + span

    def cut(self, length: int) -> tuple[int, int]:
        """How many of `length` tokens are cut out, and in how many spans; at least one token stays before each span."""
        if length < 2:
            raise ValueError(f"a row has {length} tokens; span corruption needs at least 2")
        hidden = min(max(round(length * self.share), 1), length - 1)
        spans = min(max(round(hidden / self.mean_span), 1), length - hidden)
        if spans >= self.sentinels:
            raise ValueError(
                f"a row of {length} tokens has {spans} spans; that needs sentinels={spans + 1}, and there are {self.sentinels}"
            )
        return hidden, spans

    def lengths(self, length: int) -> tuple[int, int]:
        """Positions of source and target of a row of `length` tokens: `context` must be at least the larger."""
        hidden, spans = self.cut(length)
        return length - hidden + spans, hidden + spans + 1

    def __call__(self, rows_BN: Tensor, number: int) -> tuple[Inputs, Tensor]:
        """Inputs: source `(B, S)` and target `(B, T)` for the decoder to read; targets `(B, T)` are what follows each of its tokens."""
        random = np.random.default_rng((self.seed, number))
        rows = [row if self.pad_id is None else row[row != self.pad_id] for row in rows_BN.numpy()]
        sources, targets = zip(*(self._corrupt(row, random) for row in rows))
        read = [np.append(self.begin_id, target[:-1]) for target in targets]
        fill = 0 if self.pad_id is None else self.pad_id
        return (stack(sources, fill), stack(read, fill)), stack(targets, IGNORED)

    def _corrupt(self, row: Ids, random: np.random.Generator) -> tuple[Ids, Ids]:
        hidden, spans = self.cut(len(row))
        ids: list[int] = row.tolist()
        source: list[int] = []
        target: list[int] = []
        begin = 0
        lengths = zip(segments(len(row) - hidden, spans, random).tolist(), segments(hidden, spans, random).tolist())
        for span, (kept, cut) in enumerate(lengths):
            middle, end = begin + kept, begin + kept + cut
            source += [*ids[begin:middle], self.sentinel(span)]
            target += [self.sentinel(span), *ids[middle:end]]
            begin = end
        return np.array(source), np.array([*target, self.sentinel(spans)])


def segments(items: int, count: int, random: np.random.Generator) -> Ids:
    """`count` positive numbers `(count,)` whose sum is `items`, every such list equally likely."""
    borders = np.empty(count + 1, dtype=np.int64)
    borders[0], borders[-1] = 0, items
    borders[1:-1] = np.sort(random.permutation(items - 1)[: count - 1]) + 1
    return borders[1:] - borders[:-1]


def stack(rows: list[Ids] | tuple[Ids, ...], fill: int) -> Tensor:
    """`(B, longest)` int64, shorter rows filled up on the right."""
    stacked = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for place, row in zip(stacked, rows):
        place[: len(row)] = row
    return torch.from_numpy(stacked)
