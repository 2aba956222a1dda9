"""Decoding: from the model's logits to the next token.

Order: repetition penalty, temperature, top-k, top-p, draw. Suffixes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sickbay.reference.model import Transformer


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen; a value outside its range raises ValueError with field, value and range.

    `temperature`: 0 = the likeliest token. `top_k`, `top_p`: None = no such filter. `repetition_penalty`: 1 = none.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for field, holds, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 = the likeliest token) and finite"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 1 <= self.repetition_penalty < math.inf, "at least 1 (1 = none) and finite"),
        ):
            if not holds:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be {allowed}")


def penalise_repetition(log_probabilities_BV: Tensor, seen_BT: Tensor, penalty: float) -> Tensor:
    """Log-probabilities of the tokens in `seen_BT` times `penalty`, once for each distinct token.

    Log-probabilities are never positive, so the penalty always lowers; on raw logits (Keskar et al. 2019, section 4.1)
    its sign would depend on a constant that softmax ignores.
    """
    seen_BV = torch.zeros_like(log_probabilities_BV, dtype=torch.bool).scatter_(1, seen_BT, True)
    return torch.where(seen_BV, log_probabilities_BV * penalty, log_probabilities_BV)


def keep_top_k(scores_BV: Tensor, count: int) -> Tensor:
    """Scores with all but the `count` highest of each row at -inf (Fan et al. 2018); exactly `count` stay, also among ties."""
    highest = scores_BV.topk(min(count, scores_BV.shape[-1]), dim=-1)
    return torch.full_like(scores_BV, -math.inf).scatter_(-1, highest.indices, highest.values)


def keep_top_p(scores_BV: Tensor, mass: float) -> Tensor:
    """Scores with all but the smallest set of likeliest tokens of probability `mass` at -inf (Holtzman et al. 2020); at least one stays."""
    if mass >= 1:
        return scores_BV
    ordered = scores_BV.sort(dim=-1, descending=True, stable=True)
    probabilities_BV = ordered.values.softmax(dim=-1)
    # A token stays while those before it fall short of the mass; before the first there is exactly 0, so it always stays.
    short_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV < mass
    return torch.full_like(scores_BV, -math.inf).scatter_(-1, ordered.indices, ordered.values.masked_fill(~short_BV, -math.inf))


def next_token(logits_BV: Tensor, seen_BT: Tensor, decoding: Decoding, random: torch.Generator | None = None) -> Tensor:
    """The next token `(B,)` int64 of each row. Raises ValueError where a row has no finite distribution."""
    # float64: in float32 a temperature below 1e-45 is a division by zero, and a cumulated mass rounds visibly.
    scores_BV = logits_BV.double().log_softmax(dim=-1)
    if scores_BV.isnan().any():
        raise ValueError("the logits are not finite: the model's weights are damaged or its training diverged")
    scores_BV = penalise_repetition(scores_BV, seen_BT, decoding.repetition_penalty)
    if decoding.temperature == 0:
        return scores_BV.argmax(dim=-1)
    # The highest becomes 0 first, so that a tiny temperature cannot send every score to -inf.
    scores_BV = (scores_BV - scores_BV.amax(dim=-1, keepdim=True)) / decoding.temperature
    if decoding.top_k is not None:
        scores_BV = keep_top_k(scores_BV, decoding.top_k)
    if decoding.top_p is not None:
        scores_BV = keep_top_p(scores_BV, decoding.top_p)
    return torch.multinomial(scores_BV.softmax(dim=-1), 1, generator=random).squeeze(1)


@torch.no_grad()
def generate(model: Transformer, ids_BT: Tensor, count: int, decoding: Decoding, random: torch.Generator | None = None) -> Iterator[Tensor]:
    """Yields `count` times the next token `(B,)` after `ids_BT` `(B, T)`, T at least 1, each seeing the last `context` tokens.

    Runs the same forward pass as training, in evaluation mode; the model's mode is restored at the end.
    """
    was_training = model.training
    model.eval()
    try:
        for _ in range(count):
            logits_BV = model(ids_BT[:, -model.config.context :])[:, -1]
            chosen_B = next_token(logits_BV, ids_BT, decoding, random)
            ids_BT = torch.cat((ids_BT, chosen_B[:, None]), dim=1)
            yield chosen_B
    finally:
        model.train(was_training)
