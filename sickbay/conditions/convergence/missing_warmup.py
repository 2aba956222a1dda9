"""Training starts at the full learning rate: the first steps overshoot, and the run is thrown back or never gets going.

Looks like
The loss jumps up within the first steps and takes long to come back to where it began, or it falls to the loss of a uniform guess
and stays there. Later steps of the same length do no harm.

Why
At the start gradients point the same way for all examples, Adam knows no second moment yet and moves every element by the whole
learning rate, and the last layers of a post-norm model get the largest gradients of the run. A step that is right later is too long now.

Tell apart
learning-rate-too-high: a tenth of the step is still too long, or later steps overshoot as well. poor-initialization: the loss is far
above that of a uniform guess before the first step. loss-spike: in the middle of the run.

Cure
Let the rate rise linearly over the first few hundred steps, or 1 to 10 % of the run. What settles it: the same script and seed with a
warm-up.

Sources
Xiong et al. 2020, "On layer normalization in the transformer architecture": why post-norm needs a warm-up. Liu et al. 2020 (RAdam):
Adam's early second moment. Goyal et al. 2017: gradual warm-up.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number
from sickbay.core.robust import median

FULL = Threshold(0.9, "share of highest rate", source="a first step of nine tenths of the peak is no warm-up")
OVERSHOT = Threshold(
    0.01, "share of loss", source="what a tenth of the step gains more than the step itself; below it lies the noise of one batch"
)
RISE = Threshold(1.3, "x first loss", source="calibration: healthy runs without warm-up rise by up to a fifth in their first steps")
AT_CHANCE = Threshold(0.05, "share of chance loss", source="a run stuck at a uniform guess stays this close to it")
TOO_LONG = Threshold(0.1, "x step", source="where a tenth of the step is still too long the rate is too high altogether")
REACHED = Threshold(1e-2, "x late layers'", source="calibration on healthy networks: the gradient of the first layers is never below it")
SETTLED = Threshold(0.9, "x first loss", source="a run that has lost a tenth of its first loss has got going")
EARLY, FEWEST, STUCK, SMOOTH = 8, 30, 100, 3  # steps: that count as the start; of a run judged; of one that is stuck. Readings per median


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    losses, rates = chart["loss"].finite().values, chart["learning_rate"].values
    if len(losses) < FEWEST:
        return NotExamined(f"the run has {len(losses)} steps with a finite loss; this needs {FEWEST}")
    early = [r for r in chart["step_gain"] if r.step < EARLY and "0.1" in r.note["losses"]]
    overshot = [r for r in early if _overshot(r)]
    later = [r for r in chart["step_gain"] if r.step >= EARLY and _overshot(r)]
    if rates[0] < FULL * max(rates) or not overshot or later:
        return None
    harm = _harm(chart, losses)
    if not harm:
        return None
    worst = min(overshot, key=lambda reading: reading.value)
    seen = worst.note["losses"]
    return Diagnosis(
        summary=f"the learning rate is {number(rates[0])} from step 0 on, and {harm}; at step {worst.step} a tenth of it "
        f"takes the loss from {number(worst.note['loss'])} to {number(seen['0.1'])}, the whole to {number(seen['1'] or float('inf'))}.",
        evidence=(Evidence(worst, 0.0), Evidence(chart["learning_rate"][0])),
        severity="warning",
        step=overshot[0].step,
        source=chart["learning_rate"][0].source or worst.source,
        certainty="suspected",
        explains=("learning-rate-too-high", "loss-spike", *(("vanishing-gradients",) if _reached_at_first(chart) else ())),
    )


def _overshot(reading: Reading) -> bool:
    """True if a tenth of the step lowers its batch's loss, and clearly further than the step does."""
    before, losses = reading.note["loss"], reading.note["losses"]
    tenth, whole = losses.get("0.1"), losses.get("1")
    if tenth is None or reading.note["best"] != TOO_LONG:
        return False
    return tenth < before and (whole is None or whole - tenth > OVERSHOT * abs(before))


def _reached_at_first(chart: Chart) -> bool:
    """True if the first look found a gradient in the first layers: where it has faded since, the first steps did it."""
    seen = chart["gradient_by_depth"].finite()
    start = sorted((r for r in seen if r.step == seen[0].step), key=lambda r: float(r.note.get("depth") or 0))
    quarter = len(start) // 4
    return quarter > 0 and median([r.value for r in start[:quarter]]) > REACHED * median([r.value for r in start[-quarter:]])


def _harm(chart: Chart, losses: list[float]) -> str:
    """What became of the run, in words; empty if it did not mind."""
    first, chance = losses[0], chart["chance_loss"].median()
    smooth = [median(losses[i : i + SMOOTH]) for i in range(len(losses) - SMOOTH + 1)]
    third = max(len(losses) // 3, SMOOTH)
    top, lasting = max(losses[:third]), max(smooth[:third])
    end = median(losses[-FEWEST // 3 :])
    if top > RISE * first and lasting > first and end < SETTLED * first:
        return f"the loss rose from {number(first)} to {number(top)} before it came down"
    if len(losses) >= STUCK and abs(end / chance - 1) < AT_CHANCE and min(smooth) > (1 - 2 * AT_CHANCE) * chance:
        return f"after {len(losses)} steps the loss is still that of a uniform guess, {number(chance)}"
    return ""


def inject(case: Any) -> Any:
    """A learning rate of 0.3 from the first step on."""
    return case.but(learning_rate=0.3, warmup=0, clip=None)


condition = Condition(
    id="missing-warmup",
    symptom="full learning rate at the first step, which overshoots and throws the run back",
    needs=("learning_rate", "loss"),
    uses=("step_gain", "chance_loss", "gradient_by_depth"),
    diagnose=diagnose,
    prescribes=("warm-up-learning-rate",),
    leads_to=("learning-rate-too-high", "loss-plateau", "attention-logit-growth", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
