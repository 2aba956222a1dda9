"""Each objective asks for what it says, gives back the text it was made of, and is the same again for the same seed and number."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sickbay.reference.data.objectives import MaskedToken, NextToken, SpanCorruption, segments
from sickbay.reference.data.pairs import Translation

VOCAB = 50


def rows_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_the_next_token_is_asked_for() -> None:
    rows = rows_of(2, 6)
    (ids,), targets = NextToken()(rows, 0)
    assert torch.equal(ids, rows[:, :5])
    assert torch.equal(targets, rows[:, 1:])


@given(st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 99))
def test_masking_asks_for_its_share_and_leaves_the_rest_alone(length: int, share: float, number: int) -> None:
    rows = rows_of(5, length, seed=number)
    rows[0] = 7
    (ids,), targets = MaskedToken(VOCAB, share=share, special=(7, 8))(rows, number)
    asked = targets != -100
    real = ((rows != 7) & (rows != 8)).sum(1)
    assert asked.sum(1).tolist() == [min(int(n), max(1, round(share * int(n)))) for n in real]
    assert torch.equal(targets[asked], rows[asked])
    assert torch.equal(ids[~asked], rows[~asked])
    assert not asked[(rows == 7) | (rows == 8)].any()
    assert not asked[0].any()
    assert set(ids[asked].tolist()) <= set(range(VOCAB + 1)) - {7, 8}


def test_masking_is_80_10_10() -> None:
    rows = torch.full((200, 200), 3)
    objective = MaskedToken(VOCAB, special=(0,))
    (ids,), targets = objective(rows, 0)
    asked = ids[targets != -100]
    shares = [
        (asked == objective.mask_id).float().mean(),
        ((asked != objective.mask_id) & (asked != 3)).float().mean(),
        (asked == 3).float().mean(),
    ]
    # 6,000 draws: standard errors of at most 0.0052; one random token in 49 is the token itself.
    assert [float(share) for share in shares] == pytest.approx([0.8, 0.098, 0.102], abs=0.02)
    swapped = asked[(asked != objective.mask_id) & (asked != 3)]
    assert set(swapped.tolist()) == set(range(1, VOCAB)) - {3}


def restored(source: list[int], target: list[int], objective: SpanCorruption) -> list[int]:
    """The row that source and target (each cut at its sentinels) say."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token > objective.begin_id:
            spans[token] = current = []
        else:
            current.append(token)
    return list(itertools.chain.from_iterable(spans.get(token, [token]) for token in source))


@given(st.integers(2, 80), st.floats(0.01, 0.99), st.floats(1, 6), st.integers(0, 99))
def test_a_corrupted_row_and_its_spans_are_the_row(length: int, share: float, mean_span: float, number: int) -> None:
    objective, rows = SpanCorruption(VOCAB, share=share, mean_span=mean_span), rows_of(3, length, seed=number)
    (source, read), targets = objective(rows, number)
    hidden, spans = objective.cut(length)
    assert [tuple(part.shape) for part in (source, targets)] == [(3, n) for n in objective.lengths(length)]
    assert torch.equal(read[:, 1:], targets[:, :-1])
    assert (read[:, 0] == objective.begin_id).all()
    sentinels = [objective.sentinel(span) for span in range(spans + 1)]
    for row, left, right in zip(rows.tolist(), source.tolist(), targets.tolist()):
        assert restored(left, right, objective) == row
        assert [token for token in left if token >= VOCAB] == sentinels[:-1]
        assert [token for token in right if token >= VOCAB] == sentinels
        assert sum(token < VOCAB for token in right) == hidden
        # No two sentinels side by side: a span of nothing, or two spans that are one.
        assert not any(a >= VOCAB and b >= VOCAB for a, b in itertools.pairwise(left))
        assert not any(a >= VOCAB and b >= VOCAB for a, b in itertools.pairwise(right))


def test_the_papers_shares_are_met() -> None:
    objective = SpanCorruption(VOCAB)
    assert objective.cut(512) == (77, 26)  # Raffel et al. 2020: 15 % in spans of 3
    assert objective.lengths(512) == (461, 104)


def test_padding_of_rows_is_left_out_and_fills_up_the_results() -> None:
    objective = SpanCorruption(VOCAB, pad_id=0)
    rows = rows_of(2, 30).clamp(min=1)
    rows[1, 12:] = 0
    (source, read), targets = objective(rows, 0)
    lengths = [objective.lengths(n) for n in (30, 12)]
    assert (source != 0).sum(1).tolist() == [n for n, _ in lengths]
    assert (targets != -100).sum(1).tolist() == (read != 0).sum(1).tolist() == [n for _, n in lengths]
    for row, left, right in zip(rows.tolist(), source.tolist(), targets.tolist()):
        assert restored([t for t in left if t], [t for t in right if t != -100], objective) == [t for t in row if t]


@given(st.integers(1, 30), st.data())
def test_segments_are_positive_and_sum_up(items: int, data: Any) -> None:
    count = data.draw(st.integers(1, items))
    parts = segments(items, count, np.random.default_rng(0))
    assert len(parts) == count
    assert parts.sum() == items
    assert parts.min() >= 1


def test_all_segmentations_are_equally_likely() -> None:
    random = np.random.default_rng(0)
    seen = [tuple(segments(5, 3, random).tolist()) for _ in range(6000)]
    shares = {parts: seen.count(parts) / 6000 for parts in set(seen)}
    assert len(shares) == 6
    assert all(abs(share - 1 / 6) < 0.02 for share in shares.values())


@pytest.mark.parametrize("objective", [MaskedToken(VOCAB), SpanCorruption(VOCAB)], ids=["masked", "spans"])
def test_the_same_number_is_spoiled_alike_and_another_otherwise(objective: Any) -> None:
    rows = rows_of(4, 40)
    before = rows.clone()
    (first, *_), targets = objective(rows, 3)
    (again, *_), same = objective(rows, 3)
    (other, *_), _ = objective(rows, 4)
    assert torch.equal(rows, before)
    assert torch.equal(first, again)
    assert torch.equal(targets, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (MaskedToken, {"share": 0.0}, ["share", "0.0", "above 0 and below 1"]),
        (MaskedToken, {"special": tuple(range(VOCAB))}, ["special", "vocab_size=50"]),
        (SpanCorruption, {"share": 1.0}, ["share", "1.0"]),
        (SpanCorruption, {"mean_span": 0.5}, ["mean_span", "0.5", "at least 1"]),
        (SpanCorruption, {"sentinels": 1}, ["sentinels", "at least 2"]),
        (MaskedToken, {"seed": -1}, ["seed", "-1"]),
    ],
)
def test_an_impossible_objective_is_refused_with_field_value_and_range(kind: Any, change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        kind(VOCAB, **change)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_rows_too_short_or_with_too_many_spans_are_refused() -> None:
    with pytest.raises(ValueError, match="1 tokens; span corruption needs at least 2"):
        SpanCorruption(VOCAB)(rows_of(1, 1), 0)
    with pytest.raises(ValueError, match="needs sentinels=27"):
        SpanCorruption(VOCAB, sentinels=26)(rows_of(1, 512), 0)


def test_pairs_become_padded_rows_with_begin_and_end() -> None:
    objective = Translation(3)
    assert (objective.pad_id, objective.begin_id, objective.end_id, objective.extra_ids) == (3, 4, 5, 3)
    (source, read), targets = objective([(np.array([0, 1, 2]), np.array([2, 1])), (np.array([0]), np.array([1]))])
    assert source.tolist() == [[0, 1, 2], [0, 3, 3]]
    assert read.tolist() == [[4, 2, 1], [4, 1, 3]]
    assert targets.tolist() == [[2, 1, 5], [1, 5, -100]]


def test_each_pair_comes_once_in_an_epoch_and_a_run_resumes_by_number() -> None:
    pairs = [(np.array([n]), np.array([n])) for n in range(10)]
    objective = Translation(VOCAB)
    batches = [source for (source, _), _ in itertools.islice(objective.batches(pairs, 4, seed=1), 5)]
    order = torch.cat(batches).flatten().tolist()
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    later = [source for (source, _), _ in itertools.islice(objective.batches(pairs, 4, seed=1, first=2), 3)]
    assert all(torch.equal(a, b) for a, b in zip(batches[2:], later, strict=True))
