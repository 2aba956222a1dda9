"""overfitting, undertrained-model, model-too-small, unlearnable-data: sick, healthy, at the limit, too short."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from charts import chart
from judging import finding, verdict, wobble
from torch.nn.functional import cross_entropy

from sickbay.core.chart import Chart, Reading
from sickbay.core.diagnosis import NotExamined
from sickbay.patient import LossCall
from sickbay.probes.losses import per_target


def curves(validation: list[float], train: list[float], every: int = 20, **more: Any) -> Chart:
    """An evaluation every `every` steps beside a training loss that goes through `train` in equal parts."""
    steps = every * len(validation)
    losses = [train[min(len(train) - 1, step * len(train) // steps)] for step in range(steps)]
    return chart(train_loss=losses, validation_loss={(i + 1) * every: value for i, value in enumerate(validation)}, **more)


FALLING = [3.0, 2.5, 2.0, 1.5, 1.0, 0.7, 0.5, 0.4]


# --- overfitting ------------------------------------------------------------------------------------------------------
def test_validation_that_turns_while_training_falls_is_overfitting() -> None:
    found = finding("overfitting", curves([3.0, 2.6, 2.4, 2.5, 2.7, 2.9, 3.1, 3.3], FALLING))
    assert (found.severity, found.step) == ("warning", 60)
    assert "2.4 at step 60 to 3.3" in found.summary


def test_a_small_rise_is_a_note() -> None:
    assert finding("overfitting", curves([3.0, 2.6, 2.5, 2.5, 2.53, 2.56, 2.58, 2.6], FALLING)).severity == "note"


@pytest.mark.parametrize(
    ("validation", "train"),
    [
        ([3.0, 2.6, 2.3, 2.1, 1.9, 1.8, 1.75, 1.7], FALLING),  # falls
        ([3.0, 2.6, 2.3, 2.1, 2.0, 2.0, 2.0, 2.0], FALLING),  # stands
        ([3.0, 2.6, 2.4, 2.3, 2.2, 2.2, 2.2, 2.9], FALLING),  # one wild evaluation at the end
        ([3.0, 2.2, 2.6, 2.1, 2.5, 2.2, 2.6, 2.3], FALLING),  # noise
        ([3.0, 2.6, 2.4, 2.6, 2.8, 3.0, 3.2, 3.4], [3.0, 2.5, 2.3, 2.4, 2.6, 2.8, 3.0, 3.2]),  # both rise
        ([3.0, 2.0, 1.5, 2.0, 2.6, 2.4, 2.0, 1.4], FALLING),  # rises and falls again
        ([-3.0, -2.6, -2.4, -2.5, -2.7, -2.9, -3.1, -3.3], FALLING),  # no loss that could rise by a share
    ],
)
def test_what_is_no_overfitting(validation: list[float], train: list[float]) -> None:
    answer = verdict("overfitting", curves(validation, train))
    assert answer is None or (validation[0] < 0 and isinstance(answer, NotExamined))


def test_four_evaluations_are_too_few() -> None:
    assert isinstance(verdict("overfitting", curves([2.0, 1.5, 2.0, 3.0], FALLING)), NotExamined)


def test_one_kept_batch_is_fitted_on_purpose() -> None:
    repeats = [Reading(step, "batch_repeat", 1.0, note={"same_object": True}) for step in range(160)]
    sick = curves([3.0, 2.6, 2.4, 2.5, 2.7, 2.9, 3.1, 3.3], FALLING, batch_repeat=repeats)
    assert finding("overfitting", sick).severity == "note"


# --- undertrained-model, model-too-small --------------------------------------------------------------------------------
def counted(best: float, single: float, count: int = 10, model: float = 3.0) -> list[Reading]:
    note = {"unigram": single, "bigram": best, "trigram": best + 0.1, "model": model, "tokens": 5000, "counted": 500}
    return [Reading(step, "ngram_loss", best, note=note) for step in range(count)]


def test_a_loss_above_pairs_is_a_note_and_below_them_is_none() -> None:
    above = finding("undertrained-model", chart(train_loss=[3.5, *[2.9] * 30], ngram_loss=counted(2.5, 3.3)))
    assert above.severity == "note"
    assert "neighbouring tokens gives 2.5" in above.summary
    assert verdict("undertrained-model", chart(train_loss=[2.5 * 1.05] * 30, ngram_loss=counted(2.5, 3.3))) is None


def test_a_loss_that_is_a_sum_over_tokens_is_judged_by_its_mean() -> None:
    above = finding("undertrained-model", chart(train_loss=[750 * 2.9] * 30, ngram_loss=counted(2.5, 3.3, model=2.9)))
    assert "the loss is 2.9 nats" in above.summary
    assert verdict("undertrained-model", chart(train_loss=[750 * 2.5] * 30, ngram_loss=counted(2.5, 3.3, model=2.5))) is None


def test_a_long_run_that_has_not_learned_frequencies_is_a_warning_and_a_short_one_a_note() -> None:
    for steps, severity in ((300, "warning"), (299, "note")):
        found = finding("undertrained-model", chart(train_loss=[4.0] * steps, ngram_loss=counted(2.5, 3.3)))
        assert found.severity == severity
        assert "single tokens alone gives 3.3" in found.summary


def test_noise_and_too_few_counts_are_not_judged() -> None:
    noise = verdict("undertrained-model", chart(train_loss=[4.2] * 400, ngram_loss=counted(4.15, 4.17)))
    assert isinstance(noise, NotExamined)
    assert "no structure" in noise.reason
    assert isinstance(verdict("undertrained-model", chart(train_loss=[4.2] * 400, ngram_loss=counted(2.5, 3.3, count=3))), NotExamined)


@pytest.mark.parametrize(
    ("level", "validation", "found"),
    [(2.8, 2.82, True), (2.8, 3.1, False), (2.5, 2.52, False), (3.3, 3.31, False)],
    ids=["stands", "parted", "below counting", "nothing learned"],
)
def test_model_too_small(level: float, validation: float, found: bool) -> None:
    losses = [4.0 - (4.0 - level) * min(1.0, step / 100) for step in range(300)]
    readings = chart(train_loss=losses, validation_loss={100: validation, 200: validation, 300: validation}, ngram_loss=counted(2.5, 3.3))
    if found:
        assert finding("model-too-small", readings).severity == "note"
    else:
        assert verdict("model-too-small", readings) is None


def test_a_model_that_still_learns_is_not_too_small() -> None:
    losses = [4.0 - 1.2 * step / 300 for step in range(300)]
    readings = chart(train_loss=losses, validation_loss={100: 3.6, 200: 3.2, 300: 2.8}, ngram_loss=counted(2.5, 3.3))
    assert verdict("model-too-small", readings) is None


# --- unlearnable-data ---------------------------------------------------------------------------------------------------
def pairs(gain: float, dependence: float = 0.5, *, noise: bool = False, columns: int = 24, steps: int = 100, where: str = "fresh") -> Chart:
    rows = [
        Reading(step, "pairing_gain", gain + 0.001 * wiggle, where=where, note={"rows": 25, "error": 0.02})
        for step, wiggle in zip(range(steps + 1), wobble(steps + 1, 0.0, 1.0))
    ]
    tested = Reading(steps, "input_dependence", dependence, note={"rows": 400, "noise": noise, "columns": columns})
    return chart(pairing_gain=rows, input_dependence=[tested])


def test_neither_model_nor_test_find_a_connection() -> None:
    found = finding("unlearnable-data", pairs(0.0))
    assert (found.severity, found.certainty) == ("critical", "likely")
    assert "400 examples show no connection" in found.summary


@pytest.mark.parametrize(
    "healthy",
    [
        pairs(0.05),
        pairs(0.0, dependence=12.0),
        pairs(0.0, noise=True),
        pairs(0.0, columns=3),
    ],
    ids=["the model has learned", "the data speak", "made up", "a formula of three numbers"],
)
def test_one_sign_of_learnability_suffices(healthy: Chart) -> None:
    assert verdict("unlearnable-data", healthy) is None


@pytest.mark.parametrize("short", [pairs(0.0, steps=59), pairs(0.0, where="repeated")], ids=["too short", "rows known by heart"])
def test_without_new_rows_nothing_is_said(short: Chart) -> None:
    assert isinstance(verdict("unlearnable-data", short), NotExamined)


@pytest.mark.parametrize(
    ("rate", "repeats", "gain", "sick"),
    [(0.46, 180, 0.0, True), (0.44, 180, 0.0, False), (0.5, 90, 0.0, False), (0.0, 199, 0.0, False), (0.46, 180, 0.05, False)],
    ids=["no better than chance", "a tenth is told", "seldom repeated", "the same answer", "the model tells true pairs from others"],
)
def test_equal_inputs_with_unequal_targets(rate: float, repeats: int, gain: float, sick: bool) -> None:
    note = {"rows": 200, "repeats": repeats, "inputs": 200 - repeats, "rate": rate, "marginal": 0.5}
    readings = [*pairs(gain, dependence=12.0)["pairing_gain"]]
    answer = verdict(
        "unlearnable-data", chart(pairing_gain=readings, input_conflicts=[Reading(100, "input_conflicts", rate * repeats / 200, note=note)])
    )
    assert (answer is not None) == sick
    if sick:
        assert not isinstance(answer, NotExamined)
        assert answer is not None
        assert answer.certainty == "confirmed"


@pytest.mark.parametrize("counted", [6, 4, 0])
def test_a_summed_loss_is_told_per_target(counted: int) -> None:
    logits, targets = torch.zeros(6, 5), torch.tensor([1] * counted + [-100] * (6 - counted))
    call = LossCall("cross_entropy", logits, targets, -100, "sum", cross_entropy(logits, targets, reduction="sum"), "train.py:3", True)
    assert per_target(call) == pytest.approx(math.log(5) if counted else 0.0)
    mean = LossCall("cross_entropy", logits, targets, -100, "mean", torch.tensor(2.5), "train.py:3", True)
    assert per_target(mean) == 2.5
