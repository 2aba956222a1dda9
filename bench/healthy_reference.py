"""Healthy variants of the reference: what people rightly do differently. None may raise a critical or a warning."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sickbay.reference.case import Case
from sickbay.reference.data import Batch
from sickbay.reference.models.config import Config
from sickbay.reference.training.loss import IGNORED
from sickbay.reference.training.optimizer import set_learning_rate
from sickbay.reference.training.schedule import learning_rate_at

PAD = 65  # the first id after the shipped text's characters


def variants(steps: int = 60) -> dict[str, Case]:
    """Every variant by name, each of `steps` steps but for the short ones."""
    base = Case(steps=steps)
    found: dict[str, Case] = {f"seed {seed}": base.but(seed=seed) for seed in range(4)}
    found |= {name: base.but(config=shape(base, **fields)) for name, fields in SHAPES.items()}
    found |= {name: base.but(**fields) for name, fields in RECIPES.items()}
    found |= {name: base.but(optimizer=of, learning_rate=rate) for name, (of, rate) in OPTIMIZERS.items()}
    found |= {name: base.but(learning_rate=1e-3, set_learning_rate=schedule) for name, schedule in SCHEDULES.items()}
    found |= {name: base.but(build=built(base, change)) for name, change in BUILDS.items()}
    found |= {
        "bf16 autocast": base.but(loss=under_autocast),
        "bf16 autocast, accumulation 2": base.but(loss=under_autocast, accumulation=2),
        "GradScaler, unscaled before clipping": with_scaler(base),
        "summed loss, not clipped": summed(base),
        "z-loss 1e-4": base.but(loss=with_z_loss),
        "label smoothing 0.1": base.but(loss=smoothed),
        "zero_grad keeps tensors": base.but(update=zeroing_in_place),
        "zero_grad before backward": zeroing_first(base),
        "weights averaged beside": averaging(base),
        "packed documents": base.but(loss=packed_loss),
        "padded on the right": base.but(config=shape(base, vocab_size=PAD + 1, pad_id=PAD), batches=padded("right")),
        "padded on the left, masked": base.but(config=shape(base, vocab_size=PAD + 1, pad_id=PAD), batches=padded("left")),
        "rows of all lengths, accumulation 4": base.but(
            config=shape(base, vocab_size=PAD + 1, pad_id=PAD), batches=padded("right"), accumulation=4
        ),
        "prompt ignored in the loss": base.but(batches=prompted),
        "epochs over shuffled data": base.but(batches=epochs),
    }
    return found


def shape(base: Case, **fields: Any) -> Config:
    return dataclasses.replace(base.config, **fields)


SHAPES: dict[str, dict[str, Any]] = {
    "1 layer": {"num_layers": 1},
    "6 layers": {"num_layers": 6},
    "dim 16": {"dim": 16, "num_heads": 2},
    "dim 96, context 48": {"dim": 96, "context": 48},
    "1 head": {"num_heads": 1},
    "context 8": {"context": 8},
    "post-norm": {"norm_place": "post"},
    "post-norm, LayerNorm, learned positions": {"norm_place": "post", "norm": "layernorm", "positions": "learned"},
    "GPT-2: LayerNorm, learned positions": {"norm": "layernorm", "positions": "learned"},
    "Llama: RMSNorm, rotary, SwiGLU, untied": {"activation": "swiglu", "tied_embeddings": False},
    "ReLU": {"activation": "relu"},
    "untied": {"tied_embeddings": False},
    "dropout 0.1": {"dropout": 0.1},
    "dropout 0.3": {"dropout": 0.3},
    "larger vocabulary than used": {"vocab_size": 512},
}
RECIPES: dict[str, dict[str, Any]] = {
    **{f"{steps} step{'s' * (steps > 1)}": {"steps": steps, "eval_every": 0} for steps in range(1, 6)},
    "one row": {"batch_size": 1},
    "32 rows": {"batch_size": 32},
    "accumulation 2": {"accumulation": 2},
    "accumulation 4": {"accumulation": 4},
    "not clipped": {"clip": None},
    "clipped to 0.1": {"clip": 0.1},
    "never evaluated": {"eval_every": 0},
    "evaluated every 3 steps": {"eval_every": 3},
    "learning rate 3e-3": {"learning_rate": 3e-3},
    "learning rate 1e-4": {"learning_rate": 1e-4},
    "no warm-up": {"warmup": 0},
}


def _all(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


OPTIMIZERS: dict[str, tuple[Callable[[Case, nn.Module], torch.optim.Optimizer], float]] = {
    "SGD": (lambda case, model: torch.optim.SGD(_all(model), lr=case.learning_rate), 0.5),
    "SGD with momentum": (lambda case, model: torch.optim.SGD(_all(model), lr=case.learning_rate, momentum=0.9), 0.1),
    "Adam": (lambda case, model: torch.optim.Adam(_all(model), lr=case.learning_rate), 1e-3),
    "AdamW, not fused": (lambda case, model: torch.optim.AdamW(_all(model), lr=case.learning_rate), 1e-3),
    "AdamW, one by one": (lambda case, model: torch.optim.AdamW(_all(model), lr=case.learning_rate, foreach=False), 1e-3),
    "RMSprop": (lambda case, model: torch.optim.RMSprop(_all(model), lr=case.learning_rate), 1e-3),
    "Adagrad": (lambda case, model: torch.optim.Adagrad(_all(model), lr=case.learning_rate), 1e-2),
}


def _warm_restarts(case: Case, optimizer: torch.optim.Optimizer, step: int) -> None:
    period = 20
    rate = learning_rate_at(step % period, peak=case.learning_rate, floor=case.learning_rate / 20, warmup=0, steps=period)
    set_learning_rate(optimizer, rate)


SCHEDULES: dict[str, Callable[[Case, torch.optim.Optimizer, int], None]] = {
    "constant learning rate": lambda case, optimizer, step: set_learning_rate(optimizer, case.learning_rate),
    "warm restarts": _warm_restarts,
}


def _frozen(*prefixes: str) -> Callable[[nn.Module], nn.Module]:
    def freeze(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            if name.startswith(prefixes):
                parameter.requires_grad_(False)
        return model

    return freeze


class _LowRank(nn.Module):
    """A frozen linear layer beside two trained thin ones (LoRA: Hu et al. 2021); `(..., in)` to `(..., out)`."""

    def __init__(self, inner: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.in_features, rank, bias=False)
        self.up = nn.Linear(rank, inner.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + self.up(self.down(x))
        return out


def _low_rank(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attention.query_key_value = _LowRank(block.attention.query_key_value)
        block.feed_forward.up = _LowRank(block.feed_forward.up)
    return model


def _checkpointed(model: nn.Module) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


BUILDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "embedding frozen": _frozen("token_embedding", "head"),
    "first block frozen": _frozen("blocks.0"),
    "LoRA": _low_rank,
    "activation checkpointing": _checkpointed,
    "float64": lambda model: model.double(),
}


def built(base: Case, change: Callable[[nn.Module], nn.Module]) -> Callable[[Case], nn.Module]:
    return lambda case: change(base.build(case))


def under_autocast(case: Case, model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = model(ids)
        return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets.flatten())


def with_scaler(base: Case) -> Case:
    scaler = torch.amp.GradScaler("cpu")

    def backward(case: Case, loss: Tensor) -> None:
        scaler.scale(loss / case.accumulation).backward()

    def update(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return base.but(backward=backward, update=update)


def summed(base: Case) -> Case:
    def loss(case: Case, model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")

    return base.but(loss=loss, clip=None)


def with_z_loss(case: Case, model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    logits_BTV = model(ids)
    log_z_BT = logits_BTV.logsumexp(dim=-1)
    return functional.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten()) + 1e-4 * log_z_BT.square().mean()


def smoothed(case: Case, model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), label_smoothing=0.1)


def packed_loss(case: Case, model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Two documents a row, told apart by `documents`; the target that would cross the border is not counted."""
    half = ids.shape[1] // 2
    documents = (torch.arange(ids.shape[1]) >= half).long().expand_as(ids)
    kept = targets.clone()
    kept[:, half - 1] = IGNORED
    return functional.cross_entropy(model(ids, documents).flatten(0, 1), kept.flatten(), ignore_index=IGNORED)


def zeroing_in_place(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def zeroing_first(base: Case) -> Case:
    """zero_grad stands before the forward of the next step, as in many tutorials."""
    waiting: list[torch.optim.Optimizer] = []

    def loss(case: Case, model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        while waiting:
            waiting.pop().zero_grad()
        return base.loss(case, model, ids, targets)

    def update(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        waiting.append(optimizer)

    return base.but(loss=loss, update=update)


def averaging(base: Case) -> Case:
    """An exponential average of the weights is kept beside the model."""
    averages: list[torch.optim.swa_utils.AveragedModel] = []

    def update(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        base.update(case, model, optimizer)
        if not averages:
            averages.append(torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)))
        averages[0].update_parameters(model)

    return base.but(update=update)


def padded(side: str) -> Callable[[Case, str], Iterator[Batch]]:
    """Rows of unequal length, filled up with PAD on `side`; padded targets are not counted."""
    plain = Case().batches

    def batches(case: Case, split: str) -> Iterator[Batch]:
        lengths = torch.Generator().manual_seed(case.seed)
        for ids, targets in plain(case, split):
            T = ids.shape[1]
            length_B1 = torch.randint(T // 2, T + 1, (len(ids), 1), generator=lengths)
            place_T = torch.arange(T)
            empty_BT = place_T >= length_B1 if side == "right" else place_T < T - length_B1
            yield ids.masked_fill(empty_BT, PAD), targets.masked_fill(empty_BT, IGNORED)

    return batches


def prompted(case: Case, split: str) -> Iterator[Batch]:
    """The first third of every row is a prompt whose targets are not counted."""
    for ids, targets in Case().batches(case, split):
        kept = targets.clone()
        kept[:, : targets.shape[1] // 3] = IGNORED
        yield ids, kept


def epochs(case: Case, split: str) -> Iterator[Batch]:
    """The same few batches epoch after epoch, shuffled anew each time."""
    few = list(itertools.islice(Case().batches(case, split), 16))
    rows, targets = torch.cat([ids for ids, _ in few]), torch.cat([target for _, target in few])
    order = torch.Generator().manual_seed(case.seed)
    while True:
        for chosen in torch.randperm(len(rows), generator=order).split(case.batch_size):
            yield rows[chosen], targets[chosen]
