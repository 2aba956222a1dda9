"""The count model of token sequences: probabilities sum to one, and it finds exactly the structure that there is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sickbay.core.ngrams import Counts, NGrams, bits_per_byte, windows


def test_windows_do_not_cross_rows_and_a_negative_id_is_a_gap() -> None:
    first, second, target = windows([[5, 6, 7], [-100, 8, 9]])
    assert target.tolist() == [5, 6, 7, -1, 8, 9]
    assert second.tolist() == [-1, 5, 6, -1, -1, 8]
    assert first.tolist() == [-1, -1, 5, -1, -1, -1]


@pytest.mark.parametrize("context", [(0, 0), (3, 1), (6, 6), (-1, 4), (-1, -1)])
def test_the_probabilities_of_all_tokens_sum_to_one(context: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    model = NGrams(7)
    model.add(rng.integers(0, 6, (20, 30)))  # token 6 never comes
    everything = np.arange(7)
    losses = model.losses(np.full(7, context[0]), np.full(7, context[1]), everything)
    assert np.exp(-losses).sum(axis=1) == pytest.approx([1.0, 1.0, 1.0])


def test_a_cycle_is_certain_given_one_token_and_uniform_without() -> None:
    model = NGrams(5)
    model.add(np.tile(np.arange(5), 400))
    probe = np.tile(np.arange(5), 20)
    assert model.cross_entropy(probe, order=1) == pytest.approx(math.log(5), abs=1e-3)
    assert model.cross_entropy(probe, order=2) < 0.05
    assert model.perplexity(probe, order=2) < 1.1


def test_a_rule_over_two_tokens_is_found_by_triples_alone() -> None:
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 2, (400, 40))
    rows[:, 2:] = 0
    for column in range(2, 40):
        rows[:, column] = (rows[:, column - 1] ^ rows[:, column - 2]) ^ (rng.random(400) < 0.05)
    model = NGrams(2)
    model.add(rows[:300])
    assert model.cross_entropy(rows[300:], order=3) < 0.5 * math.log(2)
    assert model.cross_entropy(rows[300:], order=2) > 0.9 * math.log(2)


def test_noise_gives_no_context_any_advantage() -> None:
    rng = np.random.default_rng(2)
    model = NGrams(100)
    model.add(rng.integers(0, 100, 20_000))
    unseen = rng.integers(0, 100, 2_000)
    single, pair, triple = (model.cross_entropy(unseen, order) for order in (1, 2, 3))
    assert single == pytest.approx(math.log(100), abs=0.02)
    assert pair > single
    assert triple > single


def test_nothing_is_known_before_anything_was_counted() -> None:
    model = NGrams(10)
    assert model.cross_entropy([1, 2, 3]) == pytest.approx(math.log(10))
    assert math.isnan(model.cross_entropy([-1]))
    assert math.isnan(model.perplexity(np.zeros((0,), dtype=np.int64)))


def test_a_full_table_keeps_what_it_has_and_the_sum_stays_one() -> None:
    table = Counts(places=16)
    keys = np.arange(1, 1001, dtype=np.uint64)
    kept, new = table.add(keys, np.ones(1000, dtype=np.int64))
    assert 8 <= table.distinct <= 16
    assert table.of(keys).sum() == table.total == kept.sum() == new.sum()
    kept_again, new_again = table.add(keys, np.full(1000, 2, dtype=np.int64))
    assert kept_again.tolist() == kept.tolist()
    assert not new_again.any()
    assert table.of(keys).sum() == 3 * kept.sum()


def test_bits_per_byte_of_a_uniform_byte() -> None:
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2.0)
