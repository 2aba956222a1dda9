"""What a ranking loss asks for, where the targets are no classes but embedded items whose score is to rise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exam_models import D, Model, T, V, answers, padded, patient_of, text
from torch import Tensor, nn

from sickbay.exams.scored import scored_targets


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _bce(good: Tensor, bad: Tensor) -> Tensor:
    wanted = torch.cat([torch.ones_like(good), torch.zeros_like(bad)])
    return F.binary_cross_entropy_with_logits(torch.cat([good, bad]), wanted)


RANKINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": _bce,
    "bpr": lambda good, bad: -F.logsigmoid(good - bad).mean(),
    "by hand": lambda good, bad: -(torch.sigmoid(good) + 1e-8).log().mean() - (1 - torch.sigmoid(bad) + 1e-8).log().mean(),
}
SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda state, rows: (state * rows).sum(-1),
    "einsum": lambda state, rows: torch.einsum("btd,btd->bt", state, rows),
    "matmul": lambda state, rows: (rows.unsqueeze(2) @ state.unsqueeze(-1)).flatten(1),
}


class Ranker(nn.Module):
    """ids `(B, T)` -> states `(B, T, D)`; with candidates, their scores, as where the model embeds them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Model()
        self.body.head = nn.Linear(D, D)
        self.tokens = self.body.tokens

    def forward(self, ids: Tensor, good: Tensor | None = None, bad: Tensor | None = None) -> Any:
        state = self.body(ids)
        if good is None or bad is None:
            return state
        return (state * self.tokens(good)).sum(-1), (state * self.tokens(bad)).sum(-1)


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_the_offset_of_scored_items(ranking: str, score: str, offset: int) -> None:
    stream, _ = text(10, T + 3)
    ids, targets, negatives = stream[:, :T].clone(), stream[:, offset : offset + T].clone(), torch.randint(3, V, (10, T))
    model = Ranker()
    patient, state = patient_of(model, ids)
    loss = RANKINGS[ranking](*(SCORES[score](state, model.tokens(items)) for items in (targets, negatives)))
    found = answers(patient, loss)
    assert found["target_offset"] == offset
    assert found.note("target_offset")["causal"]


@pytest.mark.parametrize("offset", [0, 1])
def test_a_model_that_scores_its_own_items(offset: int) -> None:
    stream, _ = text(10, T + 1)
    ids, targets = stream[:, :T].clone(), stream[:, offset : offset + T].clone()
    patient, (good, bad) = patient_of(Ranker(), ids, targets, torch.randint(3, V, (10, T)))
    assert answers(patient, _bce(good, bad))["target_offset"] == offset


@pytest.mark.parametrize("counts", [True, False])
def test_padding_among_scored_items(counts: bool) -> None:
    ids, _ = padded(10, T + 1, left=True)
    past, future = ids[:, :-1].clone(), ids[:, 1:].clone()
    model = Ranker()
    model.tokens.padding_idx = 0
    patient, state = patient_of(model, past)
    each = F.softplus(-SCORES["product"](state, model.tokens(future)))
    real = future != 0
    loss = each.mean() if counts else (each * real).sum() / real.sum()
    found = answers(patient, loss)
    assert (found["padding_counted"] > 0.1) == counts


def test_what_is_no_target() -> None:
    table = nn.Embedding(V, D)
    left, right = torch.randint(3, V, (2, 10, T))
    pairs = (table(left) * table(right)).sum(-1)
    assert not scored_targets(F.softplus(-pairs).mean()), "two inputs"
    scores = (torch.randn(10, T, D, requires_grad=True) * table(left)).sum(-1)
    assert not scored_targets(F.binary_cross_entropy_with_logits(scores, (right > 9).float())), "some are wanted low"
    assert not scored_targets(F.softplus(scores).mean()), "negatives"
    assert len(scored_targets(F.softplus(-scores).mean())) == 1


def test_scored_items_of_another_kind_have_no_offset() -> None:
    model, items = Ranker(), nn.Embedding(V, D)
    ids, _ = text()
    patient, state = patient_of(model, ids)
    found = answers(patient, F.softplus(-SCORES["product"](state, items(torch.randint(3, V, (10, T))))).mean())
    assert "target_offset" not in found and "future_influence" not in found
