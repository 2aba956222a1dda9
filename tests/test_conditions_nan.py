"""The nan chapter's conditions that judge a course of training: sick, healthy, at the threshold, too short, NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from charts import chart
from judging import alarms, finding, tensors, verdict, wobble

from sickbay.core.chart import Chart, Reading

NAN, INF = math.nan, math.inf


# --- exploding-gradients --------------------------------------------------------------------------------------------


def test_gradients_that_run_away_with_the_loss_explode() -> None:
    sick = chart(grad_norm=[*wobble(20, 1.0), 12, 40, 300, 4e4], loss=[*wobble(20), 3.4, 5.0, 9.0, 40.0])
    found = finding("exploding-gradients", sick)
    assert (found.step, found.severity, found.certainty) == (20, "critical", "confirmed")
    assert found.evidence[0].reading.value == 4e4
    assert found.evidence[0].limit == pytest.approx(10.0, rel=0.05)
    assert "the loss went from 3 to" in found.summary


def test_an_explosion_within_five_steps_from_huge_gradients_is_seen() -> None:
    sick = chart(grad_norm=[2.9e4, 3.5e4, 4e5, 2.5e7, 7e9, NAN, NAN], loss=[4e4, 5e4, 5e5, 5e8, 6e12, NAN, NAN])
    assert "overflowed at step 5" in finding("exploding-gradients", sick).summary


def test_where_names_the_tensor_with_the_largest_gradient() -> None:
    rows = tensors("param_grad_norm", {"h.0.w": [1.0] * 24, "h.3.w": [1.0] * 20 + [11, 39, 290, 3e4]})
    sick = chart(grad_norm=[*wobble(20, 1.0), 12, 40, 300, 4e4], loss=[*wobble(20), 5, 9, 20, 40], param_grad_norm=rows)
    assert finding("exploding-gradients", sick).where == "h.3.w"


@pytest.mark.parametrize(
    ("why", "readings"),
    [
        (
            "the norm rises 25 times while the loss falls",
            {"grad_norm": [0.6 * 1.1**i for i in range(40)], "loss": [4 * 0.95**i for i in range(40)]},
        ),
        ("large at first, then falling", {"grad_norm": [2e4 * 0.9**i for i in range(40)], "loss": [60 * 0.95**i for i in range(40)]}),
        ("a summed loss has large norms", {"grad_norm": wobble(40, 1300, 400), "loss": wobble(40, 2000, 100)}),
        (
            "a transient comes back",
            {"grad_norm": [*wobble(30, 1.0), 12, 40, 90, *wobble(40, 1.0)], "loss": [*wobble(30), 4, 7, 6, *wobble(40)]},
        ),
        ("one wild step", {"grad_norm": [*wobble(30, 1.0), 500, *wobble(10, 1.0)], "loss": [*wobble(30), 9, *wobble(10)]}),
        ("a toy run", {"grad_norm": [9.0, 6.0, 4.0, 3.0, 2.0], "loss": [4.2, 4.0, 3.8, 3.7, 3.6]}),
        ("exactly ten times", {"grad_norm": [1.0] * 20 + [10.0] * 20, "loss": [3.0] * 20 + [9.0] * 20}),
        ("no reading but NaN", {"grad_norm": [NAN] * 9, "loss": [NAN] * 9}),
        ("one step", {"grad_norm": [1e9], "loss": [3.0]}),
    ],
)
def test_gradients_that_do_no_harm_do_not_explode(why: str, readings: dict[str, Any]) -> None:
    assert verdict("exploding-gradients", chart(**readings)) is None, why


def test_just_beyond_ten_times_explodes() -> None:
    sick = chart(grad_norm=[1.0] * 20 + [10.01] * 20, loss=[3.0] * 20 + [9.0] * 20)
    assert finding("exploding-gradients", sick).step == 20


def test_steps_that_the_scaler_skipped_do_not_count() -> None:
    norms, skips = [INF, INF, INF, 1.0, 1.0, 1.0], [1, 1, 1, 0, 0, 0]
    assert verdict("exploding-gradients", chart(grad_norm=norms, skipped_step=skips, loss=wobble(6))) is None


def two_trainings(signal: str, first: Sequence[float], second: Sequence[float]) -> list[Reading]:
    """Readings of one process that trains twice, each time from a line of its own."""
    lines = ["train.py:10"] * len(first) + ["train.py:40"] * len(second)
    return [Reading(step, signal, value, source=line) for step, (value, line) in enumerate(zip([*first, *second], lines))]


def test_a_second_training_has_a_history_of_its_own() -> None:
    falling = [4.0 * 0.9**i for i in range(40)]
    norms = two_trainings("grad_norm", wobble(50, 0.02, 0.001), [10.0 * 0.97**i for i in range(40)])
    losses = two_trainings("loss", wobble(50, 0.005, 0.0001), falling)
    large = updates([0.01] * 50 + [0.5, 0.3, 0.2, 0.1])
    healthy = chart(grad_norm=norms, loss=losses, **large)
    assert verdict("exploding-gradients", healthy) is None
    assert verdict("learning-rate-too-high", healthy) is None
    norms = two_trainings("grad_norm", wobble(50, 0.02, 0.001), [*wobble(20, 1.0), 12, 40, 300, 4e4])
    losses = two_trainings("loss", wobble(50, 0.005, 0.0001), [*wobble(20), 3.4, 5.0, 9.0, 40.0])
    assert finding("exploding-gradients", chart(grad_norm=norms, loss=losses)).step == 70


# --- learning-rate-too-high -----------------------------------------------------------------------------------------

FALLING = [4.2 * 0.95**index for index in range(60)]


def updates(ratios: Sequence[float], names: Sequence[str] = ("h.0.attn.weight", "h.0.mlp.weight", "h.1.mlp.weight")) -> dict[str, Any]:
    return {
        "update_ratio": tensors("update_ratio", dict.fromkeys(names, ratios)),
        "weight_norm": tensors("weight_norm", {name: [2.0] * len(ratios) for name in names}),
    }


def test_large_updates_with_a_rising_loss() -> None:
    loss = [3.6, 3.1, 6.0, 8.0, 11.0, 17.0, 12.0, *wobble(60, 3.0)]
    found = finding("learning-rate-too-high", chart(loss=loss, learning_rate=[0.3] * 67, **updates([2.5, 1.3, 0.7, 0.4, 0.2, 0.05])))
    assert (found.step, found.severity, found.certainty) == (0, "critical", "likely")
    assert found.evidence[0].limit == 0.1
    assert "a tenth of the learning rate would settle it" in found.summary
    assert "learning rate 0.3" in found.summary


def test_a_good_model_ruined_by_fine_tuning() -> None:
    loss = [*[3.8 * 0.9**i for i in range(20)], *wobble(30, 0.7, 0.01), 1.5, 5.0, 9.0, 6.0, *wobble(20, 3.0)]
    ratios = updates([0.01] * 50 + [0.15, 0.2, 0.2])
    assert finding("learning-rate-too-high", chart(loss=loss, **ratios)).step == 50


def test_updates_that_end_in_nan() -> None:
    sick = chart(loss=[4.0, 30.0, NAN, NAN], grad_norm=[2.0, 9.0, NAN, NAN], **updates([0.5, 3.0, NAN, NAN]))
    assert "no longer finite" in finding("learning-rate-too-high", sick).summary


def attention(scores: Sequence[float], entropies: Sequence[float]) -> dict[str, Any]:
    return {
        "attention_logit_max": tensors("attention_logit_max", {"h.0.attn": scores}),
        "attention_entropy": tensors("attention_entropy", {"h.0.attn": entropies}),
    }


def test_attention_that_collapses_after_large_first_updates_is_suspected() -> None:
    large, sharp = updates([2.5, 0.65, 0.32, 0.07]), [0.99, 0.2, 0.02, 0.01]
    found = finding("learning-rate-too-high", chart(loss=FALLING, **large, **attention([0.1, 40.0, 300.0, 880.0], sharp)))
    assert (found.certainty, found.severity) == ("suspected", "warning")
    assert "attention scores grew from 0.1 to 880" in found.summary and "h.0.attn" in found.summary
    for why, healthy in {
        "ordinary updates": {**updates([0.05] * 4), **attention([0.1, 40.0, 300.0, 880.0], sharp)},
        "a sharp head of ordinary scores": {**large, **attention([0.1, 10.0, 60.0, 100.0], sharp)},
        "large scores of a head that looks around": {**large, **attention([0.1, 40.0, 300.0, 880.0], [0.99, 0.8, 0.7, 0.6])},
        "scores that were large from the start": {**large, **attention([150.0, 200.0, 600.0, 880.0], sharp)},
        "scores that came to rest": {**large, **attention([0.1, 200.0, 210.0, 220.0], sharp)},
        "too few looks": {**large, **attention([0.1, 40.0, 300.0], sharp[:3])},
    }.items():
        assert verdict("learning-rate-too-high", chart(loss=FALLING, **healthy)) is None, why


def test_a_loss_that_jumps_and_stands_after_several_large_updates_is_suspected() -> None:
    loss, large = [4.4, 4.2, 3.6, 8.0, *wobble(116, 3.2, 0.05)], updates([0.11, 0.12, 0.13, 0.16, 0.03])
    found = finding("learning-rate-too-high", chart(loss=loss, ngram_loss={100: 2.2, 110: 2.1, 119: 2.2}, **large))
    assert (found.certainty, found.severity) == ("suspected", "warning")
    assert "counting pairs and triples of tokens gives 2.2" in found.summary
    for why, readings in {
        "no jump: whatever is trained can do no more": {
            "loss": [4.4, 4.2, 3.6, 3.5, *wobble(116, 3.2, 0.05)],
            "ngram_loss": [2.2],
            **large,
        },
        "three large updates": {"loss": loss, "ngram_loss": [2.2], **updates([0.11, 0.12, 0.13, 0.03])},
        "as good as counting": {"loss": loss, "ngram_loss": [3.0], **large},
        "counting is not known": {"loss": loss, **large},
        "still falling": {"loss": [4.4 * 0.99**step for step in range(120)], "ngram_loss": [1.0], **large},
        "too short": {"loss": loss[:49], "ngram_loss": [2.2], **large},
    }.items():
        assert verdict("learning-rate-too-high", chart(**readings)) is None, why  # type: ignore[arg-type]


def test_stuck_at_a_uniform_guess_after_large_first_updates_is_suspected() -> None:
    stuck = [3.6, 3.8, 3.7, *wobble(97, 3.47, 0.01)]
    chance = [Reading(0, "chance_loss", math.log(32), note={"classes": 32})]
    found = finding("learning-rate-too-high", chart(loss=stuck, chance_loss=chance, **updates([0.08, 0.06, 0.05, 0.03])))
    assert (found.certainty, found.severity) == ("suspected", "warning")
    assert verdict("learning-rate-too-high", chart(loss=stuck[:49], chance_loss=chance, **updates([0.08, 0.06, 0.05]))) is None, "too short"
    assert verdict("learning-rate-too-high", chart(loss=stuck, **updates([0.08, 0.06, 0.05]))) is None, "chance unknown"
    assert verdict("learning-rate-too-high", chart(loss=stuck, chance_loss=chance, **updates([0.03] * 4))) is None, "at the limit"


RISING = [4.0, *[9.0] * 40]


@pytest.mark.parametrize(
    ("why", "readings"),
    [
        ("large updates of a falling loss", {"loss": FALLING, **updates([0.2, 0.2, 0.15, 0.1])}),
        ("exactly a tenth", {"loss": RISING, **updates([0.1] * 5)}),
        ("one large update", {"loss": RISING, **updates([0.5, 0.01, 0.01])}),
        ("a rise after small updates", {"loss": RISING, **updates([0.01] * 5)}),
        ("biases and norms alone", {"loss": RISING, **updates([5.0] * 5, ["h.0.attn.bias", "h.0.norm.weight"])}),
        ("NaN", {"loss": [NAN] * 5, **updates([NAN] * 5)}),
        ("too short to rise", {"loss": [4.0, 4.1], **updates([0.5, 0.5])}),
        ("a dip that recovers", {"loss": [4.0, 5.5, 5.5, 5.5, *FALLING], **updates([0.3, 0.2, 0.05])}),
    ],
)
def test_updates_that_do_no_harm(why: str, readings: dict[str, Any]) -> None:
    assert verdict("learning-rate-too-high", chart(**readings)) is None, why


def test_tensors_that_start_at_zero_have_no_relative_update() -> None:
    names = ("lora_a", "lora_b", "lora_c")
    ratios = tensors("update_ratio", {name: [INF, 1.0, 0.5, 0.3] for name in names})
    norms = tensors("weight_norm", {name: [0.0, 0.01, 0.02, 0.03] for name in names})
    assert verdict("learning-rate-too-high", chart(loss=RISING, update_ratio=ratios, weight_norm=norms)) is None


def huge_gradient(clip: float | None) -> Chart:
    """SGD at an ordinary rate behind gradients of 3e4: the update is learning rate times gradient."""
    names = ("h.0.weight", "h.1.weight")
    norms, gradients = [2.0] * 5, [3e4] * 5
    clipped = [Reading(step, "clip_norm", 3e4, note={"max_norm": clip}) for step in range(5) if clip is not None]
    return chart(
        loss=[5e4, 6e5, 5e8, 6e12, NAN],
        grad_norm=[4e4, 4e5, 4e7, 4e9, NAN],
        learning_rate=[0.005] * 5,
        weight_norm=tensors("weight_norm", dict.fromkeys(names, norms)),
        param_grad_norm=tensors("param_grad_norm", dict.fromkeys(names, gradients)),
        update_ratio=tensors("update_ratio", {name: [0.005 * 3e4 / 2.0] * 5 for name in names}),
        clip_norm=clipped,
    )


def test_huge_unclipped_gradients_are_to_blame_and_not_the_learning_rate() -> None:
    assert alarms(huge_gradient(clip=None)) == ["exploding-gradients"]
    assert alarms(huge_gradient(clip=INF)) == ["exploding-gradients"], "clip_grad_norm_ with inf only measures"
    assert alarms(huge_gradient(clip=1.0))[0] == "learning-rate-too-high", "behind a clip the update's size is the rate's"


# --- loss-spike -----------------------------------------------------------------------------------------------------

CALM = wobble(40)


def test_a_spike_led_by_the_gradient() -> None:
    loss = [*CALM, 3.0, 4.5, 5.1, 4.6, 4.2, 3.9, 3.6, 3.3, *wobble(20)]
    gradient = [*wobble(38, 0.25, 0.02), 2.4, 16, 145, 900, 80, 9, 2, 0.5, *wobble(22, 0.25, 0.02)]
    found = finding("loss-spike", chart(loss=loss, grad_norm=gradient))
    assert (found.severity, found.step) == ("warning", 38)
    assert "jumped from 3 to 5.1 at step 42" in found.summary
    assert found.evidence[0].limit is not None
    assert found.evidence[0].limit < 4.5


def test_one_bad_batch_is_a_spike_although_no_gradient_leads() -> None:
    rates = [Reading(step, "learning_rate", 1e-3, source="train.py:8") for step in range(61)]
    found = finding("loss-spike", chart(loss=[*CALM, 6.0, *wobble(20)], grad_norm=wobble(61, 1.0), learning_rate=rates))
    assert found.step == 40
    assert "back after 1 step" in found.summary


SHIFT = [*CALM, *[3.0 + 3.0 * 0.93**index for index in range(60)]]
HEAVY = [value + (0.8 if index % 9 == 5 else 0.0) for index, value in enumerate(wobble(50))]
OTHER_OPTIMIZER = [Reading(step, "learning_rate", 1e-3 if step < 40 else 1e-4, source=f"train.py:{8 + step // 40}") for step in range(61)]
RESTART_RATES = [3e-4] * 38 + [3e-3] * 62


@pytest.mark.parametrize(
    ("why", "readings"),
    [
        ("noise", {"loss": wobble(100, 3.0, 0.5)}),
        ("stays up", {"loss": [*CALM, *[6.0] * 30]}),
        ("new data: a jump without a lead that decays slowly", {"loss": SHIFT, "grad_norm": [*wobble(40, 0.2), *wobble(60, 1.5)]}),
        ("warm restart", {"loss": [*CALM, 5.0, *wobble(59)], "learning_rate": RESTART_RATES}),
        ("other data: from then on the batches differ much", {"loss": [*CALM, 8.0, 3.1, *[7.0, 4.0, 9.0, 8.0] * 10]}),
        ("the first batch of another optimizer", {"loss": [*CALM, 6.0, *wobble(20)], "learning_rate": OTHER_OPTIMIZER}),
        ("less than a tenth of the way", {"loss": [*CALM, 3.29, *wobble(20)]}),
        ("often far above its middle", {"loss": [*HEAVY, 4.6, *wobble(20)]}),
        ("too short", {"loss": [*wobble(10), 9.0, *wobble(5)]}),
        ("last step", {"loss": [*CALM, 9.0]}),
        ("NaN", {"loss": [*CALM, NAN, *wobble(20)]}),
        ("constant", {"loss": [3.0] * 60}),
    ],
)
def test_no_spike(why: str, readings: dict[str, Any]) -> None:
    assert verdict("loss-spike", chart(**readings)) is None, why
    assert verdict("exploding-gradients", chart(**readings)) is None, why
