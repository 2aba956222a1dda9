"""Every filter keeps its promises for all logits: mass, order, never empty, neutral values change nothing, ties."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sickbay.reference.generation import filters
from sickbay.reference.generation.decoding import Decoding, draw, next_token, sharpen

VALUES = st.one_of(st.floats(-50, 50, width=32), st.sampled_from([-1.0, 0.0, 2.0]))  # the few bring ties
LOGITS = st.lists(VALUES, min_size=2, max_size=40).map(lambda values: torch.tensor([values]))
SHARES = st.floats(1e-6, 1.0)
NOTHING = torch.zeros(1, 0, dtype=torch.long)
HALF = torch.tensor([0.5], dtype=torch.float64)

SHARE_FILTERS = (filters.keep_top_p, filters.keep_min_p, filters.keep_typical)


def log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(dim=-1)


def written(draw: Any, vocabulary: int, least: int = 1) -> Tensor:
    return torch.tensor([draw.draw(st.lists(st.integers(0, vocabulary - 1), min_size=least, max_size=12))], dtype=torch.long)


@pytest.mark.parametrize("keep", SHARE_FILTERS)
@given(logits=LOGITS, share=SHARES)
@settings(deadline=None)
def test_what_stays_is_unchanged_and_never_nothing_and_a_larger_share_keeps_more(
    keep: Callable[[Tensor, float], Tensor], logits: Tensor, share: float
) -> None:
    scores = log_probabilities(logits)
    filtered = keep(scores, share)
    kept = filtered.isfinite()
    assert kept.any()
    assert torch.equal(filtered[kept], scores[kept])
    assert filtered[~kept].isneginf().all()
    looser = keep(scores, share / 2 if keep is filters.keep_min_p else min(1.0, share * 2)).isfinite()
    assert looser[kept].all()
    removed = scores.masked_fill(~kept, -math.inf)
    assert (keep(removed, share).isfinite() <= kept).all()  # what is removed stays so


@given(LOGITS, st.integers(1, 50))
@settings(deadline=None)
def test_top_k_keeps_exactly_the_k_highest_also_among_ties(logits: Tensor, count: int) -> None:
    scores, ids = filters.likeliest(logits, count)
    assert scores.shape == ids.shape == (1, min(count, logits.shape[1]))
    assert ids.unique().numel() == ids.numel()
    assert torch.equal(logits.gather(1, ids), scores)
    left = torch.ones_like(logits, dtype=torch.bool).scatter(1, ids, False)
    assert not left.any() or scores.min() >= logits[left].max()


@given(LOGITS, SHARES)
@settings(deadline=None)
def test_top_p_keeps_the_smallest_set_of_likeliest_that_holds_the_mass(logits: Tensor, mass: float) -> None:
    scores = log_probabilities(logits)
    kept, probabilities = filters.keep_top_p(scores, mass)[0].isfinite(), scores[0].exp()
    held = probabilities[kept].sum().item()
    assert held >= mass - 1e-9
    if int(kept.sum()) > 1:
        assert held - probabilities[kept].min().item() < mass + 1e-9
    if not kept.all():
        assert probabilities[kept].min() >= probabilities[~kept].max()


@given(LOGITS, SHARES)
@settings(deadline=None)
def test_min_p_keeps_what_is_at_least_so_likely_as_a_share_of_the_likeliest(logits: Tensor, share: float) -> None:
    scores = log_probabilities(logits)
    kept, probabilities = filters.keep_min_p(scores, share)[0].isfinite(), scores[0].exp()
    floor = share * probabilities.max()
    assert (probabilities[kept] >= floor * (1 - 1e-9)).all()
    assert (probabilities[~kept] <= floor * (1 + 1e-9)).all()
    assert kept[scores[0] == scores[0].max()].all()


@given(LOGITS, SHARES)
@settings(deadline=None)
def test_typical_keeps_the_smallest_set_nearest_to_the_entropy_that_holds_the_mass(logits: Tensor, mass: float) -> None:
    scores = log_probabilities(logits)
    kept, probabilities = filters.keep_typical(scores, mass)[0].isfinite(), scores[0].exp()
    entropy = -(probabilities * scores[0]).sum()
    distance = (-scores[0] - entropy).abs()
    held = probabilities[kept].sum().item()
    assert held >= mass - 1e-9
    if int(kept.sum()) > 1:
        assert held - probabilities[distance == distance[kept].max()].min().item() < mass + 1e-9
    if not kept.all():
        assert distance[kept].max() <= distance[~kept].min() + 1e-9


def test_top_p_and_typical_of_one_are_no_filters_and_tiny_ones_keep_one_token() -> None:
    scores = log_probabilities(torch.tensor([[0.0, 5.0, -40.0, 1.0]]))
    assert torch.equal(filters.keep_top_p(scores, 1.0), scores)
    assert torch.equal(filters.keep_typical(scores, 1.0), scores)
    assert filters.keep_top_p(scores, 1e-9)[0].isfinite().tolist() == [False, True, False, False]
    assert int(filters.keep_typical(scores, 1e-9).isfinite().sum()) == 1
    assert filters.keep_min_p(scores, 1.0)[0].isfinite().tolist() == [False, True, False, False]


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_large_vocabulary_is_cut_as_a_small_one_whether_few_tokens_hold_the_mass_or_many(spread: float) -> None:
    scores = log_probabilities(torch.randn(3, 4 * filters.FEW, generator=torch.Generator().manual_seed(0)) * spread)
    kept = filters.keep_top_p(scores, 0.6).isfinite()
    assert (kept.sum(dim=-1) > filters.FEW).all() if spread < 1 else (kept.sum(dim=-1) < filters.FEW).all()
    for row, probabilities in zip(kept, scores.exp()):
        ordered = probabilities.sort(descending=True).values
        fewest = int((ordered.cumsum(0) < 0.6).sum()) + 1
        assert int(row.sum()) == fewest
        assert probabilities[row].min() == ordered[fewest - 1]


def test_equal_tokens_are_kept_in_their_order_until_the_mass_is_there() -> None:
    even = torch.zeros(1, 4, dtype=torch.float64)
    assert filters.keep_top_p(even, 0.5)[0].isfinite().tolist() == [True, True, False, False]
    assert filters.keep_typical(even, 0.75)[0].isfinite().tolist() == [True, True, True, False]
    assert filters.keep_min_p(even, 1.0).isfinite().all()


def test_typical_leaves_out_a_likeliest_token_that_says_too_little() -> None:
    probabilities = torch.tensor([[0.6, 0.2, 0.2]], dtype=torch.float64)  # entropy 0.95: 0.51 is 0.44 away, 1.61 is 0.66 away
    assert filters.keep_typical(probabilities.log(), 0.5)[0].isfinite().tolist() == [True, False, False]
    flat = torch.tensor([[0.4, *[0.05] * 12]], dtype=torch.float64)  # entropy 2.16: 0.92 is 1.25 away, 3.00 is 0.83 away
    assert filters.keep_typical(flat.log(), 0.5)[0].isfinite().tolist() == [False, *[True] * 10, False, False]


@given(LOGITS, st.floats(1.0, 5.0), st.floats(-30, 30), st.data())
@settings(deadline=None)
def test_the_repetition_penalty_lowers_once_per_distinct_token_whatever_constant_the_logits_carry(
    logits: Tensor, penalty: float, shift: float, data: Any
) -> None:
    seen = written(data, logits.shape[1])
    scores = log_probabilities(logits)
    counts = filters.count(seen, logits.shape[1])
    once = filters.penalise_repetition(scores, counts, penalty)
    assert (once <= scores).all()
    assert torch.equal(once, filters.penalise_repetition(scores, filters.count(torch.cat((seen, seen), dim=1), logits.shape[1]), penalty))
    unseen = torch.ones(logits.shape[1], dtype=torch.bool)
    unseen[seen[0]] = False
    assert torch.equal(once[0, unseen], scores[0, unseen])
    torch.testing.assert_close(once[0, ~unseen], scores[0, ~unseen] * penalty)
    shifted = filters.penalise_repetition(log_probabilities(logits.double() + shift), counts, penalty)
    torch.testing.assert_close(shifted, once, atol=1e-9, rtol=1e-9)


@given(LOGITS, st.floats(-2, 2), st.floats(-2, 2), st.data())
@settings(deadline=None)
def test_presence_is_taken_once_and_frequency_each_time(logits: Tensor, presence: float, frequency: float, data: Any) -> None:
    seen = written(data, logits.shape[1])
    lowered = log_probabilities(logits) - filters.penalise_presence(
        log_probabilities(logits), filters.count(seen, logits.shape[1]), presence, frequency
    )
    for token in range(logits.shape[1]):
        times = seen[0].tolist().count(token)
        assert lowered[0, token].item() == pytest.approx(presence * (times > 0) + frequency * times, abs=1e-9)


def test_padding_is_not_counted() -> None:
    assert filters.count(torch.tensor([[-1, -1, 2], [2, 0, 2]]), 3).tolist() == [[0, 0, 1], [1, 0, 2]]


@given(st.integers(1, 4), st.integers(0, 3), st.data())
@settings(deadline=None)
def test_exactly_the_tokens_that_would_repeat_an_ngram_are_forbidden(length: int, padding: int, data: Any) -> None:
    vocabulary = 3
    row = written(data, vocabulary)[0].tolist()
    scores = torch.zeros(1, vocabulary)
    left = torch.tensor([[-1] * padding + row])
    there = {tuple(row[start : start + length]) for start in range(len(row) - length + 1)}
    ends = row[len(row) - length + 1 :] if length > 1 else []
    allowed = [len(ends) < length - 1 or (*ends, token) not in there for token in range(vocabulary)]
    found = filters.forbid_repeated_ngrams(scores, left, length)[0].isfinite().tolist()
    assert found == (allowed if any(allowed) else [True] * vocabulary)


def test_negative_logits_are_penalised_too() -> None:
    logits = torch.tensor([[-1.0, -1.1]])
    assert next_token(logits, torch.tensor([[0]]), Decoding(temperature=0, repetition_penalty=1.5), HALF).item() == 1


@given(LOGITS, st.floats(1e-300, 1e-4), st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_temperature_zero_is_the_likeliest_and_a_tiny_one_never_fails(logits: Tensor, temperature: float, number: float) -> None:
    likeliest = next_token(logits, NOTHING, Decoding(temperature=0), HALF).item()
    assert logits[0, int(likeliest)] == logits.max()  # which of several does not matter
    decoding = Decoding(temperature=temperature, top_k=3, top_p=0.9, min_p=0.1, typical_p=0.9)
    chosen = next_token(logits, NOTHING, decoding, torch.tensor([number], dtype=torch.float64))
    assert 0 <= chosen.item() < logits.shape[1]


@given(LOGITS.map(lambda logits: logits.round(decimals=3)), st.integers(1, 50), st.floats(0.1, 3), st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_top_k_before_the_rest_and_among_the_whole_vocabulary_choose_alike(
    logits: Tensor, count: int, temperature: float, number: float
) -> None:
    uniform = torch.tensor([number], dtype=torch.float64)
    short = next_token(logits, NOTHING, Decoding(temperature, top_k=count, top_p=0.9), uniform)
    # A penalty on nothing keeps the whole vocabulary in play until top-k.
    whole = next_token(logits, NOTHING, Decoding(temperature, top_k=count, top_p=0.9, repetition_penalty=2.0), uniform)
    assert logits[0, short] == logits[0, whole]


@given(LOGITS, st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_a_removed_token_is_never_drawn_and_each_has_its_own_stretch_of_the_numbers(logits: Tensor, number: float) -> None:
    scores = log_probabilities(logits)
    scores[0, 0] = -math.inf
    chosen = int(draw(scores, torch.tensor([number], dtype=torch.float64)))
    probabilities = scores[0].softmax(dim=-1)
    assert probabilities[chosen] > 0
    assert probabilities[:chosen].sum() <= number + 1e-9
    assert probabilities[: chosen + 1].sum() >= number - 1e-9


def test_the_largest_number_below_one_draws_a_token_that_may_be_drawn() -> None:
    scores = torch.tensor([[0.0, 0.1, 0.2, -math.inf, -math.inf]], dtype=torch.float64)
    assert draw(scores, torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)).item() == 2


def test_drawn_tokens_follow_the_model_at_temperature_one_and_sharpen_below() -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits, nothing = probabilities.log().expand(20_000, 3), NOTHING.expand(20_000, 0)
    shares = next_token(logits, nothing, Decoding(temperature=1.0), uniform).bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)  # 4 standard errors
    sharp = next_token(logits, nothing, Decoding(temperature=0.5), uniform).bincount(minlength=3) / 20_000
    torch.testing.assert_close(sharp, probabilities**2 / (probabilities**2).sum(), atol=0.015, rtol=0)


@given(LOGITS, st.floats(0.05, 5))
@settings(deadline=None)
def test_temperature_keeps_the_order(logits: Tensor, temperature: float) -> None:
    scores = log_probabilities(logits)[0]
    sharpened = sharpen(scores[None], temperature)[0]
    assert sharpened.max() == 0
    assert (sharpened[scores.argsort()].diff() >= 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": -0.1}, ["temperature", "-0.1", "at least 0"]),
        ({"temperature": math.nan}, ["temperature", "nan"]),
        ({"temperature": math.inf}, ["temperature", "inf", "finite"]),
        ({"top_k": 0}, ["top_k", "0", "at least 1"]),
        ({"top_k": 2.5}, ["top_k", "2.5", "integer"]),
        ({"top_p": 0.0}, ["top_p", "above 0"]),
        ({"top_p": 1.1}, ["top_p", "1.1", "at most 1"]),
        ({"min_p": -0.5}, ["min_p", "-0.5", "above 0"]),
        ({"typical_p": 2}, ["typical_p", "2", "at most 1"]),
        ({"repetition_penalty": 0.9}, ["repetition_penalty", "0.9", "at least 1"]),
        ({"presence_penalty": math.inf}, ["presence_penalty", "inf", "finite"]),
        ({"frequency_penalty": math.nan}, ["frequency_penalty", "nan", "finite"]),
        ({"no_repeat_ngram": 0}, ["no_repeat_ngram", "0", "at least 1"]),
    ],
)
def test_impossible_settings_are_refused_with_field_value_and_range(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        Decoding(**change)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("decoding", [Decoding(), Decoding(temperature=0), Decoding(top_k=1), Decoding(repetition_penalty=2)])
def test_damaged_weights_are_named_instead_of_sampled(bad: float, decoding: Decoding) -> None:
    with pytest.raises(ValueError, match="not finite"):
        next_token(torch.tensor([[0.0, bad]]), NOTHING, decoding, HALF)
