"""The presets as targets of a checkup: `sickbay checkup sickbay.reference.presets:small`.

Each function gives what `sickbay train TEXT --preset NAME` makes of the shipped text: model, batches, loss and optimizer.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from sickbay.reference import data
from sickbay.reference.data.tasks import objective_of, task_of
from sickbay.reference.models.kinds import Model
from sickbay.reference.saving import random_states
from sickbay.reference.settings import presets, settings
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.training.loss import prediction_loss
from sickbay.reference.training.optimizer import make_optimizer
from sickbay.reference.training.start import starting_model

BATCHES = 24  # as many as a checkup takes
TOKENS = 1024  # of a batch, or one row: more would ask a processor the same questions for minutes


@dataclasses.dataclass(frozen=True)
class Target:
    """What a checkup takes, by these names."""

    model: Model
    batches: list[data.Batch]
    optimizer: torch.optim.Optimizer
    recipe: Recipe

    def loss(self, model: nn.Module, batch: data.Batch) -> Tensor:
        """The mean loss of a batch in nats, as the training loop takes it."""
        return prediction_loss(model, batch, self.model.config.pad_id, self.recipe.label_smoothing, self.recipe.z_loss)


def tiny() -> Target:
    """Of `--preset tiny`."""
    return of_preset("tiny")


def small() -> Target:
    """Of `--preset small`."""
    return of_preset("small")


def base() -> Target:
    """Of `--preset base`."""
    return of_preset("base")


def gpt2() -> Target:
    """Of `--preset gpt2`, with as many ids as the shipped text can teach a byte-pair tokenizer."""
    return of_preset("gpt2")


def best() -> Target:
    """Of `--preset best`."""
    return of_preset("best")


def encoder() -> Target:
    """Of `--preset encoder`."""
    return of_preset("encoder")


def seq2seq() -> Target:
    """Of `--preset seq2seq`."""
    return of_preset("seq2seq")


def of_preset(name: str) -> Target:
    """The target of preset `name`, at its highest learning rate, with fewer rows in a batch. Raises KeyError for a name that is none."""
    text = data.shipped_text()
    wanted = settings.checked(settings.layered(presets.PRESETS[name]), (str(text),))
    recipe, context = wanted.recipe, wanted.model.context
    with tempfile.TemporaryDirectory() as folder:
        corpus = data.prepare([text], Path(folder), wanted.data, context=context)
        ids = corpus.tokenizer.vocab_size + objective_of(recipe, wanted.model, corpus.tokenizer).extra_ids
        config = dataclasses.replace(wanted.model, vocab_size=ids)
        few = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, max(1, TOKENS // context)))
        batches = list(itertools.islice(task_of(corpus, config, few, wanted.data).training(first=0), BATCHES))
    random_states.seed(recipe.seed)
    model = starting_model(config, recipe)
    return Target(model, batches, make_optimizer(model, recipe), recipe)
