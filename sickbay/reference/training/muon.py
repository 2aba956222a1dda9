"""Muon for the matrices inside a transformer, AdamW for everything else, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sickbay.reference.processes.dtensor import dealt_like, gathered

# Jordan et al. 2024: the quintic whose slope at 0 is steepest; five rounds bring singular values into about 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
ADAM_EPS = 1e-8
NORM_EPS = 1e-7


def orthogonalized(matrix: Tensor) -> Tensor:
    """The nearest matrix with (nearly) all singular values 1, by Newton-Schulz, `(R, C)` in the dtype of `matrix`.

    Computed in bfloat16 where the device multiplies it fast, as published; in float32 on a CPU.
    """
    working = torch.bfloat16 if matrix.device.type == "cuda" else torch.float32
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix  # the product x @ x.T is then the smaller one
    x = x.to(working)
    x = x / (x.norm() + NORM_EPS)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


def stacked_step(direction: Tensor, stack: Sequence[int]) -> Tensor:
    """Each matrix of `direction` `(R, C)` orthogonalized by itself, times sqrt(max(1, r / C)) of its own r rows: outputs move alike.

    `stack`: rows of the matrices that lie one above the other, a pattern that begins anew where it ends before R; none = one matrix.
    Queries, keys and values that share a matrix are three: together, the strongest would set the size of the others' steps.
    """
    rows, columns = direction.shape
    if not stack:
        return orthogonalized(direction) * math.sqrt(max(1.0, rows / columns))
    step_RC = torch.empty_like(direction)
    kind_R = torch.arange(len(stack)).repeat_interleave(torch.tensor(stack)).repeat(rows // sum(stack)).to(direction.device)
    for kind in range(len(stack)):
        of_kind = (kind_R == kind).nonzero().squeeze(1)
        step_RC[of_kind] = orthogonalized(direction[of_kind]) * math.sqrt(max(1.0, len(of_kind) / columns))
    return step_RC


class Muon(torch.optim.Optimizer):
    """Momentum, then its orthogonalization (Jordan et al. 2024), for `matrices`; AdamW for `others`.

    torch.optim.Muon is not used: it works in bfloat16 on every device, which CPUs without its instructions crawl through,
    and needs a second optimizer beside it. `matrices`: groups with "params" and "stack" (as `stacked_step` has it); `others`: groups with
    "params" and "weight_decay". Where processes hold parts of a matrix, each gathers it and takes its own part of the step.
    """

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        others: Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        matrix_learning_rate: float,
        matrix_weight_decay: float,
        momentum: float,
        fused: bool,
    ) -> None:
        relative = matrix_learning_rate / learning_rate
        shared = {"momentum": momentum, "weight_decay": matrix_weight_decay, "lr": matrix_learning_rate, "relative": relative}
        hidden = [{**group, **shared} for group in matrices]
        rest = [{**group, "lr": learning_rate, "betas": betas, "eps": ADAM_EPS, "fused": fused} for group in others]
        super().__init__([group for group in (*hidden, *rest) if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Every parameter with a gradient has moved once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "momentum" in group:
                self._muon(group)
            else:
                self._adamw(group)
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
            ahead = weight.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's look ahead
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(dealt_like(weight, stacked_step(gathered(ahead), group["stack"])), alpha=-group["lr"])

    def _adamw(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight].update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
                if group["fused"]:
                    self.state[weight]["step"] = self.state[weight]["step"].to(weight.device)
        adamw(
            weights,
            [weight.grad for weight in weights],
            [self.state[weight]["exp_avg"] for weight in weights],
            [self.state[weight]["exp_avg_sq"] for weight in weights],
            [],
            [self.state[weight]["step"] for weight in weights],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
