"""Training the reference: the pieces of one optimizer step, and the loop."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.nn import functional

from sickbay.reference import checkpoint, data
from sickbay.reference.checkpoint import Progress
from sickbay.reference.model import Config, Transformer

IGNORED = -100
FUSED_ADAMW_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are nanoGPT's recipe for a CPU. A value outside its range raises ValueError with field, value and range.

    `steps`: optimizer steps. `batch_size`: rows of one micro-batch; `accumulation`: micro-batches of one step.
    `warmup`: steps of linear rise. `clip`: global L2 norm, None = never. `eval_every`: steps, 0 = only at the end;
    `eval_rows`: validation windows of an evaluation under way (the last one takes the whole split).
    `save_every`: steps, 0 = only at the end.
    """

    steps: int = 2000
    batch_size: int = 12
    accumulation: int = 1
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup: int = 100
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    clip: float | None = 1.0
    seed: int = 1337
    eval_every: int = 250
    eval_rows: int = 240
    save_every: int = 500

    def __post_init__(self) -> None:
        for field, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("accumulation", 1),
            ("eval_rows", 1),
            ("warmup", 0),
            ("eval_every", 0),
            ("save_every", 0),
            ("seed", 0),
        ):
            _demand(field, getattr(self, field), getattr(self, field) >= least, f"at least {least}")
        _demand("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "above 0 and finite")
        _demand(
            "min_learning_rate",
            self.min_learning_rate,
            0 <= self.min_learning_rate <= self.learning_rate,
            f"from 0 to learning_rate={self.learning_rate:g}",
        )
        for field in ("beta1", "beta2"):
            _demand(field, getattr(self, field), 0 <= getattr(self, field) < 1, "at least 0 and below 1")
        _demand("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0 and finite")
        _demand("clip", self.clip, self.clip is None or self.clip > 0, "None or above 0")


def _demand(field: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{field} is {value!r}; it must be {allowed}")


def learning_rate_at(step: int, *, peak: float, floor: float, warmup: int, steps: int) -> float:
    """Linear rise over `warmup` steps to `peak`, then a cosine down to `floor` at `steps`, and `floor` ever after (Loshchilov & Hutter 2017, one cycle)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)


def make_optimizer(model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; decoupled decay (Loshchilov & Hutter 2019) on matrices only, not on norms and biases."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() >= 2]
    vectors = [parameter for parameter in trainable if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = all(parameter.device.type in FUSED_ADAMW_DEVICES for parameter in trainable)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def counted(targets: Tensor, pad_id: int | None) -> Tensor:
    """`targets` with padding replaced by the id that the loss ignores."""
    return targets if pad_id is None else targets.masked_fill(targets == pad_id, IGNORED)


def next_token_loss(model: nn.Module, ids_BT: Tensor, targets_BT: Tensor, pad_id: int | None = None) -> Tensor:
    """Mean cross-entropy in nats over the targets that are neither `pad_id` nor -100; scalar."""
    logits_BTV = model(ids_BT)
    return functional.cross_entropy(logits_BTV.flatten(0, 1), counted(targets_BT, pad_id).flatten(), ignore_index=IGNORED)


def token_shares(cycle: Sequence[data.Batch], pad_id: int | None = None) -> list[float]:
    """Each micro-batch's share of the counted targets of one step: the weights that make accumulation equal to one joined batch."""
    counts = [int((counted(targets, pad_id) != IGNORED).sum()) for _, targets in cycle]
    total = sum(counts)
    return [count / total for count in counts] if total else [1 / len(cycle)] * len(cycle)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> None:
    """One optimizer step has been taken from the accumulated gradients, clipped to global L2 norm `clip`, and they are gone."""
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def evaluate(model: nn.Module, batches: Iterable[data.Batch], pad_id: int | None = None) -> float:
    """Mean loss in nats over all counted targets of `batches`, without dropout and gradients; the model is in training mode after."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids, targets in batches:
            count = int((counted(targets, pad_id) != IGNORED).sum())
            total += next_token_loss(model, ids, targets, pad_id).item() * count
            tokens += count
    model.train()
    return total / tokens if tokens else math.nan
