"""How the next token is chosen from a model's logits: the settings as one value, and the filters applied in one order.

Suffixes: B rows, T positions, V vocabulary, C the tokens that may still be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sickbay.reference.generation import filters
from sickbay.reference.settings.demand import demand, is_count, is_number


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen; a value outside its range raises ValueError with field, value and range.

    Applied in the order of the fields below, `temperature` after the penalties; a field at its default does nothing.
    What counts as written is the prompt and all that followed. `repetition_penalty`: log-probabilities of written tokens
    times this. `presence_penalty`, `frequency_penalty`: taken from a written token's log-probability once, and once for each
    time it was written (negative: repetition is favoured). `no_repeat_ngram`: no run of so many tokens twice.
    `temperature`: 0 = the likeliest token, 1 = the model's own distribution. `top_k`, `top_p`, `min_p`, `typical_p`: see filters.py.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int | None = None

    def __post_init__(self) -> None:
        holds = is_number(self.temperature) and self.temperature >= 0
        demand("temperature", self.temperature, holds, "at least 0 (0 = the likeliest token) and finite")
        demand("top_k", self.top_k, self.top_k is None or is_count(self.top_k), "an integer of at least 1")
        for field in ("top_p", "min_p", "typical_p"):
            share = getattr(self, field)
            demand(field, share, share is None or (is_number(share) and 0 < share <= 1), "above 0 and at most 1")
        holds = is_number(self.repetition_penalty) and self.repetition_penalty >= 1
        demand("repetition_penalty", self.repetition_penalty, holds, "at least 1 (1 = none) and finite")
        for field in ("presence_penalty", "frequency_penalty"):
            demand(field, getattr(self, field), is_number(getattr(self, field)), "a finite number (0 = none)")
        holds = self.no_repeat_ngram is None or is_count(self.no_repeat_ngram)
        demand("no_repeat_ngram", self.no_repeat_ngram, holds, "an integer of at least 1")

    @property
    def looks_back(self) -> bool:
        """Whether the choice depends on what was written beyond the logits."""
        counted = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return counted or self.no_repeat_ngram is not None


def penalised(logits_BV: Tensor, written_BT: Tensor, decoding: Decoding) -> Tensor:
    """Log-probabilities `(B, V)` float64 after all that looks back on `written_BT`, whose padding is -1.

    Raises ValueError where a row has no finite distribution.
    """
    # float64: a cumulated mass of many small probabilities rounds visibly in float32.
    scores_BV = logits_BV.double().log_softmax(dim=-1)
    demand_finite(scores_BV.amax(dim=-1))
    if decoding.looks_back:
        counts_BV = filters.count(written_BT, scores_BV.shape[-1])
        scores_BV = filters.penalise_repetition(scores_BV, counts_BV, decoding.repetition_penalty)
        scores_BV = filters.penalise_presence(scores_BV, counts_BV, decoding.presence_penalty, decoding.frequency_penalty)
        if decoding.no_repeat_ngram is not None:
            scores_BV = filters.forbid_repeated_ngrams(scores_BV, written_BT, decoding.no_repeat_ngram)
    return scores_BV


def next_token(logits_BV: Tensor, written_BT: Tensor, decoding: Decoding, uniform_B: Tensor) -> Tensor:
    """The next token `(B,)` int64 of each row.

    `written_BT`: the ids so far, -1 where a row has padding. `uniform_B`: a float64 of [0, 1) a row, which alone decides the
    draw: a row's choice depends on nothing but its own logits, text and number. Raises ValueError where a row has no finite distribution.
    """
    if decoding.temperature == 0:
        if decoding.looks_back:
            return penalised(logits_BV, written_BT, decoding).argmax(dim=-1)
        highest = logits_BV.max(dim=-1)
        demand_finite(highest.values)
        return highest.indices
    scores_BC, ids_BC = shortened(logits_BV, written_BT, decoding)
    chosen_B = draw(scores_BC, uniform_B)
    return chosen_B if ids_BC is None else ids_BC.gather(1, chosen_B[:, None]).squeeze(1)


def shortened(logits_BV: Tensor, written_BT: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor | None]:
    """Scores `(B, C)` after all filters, at a temperature above 0, and their ids `(B, C)`, None = the vocabulary's in order."""
    ids_BC = None
    if decoding.top_k is not None and not decoding.looks_back:
        # The k highest first: the rest of the vocabulary is then neither converted nor sorted.
        logits_BV, ids_BC = filters.likeliest(logits_BV, decoding.top_k)
    scores_BC = sharpen(penalised(logits_BV, written_BT, decoding), decoding.temperature)
    if decoding.top_k is not None and ids_BC is None:
        scores_BC, ids_BC = filters.likeliest(scores_BC, decoding.top_k)
    if decoding.top_p is not None:
        scores_BC = filters.keep_top_p(scores_BC, decoding.top_p)
    if decoding.min_p is not None:
        scores_BC = filters.keep_min_p(scores_BC, decoding.min_p)
    if decoding.typical_p is not None:
        scores_BC = filters.keep_typical(scores_BC, decoding.typical_p)
    return scores_BC, ids_BC


def sharpen(scores_BV: Tensor, temperature: float) -> Tensor:
    """Scores divided by `temperature` above 0, the highest of each row 0."""
    # The highest becomes 0 first, so that a tiny temperature cannot send every score to -inf.
    return (scores_BV - scores_BV.amax(dim=-1, keepdim=True)) / temperature


def draw(scores_BC: Tensor, uniform_B: Tensor) -> Tensor:
    """For each row the index `(B,)` at which the cumulated probabilities pass its number (inversion: Devroye 1986, section 3.2)."""
    cumulated_BC = scores_BC.softmax(dim=-1).cumsum(dim=-1)
    total_B1 = cumulated_BC[:, -1:]
    index_B = torch.searchsorted(cumulated_BC, uniform_B[:, None] * total_B1, right=True).squeeze(1)
    # A number so near 1 that the product rounds to the total would fall behind the last token that may be drawn.
    return torch.minimum(index_B, (cumulated_BC < total_B1).sum(dim=-1))


def demand_finite(highest_B: Tensor) -> None:
    """Raises ValueError where a row's highest score says that damaged weights left nothing to choose from."""
    if not bool(highest_B.isfinite().all()):
        raise ValueError("the logits are not finite: the model's weights are damaged or its training diverged")
