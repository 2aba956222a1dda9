"""Verdicts on initialisation, depth, scale, bounds and precision from made-up charts: sick, healthy, at the threshold, too short."""

from __future__ import annotations

import math

import pytest
from charts import chart
from verdicts import ask, found, read, unexamined

from sickbay.conditions.convergence import poor_initialization
from sickbay.core.chart import Chart, Reading

# --- poor-initialization ----------------------------------------------------------------------------------------------
LN65 = math.log(65)


def gains(*values: float, trained: bool = False) -> list[Reading]:
    return [read("initial_gain", v, where=f"w{i}", rms=v / 8, fan_in=64, trained=trained) for i, v in enumerate(values)]


def first_loss(value: float, trained: bool = False) -> Chart:
    row = read("initial_loss", value, chance=LN65, classes=65, logit_std=9.0, trained=trained)
    return chart(initial_gain=gains(0.6, 0.6, 0.6, trained=trained), initial_loss=[row])


def test_a_first_loss_far_above_chance() -> None:
    assert "65 classes" in found("poor-initialization", first_loss(LN65 + 4), "warning").summary
    assert found("poor-initialization", first_loss(LN65 + 30), "critical").evidence[0].limit == pytest.approx(LN65 + 3)
    assert ask("poor-initialization", first_loss(LN65 + 3)) is None
    assert ask("poor-initialization", first_loss(LN65 + 30, trained=True)) is None


def test_weights_of_a_wrong_scale() -> None:
    assert "too small" in found("poor-initialization", chart(initial_gain=gains(0.02, 0.028, 0.028, 0.03)), "warning").summary
    assert "too large" in found("poor-initialization", chart(initial_gain=gains(0.5, 7, 8, 9)), "warning").summary
    for healthy in ((0.02, 0.1, 0.16, 0.2), (0.0, 0.0, 0.6, 1.4), (0.6, 0.6, 9.0), (0.01, 0.01)):
        assert ask("poor-initialization", chart(initial_gain=gains(*healthy))) is None
    assert ask("poor-initialization", chart(initial_gain=gains(9, 9, 9, trained=True))) is None


def units(step: int, alike: bool, count: int = 4, **note: object) -> list[Reading]:
    known = {"entry": 0.1, "zero": False, "constant": False, "no_gradient": False, **note}
    return [read("clone_units", float(alike), step, f"w{i}", **known) for i in range(count)]


def test_clones() -> None:
    def verdict(rows: list[Reading]) -> object:
        return ask("poor-initialization", chart(initial_gain=gains(0.6), clone_units=rows))

    assert verdict(units(0, True, constant=True)) is not None, "no one gives all matrices one value"
    dead = poor_initialization.diagnose(chart(clone_units=units(0, True, zero=True, constant=True, entry=0.0)))
    assert dead is not None
    assert "missing-backward" in dead.explains, "every gradient behind zeros is zero"
    assert verdict([*units(0, True), *units(4, True)]) is not None
    assert verdict([*units(0, True), *units(4, False)]) is None, "what lies behind two zeros gets its gradient later"
    assert verdict(units(1, True)) is None, "too short to tell"
    assert verdict([*units(0, False, 6), *units(0, True, 3, zero=True, constant=True)]) is None
    assert verdict([*units(0, True, 1, zero=True, no_gradient=True), *units(8, True, 1, zero=True, no_gradient=True)]) is None


def test_growth_over_normalised_blocks() -> None:
    def grown(last: float, normed: float = 9.0) -> Chart:
        rows = [read("activation_rms", value, where=f"b{i}", depth=i, blocks=4) for i, value in enumerate((1.0, 2.0, 4.0, last))]
        return chart(initial_gain=gains(0.6), activation_rms=rows, normalization_ops=[normed])

    assert "40 x" in found("poor-initialization", grown(40.0), "warning").summary
    assert ask("poor-initialization", grown(9.0)) is None
    assert ask("poor-initialization", grown(40.0, normed=0.0)) is None, "that is missing-normalization"


# --- vanishing-gradients ----------------------------------------------------------------------------------------------
def depths(values: list[float], steps: int = 6) -> Chart:
    """Matrices of norm 1 in order of depth, with the same gradients in every step."""
    profile = [read("gradient_by_depth", v, where=f"w{i}", depth=i, matrices=len(values), size=1.0) for i, v in enumerate(values)]
    norms = [Reading(step, "param_grad_norm", v, f"w{i}") for step in range(steps) for i, v in enumerate(values)]
    return chart(gradient_by_depth=profile, param_grad_norm=norms)


def test_a_fade_along_depth() -> None:
    assert "8 matrices" in found("vanishing-gradients", depths([10.0 ** (i - 7) for i in range(8)]), "warning").summary
    assert ask("vanishing-gradients", depths([2.0 ** (i - 7) for i in range(8)])) is None
    assert ask("vanishing-gradients", depths([10.0 ** (-i) for i in range(8)])) is None, "early layers with more are no fade"
    unexamined("vanishing-gradients", depths([1e-9, 1e-5, 1.0]))


def test_a_closed_gate_and_parts_that_are_merely_small() -> None:
    assert found("vanishing-gradients", depths([1.0, 2.0, 1e-15, 1.0, 3.0]), "warning").where == "w2"
    assert found("vanishing-gradients", depths([1.0, 1e-15, 1e-15, 1e-16, 3.0]), "warning").where == "w3", "most lie behind one"
    assert ask("vanishing-gradients", depths([1.0, 2.0, 1e-6, 1.0, 3.0])) is None, "LayerScale"
    assert ask("vanishing-gradients", depths([1.0, 2.0, 0.0, 1.0, 3.0])) is None, "never reached"
    assert ask("vanishing-gradients", depths([1.0, 2.0, 1e-15, 1.0, 3.0], steps=3)) is None, "too short"


def test_what_starts_at_zero_and_moves_later_is_healthy() -> None:
    values = [10.0 ** (i - 7) for i in range(8)]
    start, later = depths(values, steps=1), depths([1.0] * 8, steps=9)
    rows = [*start["param_grad_norm"], *(Reading(r.step + 1, r.signal, r.value, r.where) for r in later["param_grad_norm"])]
    assert ask("vanishing-gradients", chart(gradient_by_depth=list(start["gradient_by_depth"]), param_grad_norm=rows)) is None


# --- unscaled-data ----------------------------------------------------------------------------------------------------
def fed(value: float, normalised: bool = False) -> Chart:
    return chart(input_rms=[read("input_rms", value, where="enter", mean=0.0, std=value, normalised=normalised)])


def aimed(value: float, output: float) -> Chart:
    return chart(target_rms=[read("target_rms", value, mean=0.0, std=value, output_rms=output)])


def test_raw_inputs_and_targets() -> None:
    assert "enter" in found("unscaled-data", fed(300.0), "warning").summary
    assert "targets" in found("unscaled-data", aimed(300.0, 0.5), "warning").summary
    for healthy in (fed(1.0), fed(50.0), fed(300.0, normalised=True), aimed(1.0, 0.5), aimed(300.0, 250.0)):
        assert ask("unscaled-data", healthy) is None
    assert "only ids" in unexamined("unscaled-data", chart(loss=[1.0]))


# --- squashed-logits --------------------------------------------------------------------------------------------------
def bounded(floor: float, **sums: float) -> Chart:
    rows = [read("loss_floor", floor, chance=LN65, classes=65, op="tanh", low=-1.0, high=1.0)]
    return chart(loss_floor=rows, probability_sum=[read("probability_sum", sums.pop("value"), **sums)] if sums else [])


def test_bounded_scores_and_what_nll_loss_is_given() -> None:
    assert "cannot get below 2.27" in found("squashed-logits", bounded(2.27), "warning").summary
    assert ask("squashed-logits", bounded(0.1 * LN65)) is None
    assert ask("squashed-logits", bounded(0.0, value=1.0, largest=-0.1, least=-9.0, plain_sum=-200.0)) is None
    assert "probabilities" in found("squashed-logits", bounded(0.0, value=66.0, largest=0.9, least=0.0, plain_sum=1.0), "warning").summary
    assert "raw scores" in found("squashed-logits", bounded(0.0, value=90.0, largest=2.0, least=-2.0, plain_sum=0.3), "critical").summary


# --- low-precision-update-lost ----------------------------------------------------------------------------------------
def still(shares: list[float], rounding: float = 1.0, rates: list[float] | None = None, **note: object) -> Chart:
    known = {"dtype": "bfloat16", "exact": True, **note}
    rows = [
        read("unmoved_share", share, step, "w", elements=100, rounding=rounding, rate=(rates or [1e-4] * len(shares))[step], **known)
        for step, share in enumerate(shares)
    ]
    return chart(unmoved_share=rows)


def test_updates_that_round_to_nothing() -> None:
    assert "bfloat16" in found("low-precision-update-lost", still([0.9, 0.95, 0.9]), "warning").summary
    for healthy in (
        still([0.5, 0.5, 0.5]),
        still([0.9, 0.9, 0.9], rounding=0.1),
        still([0.9, 0.9, 0.1, 0.1]),
        still([0.9]),
        still([0.9, 0.9, 0.2, 0.2], rates=[1e-6, 1e-5, 1e-3, 1e-3]),
        still([0.9, 0.9, 0.9], dtype=""),
    ):
        assert ask("low-precision-update-lost", healthy) is None
    assert "not torch's own" in unexamined("low-precision-update-lost", still([0.9, 0.9, 0.9], exact=False))
