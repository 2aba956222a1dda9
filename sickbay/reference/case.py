"""A case: a small training run of the reference whose every part can be replaced, so that a fault can be planted in it.

    sick = Case().but(backward=lambda case, loss: loss.backward())
    model, losses = run(sick)

A seam takes the case first. To spoil a part yet keep the rest, call the healthy one: `Case.build(case)`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.reference import data, train
from sickbay.reference.data import Batch
from sickbay.reference.evaluation.evaluation import evaluate
from sickbay.reference.models.config import Config
from sickbay.reference.models.model import Transformer
from sickbay.reference.training.loss import next_token_loss, token_shares
from sickbay.reference.training.optimizer import make_adamw, set_learning_rate
from sickbay.reference.training.schedule import learning_rate_at

CORPUS_CHARACTERS = 100_000
EVAL_BATCHES = 4
MIN_LEARNING_RATE_SHARE = 0.1  # of the peak: Hoffmann et al. 2022, appendix B
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1


@functools.cache
def shipped_corpus() -> Tensor:
    """Ids `(100000,)` int64 of the beginning of the shipped text, by the tokenizer of the whole (65 characters)."""
    path = data.shipped_text()
    text = path.read_text(encoding="utf-8")[:CORPUS_CHARACTERS]
    return torch.from_numpy(data.CharTokenizer.of_text(path).encode(text))


def tiny_config() -> Config:
    return Config(dim=32, num_layers=2, num_heads=4, context=32)


def _build(case: Case) -> nn.Module:
    return Transformer(case.config)


def _optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    return make_adamw(model, learning_rate=case.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)


def _set_learning_rate(case: Case, optimizer: torch.optim.Optimizer, step: int) -> None:
    floor = case.learning_rate * MIN_LEARNING_RATE_SHARE
    set_learning_rate(optimizer, learning_rate_at(step, peak=case.learning_rate, floor=floor, warmup=case.warmup, steps=case.steps))


def _batches(case: Case, split: str) -> Iterator[Batch]:
    return data.random_batches(data.split(case.corpus.numpy(), split), case.config.context, case.batch_size, case.seed)


def _loss(case: Case, model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return next_token_loss(model, ids, targets, case.config.pad_id)


def _backward(case: Case, loss: Tensor) -> None:
    train.backward(loss, 1 / case.accumulation)


def _update(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    train.update(model, optimizer, case.clip)


def _evaluate(case: Case, model: nn.Module) -> float:
    return evaluate(model, itertools.islice(case.batches(case, "val"), EVAL_BATCHES), case.config.pad_id).loss


@dataclass(frozen=True, eq=False)
class Case:
    """A run of the reference: numbers, and seams that do the work.

    `batches(case, split)` yields endless `ids, targets`, both `(B, T)` int64, target -100 ignored; `loss` is their mean
    in nats; `backward` divides by `accumulation`; `update` clips, steps and zeroes; `evaluate` leaves training mode on.
    `corpus`: `(N,)` int64, its first nine tenths for training. `eval_every`: steps, 0 = never.
    """

    config: Config = field(default_factory=tiny_config)
    steps: int = 60
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup: int = 5
    clip: float | None = 1.0
    seed: int = 0
    eval_every: int = 20
    corpus: Tensor = field(default_factory=shipped_corpus, repr=False)
    build: Callable[[Case], nn.Module] = _build
    optimizer: Callable[[Case, nn.Module], torch.optim.Optimizer] = _optimizer
    set_learning_rate: Callable[[Case, torch.optim.Optimizer, int], None] = _set_learning_rate
    batches: Callable[[Case, str], Iterator[Batch]] = _batches
    loss: Callable[[Case, nn.Module, Tensor, Tensor], Tensor] = _loss
    backward: Callable[[Case, Tensor], None] = _backward
    update: Callable[[Case, nn.Module, torch.optim.Optimizer], None] = _update
    evaluate: Callable[[Case, nn.Module], float] = _evaluate

    def but(self, **changes: Any) -> Case:
        """The same case with the named fields replaced."""
        return dataclasses.replace(self, **changes)


def run(case: Case) -> tuple[nn.Module, list[float]]:
    """The trained model and each step's loss in nats. What the seams raise passes through."""
    torch.manual_seed(case.seed)
    model = case.build(case)
    optimizer = case.optimizer(case, model)
    batches = case.batches(case, "train")
    losses = []
    for step in range(case.steps):
        cycle = list(itertools.islice(batches, case.accumulation))
        if not cycle:
            break
        case.set_learning_rate(case, optimizer, step)
        step_loss = 0.0
        for (ids, targets), share in zip(cycle, token_shares(cycle, case.config.pad_id)):
            loss = case.loss(case, model, ids, targets)
            # Micro-batches of unequal token counts: `backward` divides by their number, this makes it a share of tokens.
            weight = share * case.accumulation
            case.backward(case, loss if weight == 1.0 else loss * weight)
            step_loss += loss.item() * share
        case.update(case, model, optimizer)
        losses.append(step_loss)
        if case.eval_every and (step + 1) % case.eval_every == 0:
            case.evaluate(case, model)
    return model, losses
