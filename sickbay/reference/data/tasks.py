"""What a run asks of its model: the batches of the recipe's objective, of a corpus.

    task = task_of(corpus, config, recipe, texts)
    for *inputs, targets in task.training(first=0): logits = model(*inputs)

Training batch n is the same whatever came before it and however many processes share its rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sickbay.core.errors import UsageError
from sickbay.reference.data.batches import ALL, Batch, Tokens, demand_length, spread_batches, windows
from sickbay.reference.data.corpus import Corpus, packed_by, train_batches
from sickbay.reference.data.objectives import Inputs, MaskedToken, NextToken, SpanCorruption
from sickbay.reference.data.packing import documents_of
from sickbay.reference.data.pairs import Pairs, Translation
from sickbay.reference.models.config import Config
from sickbay.reference.settings.data_settings import DataSettings
from sickbay.reference.settings.demand import demand
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.text.tokenizer import Tokenizer
from sickbay.reference.training.loss import IGNORED

Part = Literal["train", "val"]
AnyObjective = NextToken | MaskedToken | SpanCorruption | Translation


@dataclass(frozen=True)
class Task(ABC):
    """What `recipe` asks of a model of shape `config`, of `corpus`. `asked`: what the targets are, in a word.

    `bytes_per_token`: UTF-8 bytes of the text that a target stands for, None where targets are not the text. `tokens_per_row`: of the
    corpus, in a row of a batch.
    """

    corpus: Corpus
    config: Config
    recipe: Recipe
    objective: AnyObjective

    @property
    @abstractmethod
    def asked(self) -> str: ...

    @property
    def bytes_per_token(self) -> float | None:
        return None

    @property
    def tokens_per_row(self) -> float:
        return self.config.context

    @abstractmethod
    def training(self, first: int, rows: slice = ALL) -> Iterator[Batch]:
        """Endless training batches from number `first` on. `rows`: of each batch, those of this process."""

    @abstractmethod
    def spread(self, part: Part, most_rows: int | None = None, rows: slice = ALL) -> Iterator[Batch]:
        """All of `part` in order, or `most_rows` rows evenly spread over it. Every process gets as many batches as the others."""


def task_of(corpus: Corpus, config: Config, recipe: Recipe, texts: DataSettings | None = None) -> Task:
    """The task of `recipe`. Raises UsageError, ValueError where texts, model and recipe do not belong together."""
    texts = texts or DataSettings()
    demand_together(config, recipe, texts)
    objective = objective_of(recipe, config, corpus.tokenizer)
    ids = corpus.tokenizer.vocab_size + objective.extra_ids
    demand("vocab_size", config.vocab_size, config.vocab_size >= ids, f"at least {ids}, the ids of tokenizer and objective")
    if isinstance(objective, Translation):
        demand("pad_id", config.pad_id, config.pad_id == objective.pad_id, f"{objective.pad_id}, which objective=pairs fills rows up with")
        return PairsTask(corpus, config, recipe, objective)
    for tokens, part in ((corpus.train, "train"), (corpus.val, "validation")):
        demand_length(tokens, config.context, part)
    end_of_text = packed_by(corpus, texts)
    if isinstance(objective, NextToken):
        return TextTask(corpus, config, recipe, objective, texts, end_of_text)
    return SpoiledTask(corpus, config, recipe, objective, texts, end_of_text)


def objective_of(recipe: Recipe, config: Config, tokenizer: Tokenizer) -> AnyObjective:
    """The recipe's objective on ids of `tokenizer`. Raises ValueError where it does not fit rows of `config.context`."""
    ids = tokenizer.vocab_size
    if recipe.objective == "masked-token":
        special = tuple(id for id in (tokenizer.end_of_text, config.pad_id) if id is not None)
        return MaskedToken(ids, recipe.mask_share, special, recipe.seed)
    if recipe.objective == "span-corruption":
        plain = SpanCorruption(ids, recipe.mask_share, recipe.mean_span, pad_id=config.pad_id, seed=recipe.seed)
        return plain.for_rows(config.context)
    return Translation(ids) if recipe.objective == "pairs" else NextToken()


def demand_together(config: Config, recipe: Recipe, texts: DataSettings) -> None:
    """Raises ValueError or UsageError where settings that are each in their range do not go together."""
    objective = recipe.objective
    stretches = objective in ("next-token", "masked-token")
    demand("packed", texts.packed, stretches or not texts.packed, f"False with objective={objective}, whose rows are no stretches of text")
    if objective == "pairs" and texts.augments:
        raise UsageError("pairs are not augmented; leave delete_words, swap_words and translate_there out with objective=pairs")
    if objective == "span-corruption":
        SpanCorruption(1, recipe.mask_share, recipe.mean_span).for_rows(config.context)


@dataclass(frozen=True)
class TextTask(Task):
    """Each token of a text from those before it. `end_of_text`: keeps the documents of a row apart; None where rows are not packed."""

    objective: NextToken
    texts: DataSettings
    end_of_text: int | None

    @property
    def asked(self) -> str:
        return "token"

    @property
    def bytes_per_token(self) -> float:
        return self.corpus.bytes_per_token

    def training(self, first: int, rows: slice = ALL) -> Iterator[Batch]:
        recipe = self.recipe
        return self._batches(train_batches(self.corpus, self.texts, self.config.context, recipe.batch_size, recipe.seed, first, rows))

    def spread(self, part: Part, most_rows: int | None = None, rows: slice = ALL) -> Iterator[Batch]:
        tokens, size = of(self.corpus, part), self.recipe.batch_size
        return self._batches(spread_batches(tokens, self.config.context, size, most_rows, rows=rows, end_of_text=self.end_of_text))

    def _batches(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        for ids_BT, targets_BT in stream:
            yield (ids_BT, *apart(ids_BT, self.end_of_text), targets_BT)


@dataclass(frozen=True)
class SpoiledTask(Task):
    """What was hidden in a text, or cut out of it; rows are whole windows. `end_of_text`: as TextTask's."""

    objective: MaskedToken | SpanCorruption
    texts: DataSettings
    end_of_text: int | None

    @property
    def asked(self) -> str:
        return "masked token" if isinstance(self.objective, MaskedToken) else "target token"

    def training(self, first: int, rows: slice = ALL) -> Iterator[Batch]:
        recipe = self.recipe
        stream = train_batches(self.corpus, self.texts, self.config.context, recipe.batch_size, recipe.seed, first)
        return self._batches((ids_BT for ids_BT, _ in stream), first, rows)

    def spread(self, part: Part, most_rows: int | None = None, rows: slice = ALL) -> Iterator[Batch]:
        tokens, context = of(self.corpus, part), self.config.context
        starts = evenly(np.arange(0, len(tokens) - context, context), most_rows)
        return self._batches((windows(tokens, batch, context)[0] for batch in chunks(starts, self.recipe.batch_size)), 0, rows)

    def _batches(self, stream: Iterable[Tensor], first: int, rows: slice) -> Iterator[Batch]:
        for number, rows_BT in enumerate(stream, first):
            # The whole batch is spoiled, then dealt out: the same however many processes share it.
            inputs, targets = self.objective(rows_BT, number)
            yield dealt((*inputs, *apart(rows_BT, self.end_of_text)), targets, rows)


@dataclass(frozen=True)
class PairsTask(Task):
    """A target from its source. Raises ValueError where a pair is longer than the context, or a part has none."""

    objective: Translation

    @property
    def asked(self) -> str:
        return "target token"

    def __post_init__(self) -> None:
        for part, pairs in self._pairs.items():
            demand(f"{part} pairs", len(pairs), len(pairs) > 0, "at least one")
            pairs.demand_fit(self.config.context)

    @cached_property
    def _pairs(self) -> dict[Part, Pairs]:
        return {"train": Pairs(self.corpus.train, self.objective), "val": Pairs(self.corpus.val, self.objective)}

    @property
    def tokens_per_row(self) -> float:
        return self._pairs["train"].mean_length

    def training(self, first: int, rows: slice = ALL) -> Iterator[Batch]:
        stream = self.objective.batches(self._pairs["train"], self.recipe.batch_size, self.recipe.seed, first)
        return (dealt(inputs, targets, rows) for inputs, targets in stream)

    def spread(self, part: Part, most_rows: int | None = None, rows: slice = ALL) -> Iterator[Batch]:
        pairs = self._pairs[part]
        for places in chunks(evenly(np.arange(len(pairs)), most_rows), self.recipe.batch_size):
            yield dealt(*self.objective([pairs[int(place)] for place in places]), rows)


def of(corpus: Corpus, part: Part) -> Tokens:
    return corpus.train if part == "train" else corpus.val


def apart(ids_BT: Tensor, end_of_text: int | None) -> Inputs:
    """What a model reads beside the ids where rows are packed: the number of each token's document `(B, T)`."""
    return () if end_of_text is None else (documents_of(ids_BT, end_of_text),)


def evenly(items: Tokens, most: int | None) -> Tokens:
    """`most` of `items` `(N,)`, evenly spread; all where there are no more."""
    return items if most is None or most >= len(items) else items[np.linspace(0, len(items) - 1, most).round().astype(np.int64)]


def chunks(items: Tokens, size: int) -> Iterator[Tokens]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))


def dealt(inputs: Sequence[Tensor], targets: Tensor, rows: slice) -> Batch:
    """The batch's `rows`; where there is none, a row whose targets are all ignored."""
    if len(targets[rows]):
        return (*(each[rows] for each in inputs), targets[rows])
    return (*(each[:1] for each in inputs), torch.full_like(targets[:1], IGNORED))


def on(device: str | torch.device, batches: Iterable[Batch]) -> Iterator[Batch]:
    """`batches`, each moved to `device` when it is asked for."""
    return (tuple(each.to(device) for each in batch) for batch in batches)
