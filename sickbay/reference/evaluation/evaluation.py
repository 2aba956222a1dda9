"""How good a model is: its loss on text it never saw, what a table of counts would lose there, and how its own text repeats itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sickbay.core import repetition
from sickbay.core.ngrams import NGrams, windows
from sickbay.reference.data.batches import Batch, Tokens
from sickbay.reference.processes.world import ALONE, World
from sickbay.reference.training.loss import IGNORED, counted

GRAMS = (1, 2, 3)
MOST_COUNTED = 5_000_000  # tokens of the training part from which the tables are made: seconds, not minutes
MOST_USUAL = 100_000  # tokens of the corpus that tell how much repetition is usual
PLACES = 1 << 21  # of each table: no n-gram of so many tokens of text is crowded out
_PIECE = 1 << 18


@dataclass(frozen=True)
class Evaluation:
    """`loss`: mean nats per token over `tokens` targets; `error`: standard error of that mean, rows as draws (NaN from a single row).

    `accuracy`: share of the targets that are the token found likeliest.
    """

    loss: float
    error: float
    tokens: int
    accuracy: float = math.nan

    @property
    def perplexity(self) -> float:
        """As uncertain as an even choice among so many tokens."""
        return math.exp(min(700.0, self.loss)) if math.isfinite(self.loss) else math.inf

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Bits per UTF-8 byte of the text, which does not depend on the tokenizer (Gao et al. 2020, arXiv 2101.00027, section 3.1)."""
        return self.loss / math.log(2) / bytes_per_token


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], pad_id: int | None = None, world: World = ALONE) -> Evaluation:
    """The loss over all targets of `batches` that are neither `pad_id` nor -100, without dropout; the model's mode is as it was.

    `world`: the processes whose rows `batches` do not hold.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(7, dtype=torch.float64)
    try:
        for *inputs, targets_BT in batches:
            targets_N = counted(targets_BT, pad_id).flatten()
            logits_NV = model(*inputs).flatten(0, 1)
            loss_N = functional.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="none")
            loss_B = loss_N.view_as(targets_BT).double().sum(1).cpu()
            count_B = (targets_N != IGNORED).view_as(targets_BT).sum(1).double().cpu()
            hits = (logits_NV.argmax(-1) == targets_N).double().cpu()
            parts = (loss_B, count_B, (count_B > 0).double(), loss_B.square(), loss_B * count_B, count_B.square(), hits)
            sums += torch.stack([part.sum() for part in parts])
    finally:
        model.train(was_training)
    loss, tokens, rows, loss_squared, loss_count, count_squared, hits = world.sum(*sums.tolist())
    if not tokens:
        return Evaluation(math.nan, math.nan, 0)
    mean = loss / tokens
    # Of a ratio of two sums over rows (Cochran 1977, section 6.3): rows may hold unequal numbers of targets.
    squared = max(0.0, loss_squared - 2 * mean * loss_count + mean**2 * count_squared)
    error = math.sqrt(squared * rows / (rows - 1)) / tokens if rows > 1 else math.nan
    return Evaluation(mean, error, int(tokens), hits / tokens)


@dataclass(frozen=True)
class Baselines:
    """Nats per token that need no network: an even guess, and counts of single tokens, pairs and triples of `counted` training tokens."""

    uniform: float
    unigram: float
    bigram: float
    trigram: float
    counted: int

    def rows(self) -> list[tuple[str, float]]:
        return [("uniform", self.uniform), ("unigram", self.unigram), ("bigram", self.bigram), ("trigram", self.trigram)]


def baselines(train: Tokens, validation: Tokens, vocab_size: int, most: int = MOST_COUNTED) -> Baselines:
    """What tables of `train` `(N,)` lose on `validation` `(M,)`; of a longer text `most` tokens count, in pieces spread over it.

    Interpolated absolute discounting, see core.ngrams.
    """
    model = NGrams(vocab_size, places=PLACES)
    for before, piece in pieces(train, most):
        model.add_grams(*(each[before:] for each in windows(piece)))
    total, counted = np.zeros(len(GRAMS)), 0
    for before, piece in pieces(validation, most):
        losses = model.losses(*(each[before:] for each in windows(piece)))
        total += losses.sum(axis=1)
        counted += losses.shape[1]
    unigram, bigram, trigram = (float(each) for each in total / max(1, counted))
    return Baselines(math.log(vocab_size), unigram, bigram, trigram, model.tokens)


def pieces(tokens: Tokens, most: int) -> Iterator[tuple[int, Tokens]]:
    """(how many tokens stand only as context, piece) over all of `tokens` in order, or over `most` of them spread evenly."""
    size = min(_PIECE, max(1, most))
    starts = np.arange(0, len(tokens), size)
    if len(tokens) > most:
        starts = starts[np.linspace(0, len(starts) - 1, max(1, most // size)).round().astype(np.int64)]
    for start in starts.tolist():
        before = min(2, start)
        yield before, tokens[start - before : start + size]


@dataclass(frozen=True)
class Manner:
    """How text is written: share of distinct 1-, 2-, 3-grams (Li et al. 2016, arXiv 1510.03055), and of `usual` text of the same length.

    `repeats`: None where too short to say, else the share of its stretches that repeat themselves more than 99 % of the corpus does.
    `loop`: (tokens, period) of the longest part that says one thing over and over; (0, 0) if none.
    """

    distinct: tuple[float, ...]
    usual: tuple[float, ...]
    repeats: float | None
    loop: tuple[int, int]


def manner(samples: Sequence[Tokens], corpus: Tokens) -> Manner:
    """The manner of `samples`, each `(N,)`, beside that of `corpus` `(M,)`."""
    found = repetition.repetition(samples, corpus[:MOST_USUAL])
    longest = max(len(sample) for sample in samples)
    starts = np.linspace(0, max(0, len(corpus) - longest), len(samples)).astype(np.int64)
    usual = [corpus[start : start + len(sample)] for start, sample in zip(starts.tolist(), samples)]
    return Manner(
        tuple(repetition.distinct_share(samples, gram) for gram in GRAMS),
        tuple(repetition.distinct_share(usual, gram) for gram in GRAMS),
        None if found is None else found.share,
        max((repetition.longest_loop(sample) for sample in samples), default=(0, 0)),
    )
