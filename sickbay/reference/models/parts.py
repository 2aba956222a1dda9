"""The parts of a training that move from step to step: what a checkpoint keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sickbay.reference.data.corpus import Corpus
from sickbay.reference.models.config import Config
from sickbay.reference.models.kinds import Model
from sickbay.reference.processes.parallel import deal_out, exchanging
from sickbay.reference.processes.world import World
from sickbay.reference.saving import checkpoint, random_states
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.training.ema import averaged
from sickbay.reference.training.machine import demand_compiler
from sickbay.reference.training.optimizer import make_optimizer
from sickbay.reference.training.precision import make_scaler
from sickbay.reference.training.recompute import recompute
from sickbay.reference.training.start import starting_model
from sickbay.reference.training.stopping import Patience


@dataclass
class Parts:
    """`net`: what to call for logits, which is `model` or what exchanges its gradients. `steps`: optimizer steps taken."""

    model: Model
    net: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    patience: Patience
    steps: int = 0

    @property
    def judged(self) -> nn.Module:
        """What is evaluated: the average of the weights, where there is one."""
        return self.model if self.average is None else self.average.module


def begin(config: Config, recipe: Recipe, resume: checkpoint.State | None, world: World, device: str) -> Parts:
    """The parts as the first step needs them: new, or as `resume` has them. Raises UsageError, ValueError."""
    random_states.seed(recipe.seed)
    model = starting_model(config, recipe, fresh=resume is None)
    recompute(model, recipe.recompute)
    average = None if recipe.ema is None else averaged(model, recipe.ema)
    deal_out(model, world, device)
    if average is not None:
        deal_out(cast("Model", average.module), world, device)
    net = exchanging(model, world)
    parts = Parts(model, net, make_optimizer(model, recipe), make_scaler(recipe.precision, device), average, Patience(recipe.patience))
    if resume is not None:
        _restore(parts, resume, world)
    elif world.shards > 1:
        random_states.draw_anew(recipe.seed, world.shard)  # each part of a batch drops units of its own
    if recipe.compile:
        demand_compiler(device)
        model.compile()
    return parts


def _restore(parts: Parts, state: checkpoint.State, world: World) -> None:
    checkpoint.restore_weights(state, parts.model, world=world)
    checkpoint.restore(state, parts.model, parts.optimizer, world)
    parts.scaler.load_state_dict(state.scaler or {})
    parts.patience.restore(state.progress)
    if parts.average is not None:
        checkpoint.restore_weights(state, parts.average.module, averaged=True, world=world)
        parts.average.n_averaged.fill_(state.step)
    parts.steps = state.step


class Keeper:
    """Saves `parts`. A disk that takes nothing more ends no training: `tell` says so, and `problem` is why the last save failed."""

    def __init__(self, parts: Parts, recipe: Recipe, corpus: Corpus, world: World, tell: Callable[[str], None]) -> None:
        self._parts, self._recipe, self._corpus, self._world, self._tell = parts, recipe, corpus, world, tell
        self.problem: OSError | None = None

    def save(self, run: Path, before: Path | None, keep: int = checkpoint.KEEP) -> Path | None:
        """The new checkpoint in `run`, which holds `keep` of them, or, where it could not be written, the one `before`."""
        parts = self._parts
        self.problem = None
        try:
            return checkpoint.save(
                run,
                keep=keep,
                step=parts.steps,
                model=parts.model,
                optimizer=parts.optimizer,
                recipe=dataclasses.asdict(self._recipe),
                source=self._corpus.source,
                tokenizer=self._corpus.tokenizer,
                average=None if parts.average is None else checkpoint.named_weights(parts.average.module),
                scaler=parts.scaler.state_dict() or None,
                progress=parts.patience.state(),
                world=self._world,
            )
        except OSError as problem:
            self.problem = problem
            self._tell(f"no checkpoint could be written to {run} ({problem.strerror}); training goes on, the newest is {before}")
            return before
