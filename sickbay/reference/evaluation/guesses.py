"""What a model is held against where it does not continue a text, so that no table of the text's n-grams applies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sickbay.reference.data.batches import Batch
from sickbay.reference.data.objectives import SpanCorruption
from sickbay.reference.data.pairs import Translation
from sickbay.reference.data.tasks import Task, on
from sickbay.reference.evaluation.evaluation import evaluate
from sickbay.reference.generation.answer import Answerer, marks
from sickbay.reference.generation.complete import complete
from sickbay.reference.generation.decoding import Decoding
from sickbay.reference.models.encoder_decoder import EncoderDecoder
from sickbay.reference.text.marked import Marked
from sickbay.reference.training.loss import IGNORED

COUNTED_ROWS = 2000  # of the training part, whose targets are counted
OTHER_ROWS = 240  # of the validation part, read with another row's source
MASK = "_"


@dataclass(frozen=True)
class Guesses:
    """Nats per target: an even guess, counts of the training part's targets, and the model itself when it reads another row's source.

    `other_source`: None where there is no source. `commonest`: share of the targets that are the commonest one. `why`: no n-grams.
    """

    uniform: float
    unigram: float
    other_source: float | None
    commonest: float
    why: str

    def rows(self) -> list[tuple[str, float]]:
        other = [] if self.other_source is None else [("other source", self.other_source)]
        return [("uniform", self.uniform), ("unigram", self.unigram), *other]


@dataclass(frozen=True)
class Shown:
    """One row of the validation part: what the model read, what it made of it, and what was right."""

    read: str
    written: str
    right: str


def guesses(task: Task, model: nn.Module, device: torch.device) -> Guesses:
    """What needs no network, on the validation part of `task`, and whether `model` makes use of its source."""
    seen, asked = counts(task, "train", COUNTED_ROWS), counts(task, "val")
    shares = (seen + 1) / (seen + 1).sum()  # an id that was never seen is not impossible
    unigram = float(-(asked * np.log(shares)).sum() / max(1, asked.sum()))
    commonest = float(asked[seen.argmax()] / max(1, asked.sum()))
    if not isinstance(model, EncoderDecoder):
        return Guesses(math.log(len(seen)), unigram, None, commonest, "a masked token is told from both sides")
    swapped = (moved_on(batch) for batch in on(device, task.spread("val", OTHER_ROWS)))
    other = evaluate(model, swapped, task.config.pad_id).loss
    return Guesses(math.log(len(seen)), unigram, other, commonest, "a target is told from its source")


def counts(task: Task, part: str, most_rows: int | None = None) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """How often each id is asked for in `part`: `(V,)`."""
    found = np.zeros(task.config.vocab_size)
    for *_, targets in task.spread("train" if part == "train" else "val", most_rows):
        found += np.bincount(targets[targets != IGNORED].numpy(), minlength=len(found))
    return found


def moved_on(batch: Batch) -> Batch:
    """`batch` with each row's source replaced by the next one's."""
    source_BS, *rest = batch
    return (source_BS.roll(1, 0), *rest)


@torch.no_grad()
def shown(task: Task, model: nn.Module, device: torch.device) -> Shown:
    """The first row of the validation part, filled in or answered with the likeliest tokens."""
    tokenizer, objective = task.corpus.tokenizer, task.objective
    *inputs, targets = (each[:1] for each in next(iter(task.spread("val"))))
    if isinstance(objective, (SpanCorruption, Translation)) and isinstance(model, EncoderDecoder):
        words = Marked(tokenizer, marks(objective))
        source, right = inputs[0][0], targets[0][targets[0] != IGNORED]
        source = source if task.config.pad_id is None else source[source != task.config.pad_id]
        right = right[:-1]  # without what ends it
        given, target_words = Answerer(model, tokenizer, objective).given(source.numpy())
        (written,) = complete(given, target_words, [""], len(right) + 1, Decoding(temperature=0))
        return Shown(words.decode(source), written.text, words.decode(right))
    was_training = model.training
    model.eval()
    likeliest = model(*(each.to(device) for each in inputs))[..., : tokenizer.vocab_size].argmax(-1).cpu()
    model.train(was_training)
    asked, words = targets != IGNORED, Marked(tokenizer, [MASK])
    hidden, filled, right = (torch.where(asked, each, inputs[0])[0] for each in (torch.tensor(tokenizer.vocab_size), likeliest, targets))
    return Shown(words.decode(hidden), words.decode(filled), words.decode(right))
