"""The nan chapter's conditions that judge structure and the order of calls, and who comes first in the chapter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
from charts import chart
from judging import NAN_CHAPTER, finding, tensors, verdict, wobble

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import checkup
from sickbay.core.diagnosis import Diagnosis, NotExamined

NAN, INF = math.nan, math.inf


# --- structure: normalisation, attention ----------------------------------------------------------------------------


def blocks(rms: Sequence[float]) -> list[Reading]:
    note = {"blocks": len(rms)}
    return [Reading(0, "activation_rms", value, f"h.{depth}", {**note, "depth": depth}, "net.py:40") for depth, value in enumerate(rms)]


def norms(count: float, blocks: int = 4) -> list[Reading]:
    return [Reading(0, "normalization_ops", count, note={"kinds": [], "blocks": blocks})]


CHANCE = [Reading(0, "chance_loss", math.log(32), note={"classes": 32})]


def test_growth_without_normalisation() -> None:
    sick = chart(normalization_ops=norms(0), activation_rms=blocks([1.7, 5, 20, 67]), loss=[75.0], chance_loss=CHANCE)
    found = finding("missing-normalization", sick)
    assert (found.severity, found.certainty, found.where, found.source) == ("critical", "confirmed", "h.3", "net.py:40")
    assert "activations grow 39.4 x" in found.summary
    assert "first loss is 75" in found.summary


@pytest.mark.parametrize(
    ("growth", "loss", "expected"),
    [
        (10.01, 3.5, "warning"),
        (10.0, 3.5, None),
        (3.01, 75.0, "critical"),
        (3.0, 75.0, None),
        (5.0, 6.9, None),
        (INF, 3.5, "critical"),
        (NAN, 3.5, "critical"),
    ],
)
def test_missing_normalisation_at_its_thresholds(growth: float, loss: float, expected: str | None) -> None:
    found = verdict(
        "missing-normalization", chart(normalization_ops=norms(0), activation_rms=blocks([1.0, growth]), loss=[loss], chance_loss=CHANCE)
    )
    assert (found.severity if isinstance(found, Diagnosis) else found) == expected


def test_missing_normalisation_needs_blocks_and_their_activations() -> None:
    grown = blocks([1.0, 50.0])
    assert verdict("missing-normalization", chart(normalization_ops=norms(4), activation_rms=grown)) is None
    assert verdict("missing-normalization", chart(normalization_ops=norms(0, blocks=1), activation_rms=grown)) is None
    assert verdict("missing-normalization", chart(normalization_ops=norms(0), activation_rms=blocks([1.0]))) == NotExamined(
        "activations were not sampled"
    )
    assert "missing-normalization" in checkup(chart(loss=[3.0]), NAN_CHAPTER).unexamined
    summed = chart(normalization_ops=norms(0), activation_rms=blocks([1.0, 1.5]), loss=[2000.0], chance_loss=CHANCE)
    assert verdict("missing-normalization", summed) is None, "a summed loss is not a bad start"


def test_the_normalisation_of_a_model_trained_earlier_is_not_the_later_ones() -> None:
    def two(teacher: int, student: int) -> Chart:
        ops = [dataclasses.replace(r, step=step) for r, step in ((norms(2, blocks=2)[0], teacher), (norms(0, blocks=3)[0], student))]
        rms = [dataclasses.replace(r, step=student) for r in blocks([1.0, 8.0, 64.0])]
        losses = [1.8] * 4 + [30.0] * 4
        return chart(normalization_ops=ops, activation_rms=[*blocks([1.0, 1.1]), *rms], loss=losses, chance_loss=CHANCE)

    assert "grow 64 x" in finding("missing-normalization", two(0, 4)).summary
    assert verdict("missing-normalization", two(4, 4)) is None, "side by side it is not known whose is whose"


def scale(value: float, head_dim: int = 16, **note: Any) -> list[Reading]:
    return [Reading(0, "attention_scale", value, f"h.{i}.attn", {"head_dim": head_dim, **note}, "net.py:12") for i in range(2)]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (4.0, "not divided by √16 at all"),
        (0.25, "divided by √16 twice"),
        (0.5, "divided by √64, 4 heads together"),
        (1 / math.sqrt(2), "2 heads together"),
        (1.31, "scaled by 1.31"),
        (0.0, "not positive"),
        (-1.0, "not positive"),
    ],
)
def test_wrong_attention_scales(value: float, says: str) -> None:
    found = finding("attention-scale", chart(attention_scale=scale(value)))
    assert says in found.summary
    assert "(2 attention layer(s))" in found.summary
    assert (found.severity, found.source) == ("warning", "net.py:12")


@pytest.mark.parametrize("value", [1.0, 1.3, 1 / 1.3 + 1e-9, 0.94, NAN])
def test_right_attention_scales(value: float) -> None:
    assert verdict("attention-scale", chart(attention_scale=scale(value))) is None


def test_a_declared_scale_is_right() -> None:
    assert verdict("attention-scale", chart(attention_scale=scale(4.0, declared=True))) is None
    later = [dataclasses.replace(reading, step=5) for reading in scale(4.0)]
    assert verdict("attention-scale", chart(attention_scale=[*scale(4.0, declared=True), *later])) is None, (
        "training undid what was declared"
    )


def logits(values: Sequence[float], entropy: Sequence[float] = ()) -> Chart:
    return chart(
        attention_logit_max=tensors("attention_logit_max", {"h.0": values}),
        attention_entropy=tensors("attention_entropy", {"h.0": entropy}),
    )


def test_attention_logits_that_drift_up() -> None:
    assert finding("attention-logit-growth", logits([5, 20, 80, 101])).severity == "note"
    assert finding("attention-logit-growth", logits([50, 400, 3000, 10_001])).severity == "warning"
    assert finding("attention-logit-growth", logits([5, 20, 80, 300], [0.5, 0.3, 0.1, 0.049])).severity == "warning"
    assert finding("attention-logit-growth", logits([5, 20, 80, 300], [0.5, 0.3, 0.1, 0.05])).severity == "note"


@pytest.mark.parametrize(
    "values", [[5, 20, 300], [5, 20, 80, 100], [200, 250, 380, 400], [5, 900, 8, 300], [NAN] * 6, [1, 2, 4, 9, 20, 40]]
)
def test_attention_logits_that_do_not(values: list[float]) -> None:
    assert verdict("attention-logit-growth", logits(values)) is None


# --- order of calls, the scaler -------------------------------------------------------------------------------------


def test_gradients_carried_over() -> None:
    found = finding("gradients-not-zeroed", chart(carried_gradient={1: 1.0, 2: 1.0}))
    assert (found.step, found.severity) == (1, "critical")
    assert "100 % of the gradient" in found.summary


@pytest.mark.parametrize(
    "readings",
    [
        {"carried_gradient": {1: 0.0, 2: 0.0, 3: 0.0}},
        {"carried_gradient": {1: 1.0}},
        {"carried_gradient": {1: 0.5, 2: 0.5}},
        {"carried_gradient": {1: NAN, 2: NAN}},
        {"carried_gradient": {1: 1.0, 2: 1.0, 3: 0.0, 4: 0.0}},
        {"carried_gradient": {1: 1.0, 2: 1.0}, "dropped_backwards": {1: 1, 2: 1}},
    ],
)
def test_gradients_not_carried_over(readings: dict[str, Any]) -> None:
    assert verdict("gradients-not-zeroed", chart(**readings)) is None


def test_each_optimizer_is_judged_by_itself() -> None:
    rows = tensors("carried_gradient", {"optimizer 0": [0.0] * 6, "optimizer 1": [1.0] * 6})
    assert finding("gradients-not-zeroed", chart(carried_gradient=rows)).where == "optimizer 1"


def scaler(skips: Sequence[int], scales: Sequence[float]) -> Chart:
    return chart(skipped_step=skips, loss_scale=scales)


def test_a_scale_that_falls_below_one() -> None:
    found = finding("scaler-collapse", scaler([1] * 18, [65536 / 2**i for i in range(1, 19)]))
    assert found.severity == "critical"
    assert "18 of 18 optimizer steps were skipped, and the loss scale fell from 32,768 to 0.25" in found.summary
    assert found.evidence[0].limit == 1.0


def test_a_fused_optimizer_hides_its_skips_and_the_scale_tells() -> None:
    found = finding("scaler-collapse", scaler([0] * 18, [65536 / 2**i for i in range(18)]))
    assert "17 of 18 optimizer steps were skipped" in found.summary


def test_steps_skipped_again_and_again() -> None:
    skips = [0] * 10 + [1, 0, 0, 0, 0] * 8
    scales, level = [], 65536.0
    for skip in skips:
        level = level / 2 if skip else level
        scales.append(level)
    assert finding("scaler-collapse", scaler(skips, scales)).severity == "warning"


@pytest.mark.parametrize(
    ("why", "skips", "scales"),
    [
        ("the search at the start", [1] * 8 + [0] * 92, [65536 / 2 ** min(i + 1, 8) for i in range(100)]),
        ("never", [0] * 100, [65536.0] * 100),
        ("too short", [1] * 5, [65536 / 2 ** (i + 1) for i in range(5)]),
        ("exactly 5 %", [0] * 10 + [1, *[0] * 19] * 3, [2.0 ** (16 - (i - 10) // 20 - 1) if i >= 10 else 65536 for i in range(70)]),
        ("probing after growth", [0] * 10 + [0, 0, 1] * 30, [1024.0] * 10 + [1024.0, 2048.0, 1024.0] * 30),
        ("a small scale by choice", [0] * 50, [0.5] * 50),
        ("no reading but NaN", [0] * 20, [NAN] * 20),
    ],
)
def test_a_scaler_at_work(why: str, skips: list[int], scales: list[float]) -> None:
    assert verdict("scaler-collapse", scaler(skips, scales)) is None, why


def clips(limit: float, scale: float = 65536.0, steps: int = 2) -> Chart:
    return chart(
        clip_on_scaled=[Reading(step, "clip_on_scaled", scale, source="t.py:5") for step in range(steps)],
        clip_norm=[Reading(step, "clip_norm", 9e4, note={"max_norm": limit}) for step in range(steps)],
    )


def test_clipping_before_unscaling() -> None:
    found = finding("clip-before-unscale", clips(1.0))
    assert (found.severity, found.source) == ("critical", "t.py:5")
    assert "65,536" in found.summary
    assert verdict("clip-before-unscale", clips(1.0, scale=1.0)) is None, "at the limit"
    assert verdict("clip-before-unscale", clips(1.0, steps=1)) is None, "once"
    assert verdict("clip-before-unscale", clips(65536.0)) is None, "the limit was scaled too"
    assert verdict("clip-before-unscale", clips(INF)) is None, "only measured"
    assert verdict("clip-before-unscale", clips(1.0, scale=NAN)) is None
    assert verdict("clip-before-unscale", chart(loss=[1.0])) is None


# --- who comes first ------------------------------------------------------------------------------------------------


def test_the_structure_comes_before_what_it_does() -> None:
    sick = chart(
        normalization_ops=norms(0),
        activation_rms=blocks([1.7, 5, 20, 67]),
        chance_loss=CHANCE,
        loss=[*wobble(20, 75.0), 200, 900, 4e3, 9e4],
        grad_norm=[*wobble(20, 1e3), 2e4, 9e4, 4e6, 1e9],
        update_ratio=tensors("update_ratio", {"h.0.weight": [0.2, 0.3, 0.3]}),
    )
    (root,) = checkup(sick, NAN_CHAPTER).diagnoses
    assert root.condition == "missing-normalization"
    assert "exploding-gradients" in root.explains


def test_a_healthy_run_has_no_alarm_in_the_whole_chapter() -> None:
    healthy = chart(
        loss=[4.2 * 0.95**index for index in range(60)],
        grad_norm=[2.0 * 0.98**index for index in range(60)],
        learning_rate=[min(1.0, (index + 1) / 10) * 1e-3 for index in range(60)],
        normalization_ops=norms(9),
        activation_rms=blocks([1.4, 2.0, 3.0, 4.7]),
        attention_scale=scale(1.0),
        attention_logit_max=tensors("attention_logit_max", {"h.0": [0.3, 2.0, 5.0, 9.0, 14.0]}),
        attention_entropy=tensors("attention_entropy", {"h.0": [0.99, 0.7, 0.4, 0.2, 0.04]}),
        carried_gradient=[0.0] * 60,
        skipped_step=[1, 1] + [0] * 58,
        loss_scale=[16384.0] * 60,
        ignored_targets=[0.3] * 60,
        chance_loss=CHANCE,
        update_ratio=tensors("update_ratio", {"h.0.weight": [0.08, 0.05, 0.03, 0.01]}),
    )
    verdicts = checkup(healthy, NAN_CHAPTER)
    assert verdicts.diagnoses == ()
    assert not verdicts.unexamined
    assert len(verdicts.healthy) == 16
