"""What a training step gives and keeps when activations are recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sickbay.reference.models.kinds import Model
from sickbay.reference.training.recompute import recompute


def gradients(model: Model, how: Any, loss_of: Callable[[Model], Tensor]) -> tuple[list[Tensor], int]:
    """(gradients of `loss_of(model)` in training mode, bytes that the forward pass kept)."""
    model.train()
    recompute(model, how)
    torch.manual_seed(5)
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = loss_of(model)
        after_forward = kept
    loss.backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None], after_forward
