"""Decoding keeps its promises for all logits and settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sickbay.reference.config import Config
from sickbay.reference.generate import Decoding, generate, keep_top_k, keep_top_p, next_token, penalise_repetition
from sickbay.reference.model import Transformer

LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40).map(lambda values: torch.tensor([values]))


def log_probabilities(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1)


@given(LOGITS, st.integers(1, 50))
@settings(deadline=None)
def test_top_k_keeps_exactly_the_k_highest(logits: Tensor, count: int) -> None:
    kept = keep_top_k(logits, count)[0].isfinite()
    assert int(kept.sum()) == min(count, logits.shape[1])
    if not kept.all():
        assert logits[0, kept].min() >= logits[0, ~kept].max()


@given(LOGITS, st.floats(1e-6, 1.0))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_set_that_holds_the_mass_and_never_none(logits: Tensor, mass: float) -> None:
    scores = log_probabilities(logits)
    filtered = keep_top_p(scores, mass)[0]
    kept, probabilities = filtered.isfinite(), scores[0].double().exp()
    assert kept.any()
    held = probabilities[kept].sum().item()
    assert held >= mass - 1e-5
    if int(kept.sum()) > 1:
        assert held - probabilities[kept].min().item() < mass + 1e-5
    if not kept.all():
        assert probabilities[kept].min() >= probabilities[~kept].max()


def test_top_p_of_one_is_no_filter_and_a_tiny_one_is_the_likeliest() -> None:
    scores = log_probabilities(torch.tensor([[0.0, 5.0, -40.0, 1.0]]))
    assert torch.equal(keep_top_p(scores, 1.0), scores)
    assert keep_top_p(scores, 1e-9)[0].isfinite().tolist() == [False, True, False, False]


@given(LOGITS, st.floats(1.0, 5.0), st.floats(-30, 30), st.data())
@settings(deadline=None)
def test_the_penalty_lowers_once_per_distinct_token_whatever_constant_the_logits_carry(
    logits: Tensor, penalty: float, shift: float, draw: Any
) -> None:
    seen = torch.tensor([draw.draw(st.lists(st.integers(0, logits.shape[1] - 1), min_size=1, max_size=8))])
    scores = log_probabilities(logits)
    once = penalise_repetition(scores, seen, penalty)
    assert (once <= scores).all()
    assert torch.equal(once, penalise_repetition(scores, torch.cat((seen, seen), dim=1), penalty))
    unseen = torch.ones(logits.shape[1], dtype=torch.bool)
    unseen[seen[0]] = False
    assert torch.equal(once[0, unseen], scores[0, unseen])
    torch.testing.assert_close(once[0, ~unseen], scores[0, ~unseen] * penalty)
    shifted = penalise_repetition(log_probabilities(logits + shift), seen, penalty)
    torch.testing.assert_close(shifted, once, atol=1e-3, rtol=1e-4)


def test_negative_logits_are_penalised_too() -> None:
    logits = torch.tensor([[-1.0, -1.1]])
    assert next_token(logits, torch.tensor([[0]]), Decoding(temperature=0, repetition_penalty=1.5)).item() == 1


@given(LOGITS, st.floats(1e-300, 1e-4))
@settings(deadline=None)
def test_temperature_zero_is_the_likeliest_and_a_tiny_one_never_fails(logits: Tensor, temperature: float) -> None:
    nothing = torch.zeros(1, 0, dtype=torch.long)
    likeliest = next_token(logits, nothing, Decoding(temperature=0)).item()
    assert log_probabilities(logits)[0, int(likeliest)] == log_probabilities(logits).max()  # which of several does not matter
    chosen = next_token(logits, nothing, Decoding(temperature=temperature, top_k=3, top_p=0.9))
    assert 0 <= chosen.item() < logits.shape[1]


def test_drawn_tokens_follow_the_model_at_temperature_one_and_sharpen_below() -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    logits, random = probabilities.log().expand(20_000, 3), torch.Generator().manual_seed(0)
    nothing = torch.zeros(20_000, 0, dtype=torch.long)
    shares = next_token(logits, nothing, Decoding(temperature=1.0), random).bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)  # 4 standard errors
    sharp = next_token(logits, nothing, Decoding(temperature=0.5), random).bincount(minlength=3) / 20_000
    torch.testing.assert_close(sharp, probabilities**2 / (probabilities**2).sum(), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": -0.1}, ["temperature", "-0.1", "at least 0"]),
        ({"temperature": math.nan}, ["temperature", "nan"]),
        ({"top_k": 0}, ["top_k", "0", "at least 1"]),
        ({"top_p": 0.0}, ["top_p", "above 0"]),
        ({"top_p": 1.1}, ["top_p", "1.1", "at most 1"]),
        ({"repetition_penalty": 0.9}, ["repetition_penalty", "0.9", "at least 1"]),
    ],
)
def test_impossible_settings_are_refused_with_field_value_and_range(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        Decoding(**change)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_damaged_weights_are_named_instead_of_sampled() -> None:
    with pytest.raises(ValueError, match="not finite"):
        next_token(torch.tensor([[0.0, math.nan]]), torch.zeros(1, 0, dtype=torch.long), Decoding())


def test_generation_runs_past_the_context_repeats_by_seed_and_restores_the_mode() -> None:
    torch.manual_seed(0)
    model = Transformer(Config(dim=16, num_layers=1, num_heads=2, vocab_size=11, context=8, dropout=0.5))
    start = torch.tensor([[1, 2, 3]])

    def sample(seed: int) -> list[int]:
        return [int(token) for token in generate(model, start, 30, Decoding(), torch.Generator().manual_seed(seed))]

    assert sample(1) == sample(1) != sample(2)
    assert len(sample(1)) == 30
    assert model.training
    stream = generate(model, start, 30, Decoding())
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert model.training


def test_each_generated_token_is_the_models_own_answer_to_the_text_so_far() -> None:
    torch.manual_seed(0)
    model = Transformer(Config(dim=16, num_layers=2, num_heads=2, vocab_size=11, context=16))
    ids = torch.tensor([[1, 2, 3]])
    greedy = torch.stack(list(generate(model, ids, 10, Decoding(temperature=0))), dim=1)
    whole = torch.cat((ids, greedy), dim=1)
    assert torch.equal(model(whole)[:, 2:-1].argmax(dim=-1), greedy)
