"""One evaluation's losses: a single pass stays one, two passes over unlike data are told apart."""

from __future__ import annotations

import numpy as np
import pytest

from sickbay.core.passes import highest_pass


def test_one_pass_is_its_weighted_mean() -> None:
    found = highest_pass([1.0, 1.2, 0.8, 2.0], [10, 10, 10, 1])
    assert found.mean == pytest.approx(32 / 31)
    assert found.batches == 4


def test_of_two_passes_the_higher_one_counts_whatever_their_order_and_size() -> None:
    rng = np.random.default_rng(0)
    train, val = (0.5 + 0.02 * rng.standard_normal(12)).tolist(), (2.0 + 0.05 * rng.standard_normal(5)).tolist()
    for losses in (train + val, val + train):
        found = highest_pass(losses, [1] * 17)
        assert found.batches == 5
        assert found.mean == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_slow_drift_are_one_pass(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert highest_pass((1 + 0.2 * rng.standard_normal(40)).tolist(), [1] * 40).batches == 40
    assert highest_pass((1 + 0.5 * np.linspace(0, 1, 30) + 0.05 * rng.standard_normal(30)).tolist(), [1] * 30).batches == 30


def test_one_batch_and_thousands_of_equal_ones() -> None:
    assert highest_pass([3.0], [1]).error == 0.0
    assert highest_pass([3.0] * 4096, [1] * 4096).batches == 4096
