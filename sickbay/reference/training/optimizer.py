"""Which optimizer trains which weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.reference.models.blocks import Attention
from sickbay.reference.models.encoder_decoder import CrossAttention
from sickbay.reference.models.model import Transformer
from sickbay.reference.processes.dtensor import is_dtensor
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.training.muon import Muon

FUSED_DEVICES = ("cpu", "cuda")  # all of AdamW in one pass over memory


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters."""
    betas = (recipe.beta1, recipe.beta2)
    if recipe.optimizer == "adamw":
        return make_adamw(model, learning_rate=recipe.learning_rate, betas=betas, weight_decay=recipe.weight_decay)
    groups = decay_groups(model, recipe.weight_decay, without={id(parameter) for parameter in hidden_matrices(model)})
    return Muon(
        stack_groups(model),
        groups,
        learning_rate=recipe.learning_rate,
        betas=betas,
        matrix_learning_rate=recipe.matrix_learning_rate,
        matrix_weight_decay=recipe.matrix_weight_decay,
        momentum=recipe.momentum,
        fused=can_fuse(model),
    )


def make_adamw(model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; decoupled decay (Loshchilov & Hutter 2019) on matrices only, not on norms and biases."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=can_fuse(model))


def decay_groups(model: nn.Module, weight_decay: float, without: Collection[int] = ()) -> list[dict[str, Any]]:
    """Trainable matrices, which decay, and vectors, which do not; parameters whose `id` is in `without` are left out."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in without]
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in trainable:
        # Fused and grouped updates refuse to mix DTensors with tensors.
        groups.setdefault((parameter.dim() < 2, is_dtensor(parameter)), []).append(parameter)
    return [{"params": groups[key], "weight_decay": 0.0 if key[0] else weight_decay} for key in sorted(groups)]


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The trainable matrices of the linear layers between embedding and head: what Muon is made for."""
    heads = {id(module.head.weight) for module in model.modules() if isinstance(module, Transformer)}
    linear = (module.weight for module in model.modules() if isinstance(module, nn.Linear))
    return [weight for weight in linear if id(weight) not in heads and weight.requires_grad]


def stack_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The hidden matrices, those together that are stacks of matrices alike: "stack" as `muon.stacked_step` has it."""
    stacks = {id(module.query_key_value.weight): module.stack for module in model.modules() if isinstance(module, Attention)}
    stacks |= {id(module.key_value.weight): module.stack for module in model.modules() if isinstance(module, CrossAttention)}
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for weight in hidden_matrices(model):
        groups.setdefault(stacks.get(id(weight), ()), []).append(weight)
    return [{"params": weights, "stack": stack} for stack, weights in groups.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """All groups have `learning_rate`; a group with a learning rate of its own keeps its ratio ("relative") to it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("relative", 1.0)


def can_fuse(model: nn.Module) -> bool:
    return all(parameter.device.type in FUSED_DEVICES for parameter in model.parameters() if parameter.requires_grad)
