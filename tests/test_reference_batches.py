"""Batches: known by their number, shuffled without a stored order, shared out by rows, packed without crossing documents."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sickbay.core.errors import UsageError
from sickbay.reference import data
from sickbay.reference.data.shuffle import shuffled
from sickbay.reference.models.config import Config
from sickbay.reference.models.model import Transformer
from sickbay.reference.training.loss import IGNORED, next_token_loss

Stream = Callable[..., Iterator[data.Batch]]
ORDERS = [data.random_batches, data.shuffled_batches]
END = 0


def starts_of(stream: Iterator[data.Batch], batches: int) -> list[int]:
    """The first token of each row: where tokens are their own place, where the row begins."""
    return torch.cat([ids[:, 0] for ids, _ in itertools.islice(stream, batches)]).tolist()


@given(count=st.integers(1, 5000), seed=st.integers(0, 2**32), epoch=st.integers(0, 1000))
@settings(deadline=None)
def test_a_shuffle_is_a_permutation_of_any_length(count: int, seed: int, epoch: int) -> None:
    landed = shuffled(np.arange(count), count, seed, epoch)
    assert sorted(landed.tolist()) == list(range(count))
    some = np.arange(count)[:: max(1, count // 7)]
    assert shuffled(some, count, seed, epoch).tolist() == landed[some].tolist()


@pytest.mark.parametrize("count", [3, 5, 8, 12])
def test_every_place_of_a_small_shuffle_is_as_likely_as_another(count: int) -> None:
    trials = 1000
    landed = np.stack([shuffled(np.arange(count), count, seed, 0) for seed in range(trials)])
    expected = trials / count
    for place in range(count):
        seen = np.bincount(landed[:, place], minlength=count)
        # Chi-squared with count - 1 degrees of freedom: mean count - 1, six standard deviations above.
        assert ((seen - expected) ** 2 / expected).sum() < count - 1 + 6 * (2 * (count - 1)) ** 0.5


def test_neighbours_of_a_large_shuffle_land_anywhere() -> None:
    landed = shuffled(np.arange(100_000), 10**12, 7, 3).astype(np.float64) / 10**12
    assert abs(np.corrcoef(landed[:-1], landed[1:])[0, 1]) < 0.015  # 4.7 standard errors
    assert np.histogram(landed, bins=10, range=(0, 1))[0] == pytest.approx(np.full(10, 10_000), abs=480)  # 5 standard errors


@given(length=st.integers(5, 120), context=st.integers(1, 9), batch=st.integers(1, 7), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_each_window_comes_once_in_an_epoch_and_no_two_share_a_token(length: int, context: int, batch: int, seed: int) -> None:
    if length < context + 1:
        return
    count, left_over = divmod(length - 1, context)
    epochs = 3
    starts = starts_of(data.shuffled_batches(np.arange(length), context, batch, seed), -(-count * epochs // batch))
    for epoch in range(epochs):
        inside = sorted(starts[epoch * count : (epoch + 1) * count])
        assert inside == list(range(inside[0], inside[0] + count * context, context))
        assert 0 <= inside[0] <= left_over


def test_epochs_differ_in_order_and_seeds_too() -> None:
    tokens = np.arange(1001)
    orders = [
        tuple(starts_of(data.shuffled_batches(tokens, 10, 100, seed, first), 1)) for seed, first in itertools.product(range(3), range(3))
    ]
    assert len(set(orders)) == 9
    assert all(sorted(order) == list(range(0, 1000, 10)) for order in orders)


@pytest.mark.parametrize("stream", ORDERS)
@given(first=st.integers(0, 60), batch=st.integers(1, 5), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_a_stream_that_begins_later_goes_on_as_if_it_had_not_stopped(stream: Stream, first: int, batch: int, seed: int) -> None:
    tokens = np.arange(90)
    whole = list(itertools.islice(stream(tokens, 8, batch, seed), first + 3))[first:]
    later = itertools.islice(stream(tokens, 8, batch, seed, first), 3)
    for (ids, targets), (later_ids, later_targets) in zip(whole, later, strict=True):
        assert torch.equal(ids, later_ids)
        assert torch.equal(targets, later_targets)


@pytest.mark.parametrize("stream", ORDERS)
@given(world=st.integers(1, 5), extra=st.integers(0, 6), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_the_rows_of_all_processes_are_the_batch_of_one(stream: Stream, world: int, extra: int, seed: int) -> None:
    tokens, batch = np.arange(90), world + extra
    alone = itertools.islice(stream(tokens, 8, batch, seed), 4)
    shares = [itertools.islice(stream(tokens, 8, batch, seed, rows=slice(rank, None, world)), 4) for rank in range(world)]
    for (ids, targets), *parts in zip(alone, *shares, strict=True):
        for whole, which in ((ids, 0), (targets, 1)):
            joined = torch.empty_like(whole)
            for rank, part in enumerate(parts):
                joined[rank::world] = part[which]
            assert torch.equal(joined, whole)


@pytest.mark.parametrize("stream", ORDERS)
def test_more_processes_than_rows_and_texts_too_short_are_refused(stream: Stream) -> None:
    with pytest.raises(ValueError, match=r"batch_size is 2; it must be at least the number of processes \(4\)"):
        next(stream(np.arange(90), 8, 2, 0, rows=slice(3, None, 4)))
    with pytest.raises(ValueError, match="context=10 needs at least 11"):
        next(stream(np.arange(10), 10, 2, 0))


@given(length=st.integers(2, 200), context=st.integers(1, 20), batch=st.integers(1, 6), world=st.integers(1, 4))
@settings(deadline=None)
def test_evaluation_predicts_every_token_but_the_first_once_whatever_the_processes(
    length: int, context: int, batch: int, world: int
) -> None:
    if length < context + 1:
        return
    predicted: list[int] = []
    counts = set()
    for rank in range(world):
        batches = list(data.spread_batches(np.arange(length), context, batch, rows=slice(rank, None, world)))
        counts.add(len(batches))
        for ids, targets in batches:
            assert ids.shape == targets.shape and ids.shape[1] == context and len(ids) >= 1
            here = targets != IGNORED
            assert torch.equal(targets[here], ids[here] + 1)
            assert bool((here[:, 1:] <= here[:, :-1]).all()), "only the end of a row is filled up"
            predicted += targets[here].tolist()
    assert len(counts) == 1
    assert sorted(predicted) == list(range(1, length))


def test_few_evaluation_rows_are_spread_evenly_and_whole() -> None:
    few = list(data.spread_batches(np.arange(105), 10, 3, most_rows=4))
    assert torch.cat([ids for ids, _ in few])[:, 0].tolist() == [0, 30, 60, 90]
    assert all(bool((targets != IGNORED).all()) for _, targets in few)


DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=20).filter(lambda texts: sum(map(len, texts)) > 0)


def packed_stream(texts: list[list[int]]) -> np.ndarray:
    return np.array([number for text in texts for number in (*text, END)])


@given(texts=DOCUMENTS, context=st.integers(1, 12))
@settings(deadline=None)
def test_packed_rows_number_their_documents_and_no_target_is_anothers(texts: list[list[int]], context: int) -> None:
    tokens = packed_stream(texts)
    if len(tokens) < context + 1:
        return
    belongs = np.repeat(np.arange(len(texts)), [len(text) + 1 for text in texts])
    begins = np.arange(len(tokens) - context)
    rows = begins[:, None] + np.arange(context)
    ids, targets = data.windows(tokens, begins, context, END)
    assert data.documents_of(ids, END).tolist() == (belongs[rows] - belongs[rows[:, :1]]).tolist()
    same = belongs[rows] == belongs[rows + 1]
    assert targets.tolist() == np.where(same, tokens[rows + 1], IGNORED).tolist()


def test_a_packed_batch_has_the_loss_of_its_documents_alone() -> None:
    torch.manual_seed(0)
    model = Transformer(Config(dim=16, num_layers=2, num_heads=2, vocab_size=10, context=24))
    texts = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2], [3, 8]]
    tokens = np.append(packed_stream(texts), 1)
    ids, targets = data.windows(tokens, np.array([0]), len(tokens) - 1, END)
    packed = next_token_loss(model, ids, targets, documents=data.documents_of(ids, END))
    total, count = torch.zeros(()), 0
    for text in texts:
        alone = torch.tensor([[*text, END]])
        total = total + next_token_loss(model, alone[:, :-1], alone[:, 1:]) * len(text)
        count += len(text)
    torch.testing.assert_close(packed, total / count)


@pytest.mark.parametrize("stream", ORDERS)
def test_packed_training_batches_are_the_plain_ones_with_fewer_targets(stream: Stream) -> None:
    tokens = packed_stream([[number % 9 + 1] * (number % 7) for number in range(60)])
    pairs = zip(stream(tokens, 8, 4, 1), stream(tokens, 8, 4, 1, end_of_text=END))
    ignored = 0
    for (ids, targets), (packed_ids, packed_targets) in itertools.islice(pairs, 10):
        assert torch.equal(ids, packed_ids)
        kept = packed_targets != IGNORED
        assert torch.equal(kept, ids != END)
        assert torch.equal(targets[kept], packed_targets[kept])
        ignored += int((~kept).sum())
    assert ignored > 0


def test_the_settings_choose_the_order() -> None:
    corpus = data.Corpus(data.CharTokenizer("ab"), np.arange(91), np.arange(30), "", 1.0, False)
    for chosen, stream in (
        (data.DataSettings(order="random"), data.random_batches),
        (data.DataSettings(order="shuffled"), data.shuffled_batches),
    ):
        expected = stream(corpus.train, 9, 4, 5, 2)
        given_batches = list(itertools.islice(data.train_batches(corpus, chosen, 9, 4, 5, 2), 3))
        assert all(torch.equal(ids, other) for (ids, _), (other, _) in zip(given_batches, expected))
    with pytest.raises(UsageError, match="packed keeps documents apart"):
        next(data.train_batches(corpus, data.DataSettings(packed=True), 9, 4, 5))
    with pytest.raises(UsageError, match="packed needs a tokenizer"):
        next(data.train_batches(dataclasses.replace(corpus, several=True), data.DataSettings(packed=True), 9, 4, 5))
