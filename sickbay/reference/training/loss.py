"""What is minimised: the mean cross-entropy of the tokens asked for, over the targets that count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sickbay.reference.processes.world import ALONE, World

IGNORED = -100


def counted(targets: Tensor, pad_id: int | None) -> Tensor:
    """`targets` with padding replaced by the id that the loss ignores."""
    return targets if pad_id is None else targets.masked_fill(targets == pad_id, IGNORED)


def next_token_loss(
    model: nn.Module,
    ids_BT: Tensor,
    targets_BT: Tensor,
    pad_id: int | None = None,
    documents: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """`prediction_loss` of a decoder's `ids` and `targets` `(B, T)`. `documents`: of packed rows `(B, T)`."""
    inputs = (ids_BT,) if documents is None else (ids_BT, documents)
    return prediction_loss(model, (*inputs, targets_BT), pad_id, label_smoothing, z_loss)


def prediction_loss(
    model: nn.Module, batch: Sequence[Tensor], pad_id: int | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Mean cross-entropy in nats over the targets that are neither `pad_id` nor -100; scalar. `batch`: `*inputs, targets`.

    `label_smoothing` spreads that share of each target over the vocabulary (Szegedy et al. 2016, section 7). `z_loss` adds that
    multiple of the mean of log(Z) squared, Z being the softmax's denominator (Chowdhery et al. 2022, section 5).
    """
    *inputs, targets_BT = batch
    logits_BTV = model(*inputs)
    logits_NV, targets_N = logits_BTV.flatten(0, 1), counted(targets_BT, pad_id).flatten()
    loss = functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, label_smoothing=label_smoothing)
    if z_loss:
        counts_N = targets_N != IGNORED
        squared_N = torch.logsumexp(logits_NV.float(), dim=-1).square() * counts_N
        loss = loss + z_loss * squared_N.sum() / counts_N.sum()
    return loss


def token_shares(cycle: Sequence[Sequence[Tensor]], pad_id: int | None = None, world: World = ALONE) -> list[float]:
    """Each micro-batch's share of the counted targets of one step: the weights that make accumulation equal to one joined batch.

    Where processes share the rows, their number times that: they average gradients, and averaging then adds up the shares.
    """
    counts = [int((counted(targets, pad_id) != IGNORED).sum()) for *_, targets in cycle]
    (total,) = world.sum(sum(counts))
    return [count * world.shards / total for count in counts] if total else [1 / len(cycle)] * len(cycle)
