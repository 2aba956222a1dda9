"""Trainings on two processes beside the same on one: run by torchrun, the first process writes what came of them as JSON.

torchrun --nproc-per-node 2 parallel_training.py KIND FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from sickbay.reference import data, train
from sickbay.reference.data.pairs import Translation
from sickbay.reference.data.tasks import objective_of
from sickbay.reference.models import parts
from sickbay.reference.models.config import Config
from sickbay.reference.processes.dtensor import local
from sickbay.reference.processes.world import ALONE, World, together
from sickbay.reference.saving import checkpoint
from sickbay.reference.settings.recipe import Objective, OptimizerKind, Parallel, Recipe
from sickbay.reference.training.progress import Progress

CONFIGS = {
    "shared-heads": Config(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, context=8, qk_norm=True, activation="swiglu"),
    "biased": Config(dim=16, num_layers=2, num_heads=2, context=8, bias=True, tied_embeddings=False, norm="layernorm", pad_id=1),
    "plain": Config(dim=16, num_layers=2, num_heads=2, context=24, bias=True, norm_place="post"),
}
# (configuration, optimizer, objective)
CASES: tuple[tuple[str, OptimizerKind, Objective], ...] = (
    ("shared-heads", "adamw", "next-token"),
    ("shared-heads", "muon", "next-token"),
    ("biased", "adamw", "next-token"),
    ("biased", "muon", "next-token"),
    ("shared-heads", "adamw", "masked-token"),
    ("shared-heads", "muon", "span-corruption"),
    ("plain", "adamw", "pairs"),
)
# Rows of unequal numbers of counted tokens (the space is padding in "biased"), several micro-batches, clipping at work.
RECIPE = Recipe(
    steps=5, batch_size=4, accumulation=2, learning_rate=0.01, warmup=1, clip=0.3, ema=0.9, eval_every=3, eval_rows=5, save_every=3
)


class Told:
    """What a training told: the loss and the gradients' norm of each step, and the validation losses."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.norms: list[float] = []
        self.validations: list[float] = []


def trained(corpus: data.Corpus, config: Config, recipe: Recipe, out: Path, world: World, resume: checkpoint.State | None = None) -> Told:
    told = Told()
    show, validation, begun, clip = Progress.show, Progress.show_validation, Progress.__init__, train.clip_gradients

    def at_every_step(self: Progress, *inputs: Any, **named: Any) -> None:
        begun(self, *inputs, **named)
        self.every = 1

    def note_norm(*inputs: Any) -> torch.Tensor:
        norm = clip(*inputs)
        told.norms.append(norm.item())
        return norm

    Progress.__init__ = at_every_step
    Progress.show = lambda self, done, loss: told.losses.__setitem__(done, loss)
    Progress.show_validation = lambda self, done, loss: told.validations.append(loss)
    train.clip_gradients = note_norm
    try:
        train.train(corpus, config, recipe, out, resume=resume, world=world)
    finally:
        Progress.__init__, Progress.show, Progress.show_validation, train.clip_gradients = begun, show, validation, clip
    return told


def held(config: Config, recipe: Recipe, world: World) -> dict[str, int]:
    """Bytes of what this process really holds of weights, gradients and moments after one step."""
    made = parts.begin(dataclasses.replace(config, pad_id=None), dataclasses.replace(recipe, ema=None), None, world, "cpu")
    ids = torch.zeros(2, config.context, dtype=torch.int64)
    made.net(ids).sum().backward()
    gradients = [local(parameter.grad) for parameter in made.model.parameters() if parameter.grad is not None]
    bytes_of = {"gradients": sum(gradient.numel() * gradient.element_size() for gradient in gradients)}
    made.optimizer.step()
    weights = [local(parameter) for parameter in made.model.parameters()]
    moments = [local(value) for kept in made.optimizer.state.values() for value in kept.values() if value.dim()]
    for name, tensors in (("weights", weights), ("optimizer", moments)):
        bytes_of[name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return bytes_of


def corpora(folder: Path, writes: bool) -> tuple[data.Corpus, data.Corpus]:
    """A text, and pairs: each of its words and the word backwards, of many lengths."""
    text, pairs = folder / "text.txt", folder / "pairs.tsv"
    if writes:
        said = data.shipped_text().read_text(encoding="utf-8")[:1500]
        text.write_text(said, encoding="utf-8")
        pairs.write_text("".join(f"{word}\t{word[::-1]}\n" for word in said.split()), encoding="utf-8")
    tokens, settings = folder / "tokens", data.DataSettings()
    return data.prepare([text], tokens, settings), data.prepare([pairs], tokens, settings, pairs=True)


def shaped(shape: Config, recipe: Recipe, corpus: data.Corpus) -> Config:
    """`shape` with the ids of tokenizer and objective."""
    objective = objective_of(recipe, shape, corpus.tokenizer)
    config = dataclasses.replace(shape, vocab_size=corpus.tokenizer.vocab_size + objective.extra_ids)
    return dataclasses.replace(config, pad_id=objective.pad_id) if isinstance(objective, Translation) else config


def main(kind: Parallel, folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with together(kind, "cpu", RECIPE.batch_size) as world:
        with world.first_alone():
            whole, pairs = corpora(folder, world.first)
        for name, optimizer, objective in CASES:
            corpus = pairs if objective == "pairs" else whole
            recipe = dataclasses.replace(RECIPE, optimizer=optimizer, parallel=kind, objective=objective)
            config = shaped(CONFIGS[name], recipe, corpus)
            run, again, alone = (folder / kind / f"{name}-{optimizer}-{objective}{end}" for end in ("", "-again", "-one"))
            told: dict[str, Told] = {"many": trained(corpus, config, recipe, run, world)}
            earlier = dataclasses.replace(checkpoint.read(run / "step-000003"))
            told["many, resumed"] = trained(corpus, config, recipe, again, world, earlier)
            if world.first:
                one = dataclasses.replace(recipe, parallel="none")
                told["one"] = trained(corpus, config, one, alone, ALONE)
                told["one, resumed from many"] = trained(corpus, config, one, folder / f"thrown-away-{objective}", ALONE, earlier)
            world.most(0)
            told["many, resumed from one"] = trained(
                corpus, config, recipe, folder / f"also-thrown-away-{objective}", world, checkpoint.read(alone / "step-000003")
            )
            found[f"{name} {optimizer} {objective}"] = {key: vars(value) for key, value in told.items()}
        plain = Config(dim=16, num_layers=2, num_heads=2, context=8, vocab_size=whole.tokenizer.vocab_size)
        found["held"] = held(plain, dataclasses.replace(RECIPE, optimizer="adamw"), world)
    (folder / f"{kind}-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))  # type: ignore[arg-type]
