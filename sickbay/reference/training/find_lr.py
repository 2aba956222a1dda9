"""The learning-rate range test (Smith 2017, Cyclical Learning Rates, section 3.3): one short run in which the rate only rises."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from sickbay.reference.data.corpus import Corpus
from sickbay.reference.data.tasks import on, task_of
from sickbay.reference.models.kinds import model_for
from sickbay.reference.settings.settings import Settings
from sickbay.reference.train import update
from sickbay.reference.training.loss import prediction_loss
from sickbay.reference.training.optimizer import make_optimizer, set_learning_rate
from sickbay.reference.training.precision import autocast, settled

LOWEST, HIGHEST = 1e-6, 1.0
TRIALS = 120  # 20 a decade
SMOOTHING = 0.9  # of the running mean over trials, corrected for its start (Kingma & Ba 2015, section 3)
WORSE = 1.5  # times the lowest smoothed loss: the training has broken down
MARGIN = 10  # below the rate of the lowest loss: that one is already at the brink, and a real run stays there for long
ROWS = 12


@dataclass(frozen=True)
class Trial:
    """One step at `learning_rate`. Losses in nats; `smoothed`: over the trials so far."""

    learning_rate: float
    loss: float
    smoothed: float


@dataclass(frozen=True)
class Found:
    """The trials in order, and what they suggest; None where the loss never fell."""

    trials: tuple[Trial, ...]
    suggestion: float | None

    @property
    def lowest(self) -> Trial:
        return min(self.trials, key=lambda trial: trial.smoothed)

    def rows(self) -> list[Trial]:
        """About a dozen of the trials, the lowest among them."""
        every = max(1, math.ceil(len(self.trials) / ROWS))
        return [trial for number, trial in enumerate(self.trials) if number % every == 0 or trial == self.lowest]

    def advice(self) -> str:
        """What to do with the table, as a sentence."""
        if self.suggestion is None:
            return "no suggestion: the loss did not fall at any learning rate; look at the data and the model first"
        return (
            f"suggested: --lr {self.suggestion:.1e}, a tenth of where the loss was lowest ({self.lowest.learning_rate:.1e}); "
            "longer runs and smaller batches want less"
        )


def find_learning_rate(corpus: Corpus, settings: Settings, device: str = "cpu") -> Found:
    """The loss of a fresh model, one batch a trial, the learning rate rising by the same factor each time until training breaks down.

    A Muon recipe's matrices keep the ratio of their learning rate to the others'. Raises ValueError (too little text).
    """
    config, recipe = settings.model, settings.recipe
    settled_on = settled(recipe.precision, config.dim, device)
    precision = "fp32" if settled_on == "fp16" else settled_on  # no scaler here
    torch.manual_seed(recipe.seed)
    model = model_for(recipe.objective, config).to(device)
    optimizer = make_optimizer(model, recipe)
    whole = dataclasses.replace(recipe, batch_size=recipe.batch_size * recipe.accumulation)
    batches = on(device, task_of(corpus, config, whole, settings.data).training(first=0))
    trials: list[Trial] = []
    running = 0.0
    for number, batch in zip(range(TRIALS), batches):
        rate = LOWEST * (HIGHEST / LOWEST) ** (number / (TRIALS - 1))
        set_learning_rate(optimizer, rate)
        with autocast(precision, device):
            loss = prediction_loss(model, batch, config.pad_id)
        loss.backward()
        update(model, optimizer, recipe.clip)
        running = SMOOTHING * running + (1 - SMOOTHING) * loss.item()
        smoothed = running / (1 - SMOOTHING ** (number + 1))
        if not math.isfinite(smoothed):
            break
        trials.append(Trial(rate, loss.item(), smoothed))
        if smoothed > WORSE * min(trial.smoothed for trial in trials):
            break
    if not trials:
        raise ValueError("the loss is not finite before the first step; look at the data and the model first")
    found = Found(tuple(trials), None)
    fell = found.lowest.smoothed < trials[0].smoothed
    return Found(tuple(trials), found.lowest.learning_rate / MARGIN if fell else None)
