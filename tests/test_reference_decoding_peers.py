"""The same distributions as transformers' processors on the same logits, wherever theirs are right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from sickbay.reference.generation import filters
from sickbay.reference.generation.decoding import Decoding, penalised, sharpen


def logits_of(rows: int = 64, vocabulary: int = 50, seed: int = 0) -> Tensor:
    """Without ties: there, theirs keep all equals at the edge, and more than k tokens stay of top-k; ours keep exactly k."""
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def written(rows: int = 64, length: int = 12, vocabulary: int = 50) -> Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def distributions(mine: Tensor, other: Tensor) -> None:
    assert torch.equal(mine.isneginf(), other.isneginf())
    torch.testing.assert_close(mine.softmax(dim=-1), other.softmax(dim=-1), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_temperature(temperature: float) -> None:
    scores = logits_of()
    distributions(sharpen(scores, temperature), theirs.TemperatureLogitsWarper(temperature)(None, scores))


@pytest.mark.parametrize("count", [1, 7, 50, 99])
def test_top_k(count: int) -> None:
    scores = logits_of()
    kept, ids = filters.likeliest(scores, count)
    mine = torch.full_like(scores, -math.inf).scatter(1, ids, kept)
    distributions(mine, theirs.TopKLogitsWarper(count)(None, scores))


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 0.999])
def test_top_p(mass: float) -> None:
    scores = logits_of()
    distributions(filters.keep_top_p(scores, mass), theirs.TopPLogitsWarper(mass)(None, scores))


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_min_p(share: float) -> None:
    scores = logits_of()
    distributions(filters.keep_min_p(scores, share), theirs.MinPLogitsWarper(share)(None, scores))


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9])
def test_typical(mass: float) -> None:
    scores = logits_of()
    distributions(filters.keep_typical(scores, mass), theirs.TypicalLogitsWarper(mass)(None, scores))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_no_repeated_ngram(length: int) -> None:
    scores, ids = logits_of(vocabulary=5), written(vocabulary=5)
    other = theirs.NoRepeatNGramLogitsProcessor(length)(ids, scores.clone())
    # Where every token is forbidden theirs leave a row without any, from which nothing can be drawn; ours keep such a row whole.
    rows = ~other.isneginf().all(dim=-1)
    assert rows.any()
    distributions(filters.forbid_repeated_ngrams(scores, ids, length)[rows], other[rows])
    assert not filters.forbid_repeated_ngrams(scores, ids, length).isneginf().all(dim=-1).any()


def test_the_repetition_penalty_on_log_probabilities_where_theirs_depends_on_a_constant_that_softmax_ignores() -> None:
    scores, ids, penalty = logits_of(), written(), 1.3
    process = theirs.RepetitionPenaltyLogitsProcessor(penalty)
    mine = penalised(scores, ids, Decoding(repetition_penalty=penalty))
    # On log-probabilities, all below 0, theirs multiply by the penalty as well: the same.
    distributions(mine, process(ids, scores.log_softmax(dim=-1)))
    # On raw logits theirs divide what is above 0: the same distribution, written with another constant, is penalised differently.
    moved = process(ids, scores + 20).softmax(dim=-1)
    assert not torch.allclose(process(ids, scores).softmax(dim=-1), moved, atol=0.01)
    torch.testing.assert_close(mine.softmax(dim=-1), penalised(scores + 20, ids, Decoding(repetition_penalty=penalty)).softmax(dim=-1))


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 20, "top_p": 0.9}, {"top_k": 20, "min_p": 0.05}, {"top_p": 0.8, "typical_p": 0.9}, {"no_repeat_ngram": 2, "top_p": 0.9}],
)
def test_filters_one_after_another_in_their_order(settings: dict[str, Any]) -> None:
    scores, ids = logits_of(), written()
    decoding = Decoding(temperature=0.7, **settings)
    other = scores.clone()
    if decoding.no_repeat_ngram is not None:
        other = theirs.NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram)(ids, other)
    other = theirs.TemperatureLogitsWarper(0.7)(ids, other)
    for field, wrapper in (("top_k", theirs.TopKLogitsWarper), ("top_p", theirs.TopPLogitsWarper), ("min_p", theirs.MinPLogitsWarper)):
        if getattr(decoding, field) is not None:
            other = wrapper(getattr(decoding, field))(ids, other)
    if decoding.typical_p is not None:
        other = theirs.TypicalLogitsWarper(decoding.typical_p)(ids, other)
    distributions(filtered(scores, ids, decoding), other)


def filtered(scores: Tensor, ids: Tensor, decoding: Decoding) -> Tensor:
    from sickbay.reference.generation.decoding import shortened

    kept, chosen = shortened(scores, ids, decoding)
    return kept if chosen is None else torch.full_like(scores, -math.inf).scatter(1, chosen, kept)
