"""The test of dependence and the recognition of made-up noise, on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from sickbay.core.independence import dependence_z, is_independent_noise, is_uniform_noise
from sickbay.core.pooled import pooled

SEEDS = pytest.mark.parametrize("seed", range(8))


@SEEDS
def test_one_column_of_many_that_tells_something_is_found_and_shuffling_it_is_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, (400, 30)).astype(float)
    y = (x[:, 3] + x[:, 7] + rng.standard_normal(400) > 2).astype(float)[:, None]
    assert dependence_z(x, y) > 4
    assert abs(dependence_z(x, y[rng.permutation(400)])) < 4


def test_what_is_constant_tells_nothing() -> None:
    x = np.random.default_rng(0).standard_normal((100, 5))
    assert dependence_z(np.ones((100, 5)), x) == 0.0
    assert dependence_z(x, np.ones((100, 1))) == 0.0
    assert dependence_z(x[:4], x[:4]) == 0.0


@SEEDS
@pytest.mark.parametrize("kinds", [2, 17, 60, 50_000])
def test_randint_looks_made_up_and_text_does_not(seed: int, kinds: int) -> None:
    rng = np.random.default_rng(seed)
    assert is_uniform_noise(rng.integers(3, 3 + kinds, 4000))
    if kinds > 2:
        assert not is_uniform_noise(np.minimum(rng.geometric(2 / kinds, 4000), kinds))


@SEEDS
def test_randn_and_rand_look_made_up_and_waves_do_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert is_independent_noise(rng.standard_normal((300, 40)))
    assert is_independent_noise(3 + 2 * rng.random((300, 40)))
    waves = np.sin(np.arange(40) * 0.2 + 6.28 * rng.random((300, 1))) + 0.1 * rng.standard_normal((300, 40))
    assert not is_independent_noise(waves)


def test_pooled_weights_by_precision() -> None:
    mean, error = pooled([(1.0, 0.1), (3.0, 0.2), (float("nan"), 0.1)])
    assert mean == pytest.approx((100 + 75) / 125)
    assert error == pytest.approx(125**-0.5)
    assert pooled([])[1] == float("inf")
