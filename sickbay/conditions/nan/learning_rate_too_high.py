"""The updates are too large: each step changes the weights by a tenth or more, and the loss goes up or nowhere.

Looks like
The loss rises above its start within the first steps and then lies flat far above what the data allow; or a good,
pretrained model is ruined in ten steps; or everything is NaN.

Why
A step is right only as far as the gradient it was computed from is still valid. Adam moves every element by about the
learning rate whatever the gradient's size, so weights of size 0.02 are rewritten by a learning rate of 0.3 in one step;
the clip does not help there, it limits the gradient and not the update.

Tell apart
exploding-gradients: the gradients themselves are enormous while the learning rate is ordinary.
missing-normalization, attention-scale: the structure makes any learning rate too high.
loss-spike: the run is good before and good again after.

Cure
Divide the learning rate by ten and look again; warm it up over the first few hundred steps. What settles the question:
the same script and seed with a tenth of the learning rate.

Sources
Updates near 1e-3 of the weight are healthy: Karpathy 2022, "Building makemore 3"; Bottou 2012, section 4.
The limit of 0.1: calibration on healthy runs, whose median over matrices stays below 0.09 even in Adam's first step.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Certainty, Diagnosis, Evidence, Threshold, number
from sickbay.core.robust import median

_CALIBRATED = "calibration on healthy transformer runs: SGD, Adam, warm-up, restarts, summed losses, fp16, post-norm, LoRA"
LARGE_UPDATE = Threshold(0.1, "ratio", source=_CALIBRATED)
EARLY_UPDATE = Threshold(0.03, "ratio", source="three times the guide's upper end of 0.01, in the run's first steps")
LOSS_RISE = Threshold(1.2, "x loss before", source=_CALIBRATED)
RUINOUS_RISE = Threshold(2.0, "x loss before", source=_CALIBRATED)
AT_CHANCE = Threshold(0.03, "share of chance loss", source="three times the step-to-step noise of a run stuck at a uniform guess")
STUCK_STEPS = Threshold(50, "steps", source="healthy runs of such update ratios leave the uniform guess within 30 steps")
STANDS = Threshold(0.95, "share of loss", source="a run that gets anywhere loses a twentieth between its second quarter and its last")
ABOVE = Threshold(1.15, "x loss of counting", source="whoever stays a seventh above counts of pairs and triples has learnt little")
LARGE_SCORE = Threshold(100.0, "score", source="Kimi K2 report 2025: QK-clip's threshold")
ONE_HOT = Threshold(0.05, "share of ln n", source="Zhai et al. 2023: entropy collapse, heads near one-hot")
HUGE_GRADIENT = Threshold(100.0, "L2 norm", source="audit limit for a global gradient norm; here only: whose fault is the update's size")
ZERO_WEIGHT = Threshold(1e-3, "L2 norm", source="a tensor that starts at zero has no relative update: LoRA's B, zero-initialised outputs")
NOT_MATRICES = ("bias", "norm.weight", "ln.weight", "ln_f.weight", "ln_1.weight", "ln_2.weight")
FIRST, END, LOOKS = 3, 10, 4  # readings that make up the start, and the end; large updates, or looks at attention, that show a habit
FOLLOWS = (0.5, 10.5)  # x learning rate times gradient: 1 for SGD, up to 10 with momentum 0.9; Adam's depends on the tensor's size


def diagnose(chart: Chart) -> Diagnosis | None:
    typical = _typical_updates(chart)
    large = [reading for reading in typical if reading.value > LARGE_UPDATE]
    if len(large) >= 2 and not _gradient_is_to_blame(chart):
        harm, certainty = _harm(chart, large[0].step)
        harm, certainty = (harm, certainty) if harm else (_collapsed(chart) or _stands(chart, large), "suspected")
        limit, seen = LARGE_UPDATE, large
    else:
        early = [reading for reading in typical[:FIRST] if reading.value > EARLY_UPDATE]
        harm, certainty = (_stuck(chart) if len(early) == FIRST else ""), "suspected"
        limit, seen = EARLY_UPDATE, early
    if not harm:
        return None
    worst = max(seen, key=lambda reading: reading.value)
    rate = chart["learning_rate"].between(0, worst.step)
    return Diagnosis(
        summary=f"updates of {number(worst.value)} of the weights (median tensor, step {worst.step}"
        + (f", learning rate {number(rate[-1].value)}" if len(rate) else "")
        + f"), and {harm}; a run with a tenth of the learning rate would settle it",
        evidence=(Evidence(worst, limit),),
        severity="warning" if certainty == "suspected" else "critical",
        step=seen[0].step,
        where=worst.where,
        source=worst.source,
        certainty=certainty,
    )


def _typical_updates(chart: Chart) -> list[Reading]:
    """Per sampled step the reading of the median tensor's update ratio, over matrices that did not start at zero."""
    born: dict[str, float] = {}
    for reading in chart["weight_norm"]:
        born.setdefault(reading.where, reading.value)
    steps: dict[int, list[Reading]] = {}
    for reading in chart["update_ratio"]:
        zero = reading.where in born and not born[reading.where] > ZERO_WEIGHT
        if math.isfinite(reading.value) and not zero and not reading.where.lower().endswith(NOT_MATRICES):
            steps.setdefault(reading.step, []).append(reading)
    return [sorted(rows, key=lambda reading: reading.value)[(len(rows) - 1) // 2] for rows in steps.values()]


def _harm(chart: Chart, step: int) -> tuple[str, Certainty]:
    """What the loss did after the first large update, in words; empty if it did not mind."""
    losses = chart["loss"].of_one_training(step)
    past, after = losses.between(0, step).values, losses.between(step + 1, chart.last_step).values
    best = min((median(past[i : i + FIRST]) for i in range(max(1, len(past) - FIRST + 1))), default=math.nan)
    peak = max((median(after[i : i + FIRST]) for i in range(len(after) - FIRST + 1)), default=math.nan)
    end = median(after[-END:])
    if any(not math.isfinite(value) for value in after):
        return f"the loss, {number(best)} before, is no longer finite", "likely"
    if peak > RUINOUS_RISE * best or (peak > LOSS_RISE * best and end > LOSS_RISE * best):
        return f"the loss rose from {number(best)} to {number(peak)} and ends at {number(end)}", "likely"
    return "", "likely"


def _stuck(chart: Chart) -> str:
    chance, losses = chart["chance_loss"], chart["loss"].values
    level = median(losses[-END:]) / chance[0].value if len(chance) and chance[0].value > 0 else math.nan
    if len(losses) >= STUCK_STEPS and abs(level - 1) < AT_CHANCE and min(losses) > (1 - 2 * AT_CHANCE) * chance[0].value:
        return f"after {len(losses)} steps the loss is still that of a uniform guess ({number(chance[0].value)})"
    return ""


def _collapsed(chart: Chart) -> str:
    """The head whose scores ran away from ordinary ones until it sees one position, in words; empty if there is none."""
    for place in chart["attention_logit_max"].places():
        scores, sharp = chart["attention_logit_max"].at(place).finite().values, chart["attention_entropy"].at(place).finite().values
        grown = len(scores) >= LOOKS and scores[0] < LARGE_SCORE and scores[-1] > max(LARGE_SCORE, 2 * max(scores[: len(scores) // 2]))
        if grown and sharp and sharp[-1] < ONE_HOT < sharp[0]:
            return (
                f"attention scores grew from {number(scores[0])} to {number(scores[-1])}, entropy {number(sharp[-1])} of uniform ({place})"
            )
    return ""


def _stands(chart: Chart, large: list[Reading]) -> str:
    """That a loss which jumped after several large updates stands far above what counting tokens gives, in words; else empty."""
    losses, counted = chart["loss"].finite().values, median([reading.value for reading in chart["ngram_loss"]][-END:])
    quarter, peak = len(losses) // 4, max(losses, default=0.0)
    if len(large) < LOOKS or len(losses) < STUCK_STEPS or peak <= RUINOUS_RISE * min(losses[: losses.index(peak) + 1]):
        return ""
    before, end = median(losses[quarter : 2 * quarter]), median(losses[-quarter:])
    if end > STANDS * before and end > ABOVE * counted:
        text = f"the loss jumped to {number(peak)} and stands at {number(end)}"
        return f"{text}, though counting pairs and triples of tokens gives {number(counted)}"
    return ""


def _gradient_is_to_blame(chart: Chart) -> bool:
    """True where gradients are huge from the first step and the updates are learning rate times gradient, unclipped."""
    first = [r.value for r in chart["grad_norm"] if math.isfinite(r.value)][:FIRST]
    clipped = any(math.isfinite(r.note.get("max_norm", math.inf)) for r in chart["clip_norm"])
    if clipped or not first or median(first) <= HUGE_GRADIENT:
        return False
    rates = {r.step: r.value for r in chart["learning_rate"]}
    norms = {(r.step, r.where): r.value for r in chart["weight_norm"]}
    gradients = {(r.step, r.where): r.value for r in chart["param_grad_norm"]}
    follows = []
    for ratio in chart["update_ratio"]:
        key, step_size = (ratio.step, ratio.where), rates.get(ratio.step, 0.0)
        if key in norms and gradients.get(key, 0.0) > 0 and step_size > 0 and math.isfinite(ratio.value * norms[key]):
            follows.append(ratio.value * norms[key] / (step_size * gradients[key]))
    return not follows or FOLLOWS[0] < statistics.median(follows) < FOLLOWS[1]


def inject(case: Any) -> Any:
    """The exponent got lost: 3 instead of 3e-3, under Adam."""
    return case.but(learning_rate=3.0)


condition = Condition(
    id="learning-rate-too-high",
    symptom="updates are too large a share of the weights, and the loss rises or never falls",
    needs=("update_ratio", "loss"),
    uses=(
        *("grad_norm", "param_grad_norm", "weight_norm", "learning_rate", "clip_norm", "chance_loss"),
        *("attention_logit_max", "attention_entropy", "ngram_loss"),
    ),
    diagnose=diagnose,
    prescribes=("lower-learning-rate",),
    leads_to=(
        "exploding-gradients",
        "loss-spike",
        "attention-logit-growth",
        "clipping-saturated",
        "loss-plateau",
        "half-precision-overflow",
        "non-finite-weights",
        "repetitive-generation",
        "incoherent-generation",
    ),
    inject=inject,
)
