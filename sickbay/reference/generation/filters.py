"""What lowers or removes tokens before one is chosen; each takes scores `(B, V)` and returns new ones, removed tokens at -inf.

Scores are log-probabilities up to a constant a row. Every filter leaves at least one token of each row, and the order of those that stay.
Suffixes: B rows, T positions, V vocabulary, W windows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEW = 1024  # tokens


def count(written_BT: Tensor, vocab_size: int) -> Tensor:
    """How often each token stands in each row `(B, V)` int64; -1 is padding and not counted."""
    counts = torch.zeros(len(written_BT), vocab_size + 1, dtype=torch.int64, device=written_BT.device)
    return counts.scatter_add_(1, written_BT + 1, torch.ones_like(written_BT))[:, 1:]


def penalise_repetition(scores_BV: Tensor, counts_BV: Tensor, penalty: float) -> Tensor:
    """Log-probabilities of written tokens times `penalty`, once for each distinct token; `scores_BV` must be log-probabilities.

    Those are never positive, so the penalty always lowers; on raw logits (Keskar et al. 2019, section 4.1)
    its sign would depend on a constant that softmax ignores.
    """
    return torch.where(counts_BV > 0, scores_BV * penalty, scores_BV)


def penalise_presence(scores_BV: Tensor, counts_BV: Tensor, presence: float, frequency: float) -> Tensor:
    """Scores less `presence` for written tokens and less `frequency` for each time they were written (OpenAI API reference)."""
    return scores_BV - presence * (counts_BV > 0).to(scores_BV.dtype) - frequency * counts_BV.to(scores_BV.dtype)


def forbid_repeated_ngrams(scores_BV: Tensor, written_BT: Tensor, length: int) -> Tensor:
    """Scores without the tokens that would end a run of `length` tokens which the row holds already (Paulus et al. 2018, section 2.5).

    A row that would lose every token keeps them all. `written_BT`: padding, -1, stands on the left.
    """
    begun = length - 1
    if written_BT.shape[1] <= begun:
        return scores_BV
    windows_BW = written_BT.unfold(1, length, 1)
    alike_BW = (windows_BW[..., :begun] == written_BT[:, None, written_BT.shape[1] - begun :]).all(dim=-1)
    enders_BW = torch.where(alike_BW, windows_BW[..., -1], -1)
    banned_BV = count(enders_BW, scores_BV.shape[-1]) > 0
    filtered_BV = scores_BV.masked_fill(banned_BV, -math.inf)
    return torch.where(filtered_BV.isneginf().all(dim=-1, keepdim=True), scores_BV, filtered_BV)


def likeliest(scores_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of each row and their ids, both `(B, count)` (top-k: Fan et al. 2018); also among ties exactly so many."""
    highest = scores_BV.topk(min(count, scores_BV.shape[-1]), dim=-1)
    return highest.values, highest.indices


def keep_top_p(scores_BV: Tensor, mass: float) -> Tensor:
    """Scores of the fewest likeliest tokens that together have probability `mass` (Holtzman et al. 2020); all at 1."""
    if mass >= 1:
        return scores_BV
    if scores_BV.shape[-1] > FEW:
        # To sort a large vocabulary takes longer than all other filters together, and mostly a few tokens hold the mass.
        highest = scores_BV.double().softmax(dim=-1).topk(FEW, dim=-1)
        if bool((highest.values.sum(dim=-1) >= mass).all()):
            return _keep_first(scores_BV, highest.indices, mass)
    return _keep_first(scores_BV, scores_BV.argsort(dim=-1, descending=True, stable=True), mass)


def keep_min_p(scores_BV: Tensor, share: float) -> Tensor:
    """Scores of the tokens at least `share` times as likely as the likeliest (Nguyen et al. 2024)."""
    floor_B1 = scores_BV.amax(dim=-1, keepdim=True) + math.log(share)
    return scores_BV.masked_fill(scores_BV < floor_B1, -math.inf)


def keep_typical(scores_BV: Tensor, mass: float) -> Tensor:
    """Scores of the fewest tokens of total probability `mass` whose information is nearest to the entropy (Meister et al. 2023, eq. 10)."""
    if mass >= 1:
        return scores_BV
    information_BV = -scores_BV.log_softmax(dim=-1)
    entropy_B1 = torch.where(information_BV.isinf(), 0.0, information_BV.neg().exp() * information_BV).sum(dim=-1, keepdim=True)
    return _keep_first(scores_BV, (information_BV - entropy_B1).abs().argsort(dim=-1, stable=True), mass)


def _keep_first(scores_BV: Tensor, order_BC: Tensor, mass: float) -> Tensor:
    """Scores of the first tokens in `order_BC` that together have probability `mass`."""
    probabilities_BC = scores_BV.double().softmax(dim=-1).gather(-1, order_BC)
    # A token stays while those before it fall short of the mass; before the first there is exactly 0, so it always stays.
    short_BC = probabilities_BC.cumsum(dim=-1) - probabilities_BC < mass
    kept_BC = scores_BV.gather(-1, order_BC).masked_fill(~short_BC, -math.inf)
    return torch.full_like(scores_BV, -math.inf).scatter_(-1, order_BC, kept_BC)
