"""An average of the weights over the steps: smoother than the last weights, often better (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sickbay.reference.processes.dtensor import local


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` as `.module`, which `.update_parameters(model)` moves by 1 - decay towards it.

    After n moves the decay is at most (1 + n) / (10 + n), so that the first weights are soon forgotten (TensorFlow's
    ExponentialMovingAverage, `num_updates`).
    """

    def move(averages: Sequence[Tensor], weights: Sequence[Tensor], moves: Tensor | int) -> None:
        number = int(moves)
        torch._foreach_lerp_(
            [local(average) for average in averages], [local(weight) for weight in weights], 1 - min(decay, (1 + number) / (10 + number))
        )

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(move))
