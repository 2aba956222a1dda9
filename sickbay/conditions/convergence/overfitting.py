"""Validation loss rises while training loss goes on falling: the model learns its examples by heart.

Looks like
Two curves that part: training loss falls towards zero, validation loss turns around and climbs.

Why
More capacity and more passes than the data can feed: a small set seen for many epochs, no dropout or weight decay, augmentation that
was lost, or a validation set from somewhere else.

Tell apart
learning-rate-too-high: training loss rises as well. train-mode-in-evaluation: validation is high from the start. data-repeats: the same
batch again and again; then that is the cause. Fitting a few examples on purpose looks the same; it is called so only where the script
evaluates on other data.

Cure
Keep the weights of the lowest validation loss and stop soon after; more or augmented data, dropout, weight decay, a smaller or a
pretrained model.

Sources
Prechelt 1998, "Early stopping - but when?" (rise over the lowest validation loss so far); Goodfellow, Bengio & Courville 2016, section
7.8. Nakkiran et al. 2020 (arXiv 1912.02292) on losses that fall again later: a rise is judged at the end of the run only.
"""

from __future__ import annotations

import statistics
from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number
from sickbay.core.robust import MAD_TO_SIGMA, median

RISE = Threshold(0.01, "share of loss", source="smaller rises are within what one evaluation set's choice of examples makes")
MUCH = Threshold(0.05, "share of loss", source="Prechelt 1998 stops at a generalisation loss of 5 %")
NOISE = Threshold(3.0, "standard deviations", source="a rise within three standard deviations of neighbouring evaluations is none")
FALL = Threshold(0.01, "share of loss", source="training that falls by less meanwhile has stopped, not parted from validation")
CURVATURE = Threshold(6**0.5, "standard deviations", source="v[i-1] - 2 v[i] + v[i+1] of independent noise has six times its variance")
FEWEST, AROUND, WINDOW = 5, 1, 5  # evaluations to judge; on either side of the lowest; fewest training steps of a mean


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Both last evaluations lie above the neighbourhood of the lowest one by more than noise; training fell meanwhile and lies below."""
    seen, losses = chart["validation_loss"].finite(), chart["train_loss"].finite()
    if len(seen) < FEWEST or len(losses) < FEWEST:
        return NotExamined(f"{len(seen)} evaluations were seen; this needs {FEWEST}")
    if min(seen.values) <= 0:
        return NotExamined("the loss is no positive number that could rise by a share")
    values = seen.values
    place = values.index(min(values))
    low = statistics.fmean(values[max(0, place - AROUND) : place + AROUND + 1])
    rise, noise = min(values[-2:]) - low, _noise(values)
    before, after = _trained(losses, seen[place].step), _trained(losses, seen[-1].step)
    if rise <= max(RISE * low, NOISE * noise) or after >= (1 - FALL) * before or after >= values[-1]:
        return None
    note = rise <= MUCH * low or _on_purpose(chart["batch_repeat"])
    text = (
        f"validation loss rose from {number(values[place])} at step {seen[place].step} to {number(values[-1])}, "
        f"while training loss fell from {number(before)} to {number(after)}."
    )
    evidence = (Evidence(seen[-1], (1 + RISE) * low), Evidence(losses[-1]))
    return Diagnosis(text, evidence, "note" if note else "warning", seen[place].step, source=losses[-1].source or seen[-1].source)


def _noise(values: list[float]) -> float:
    """The standard deviation of one evaluation around its neighbours' line, from second differences."""
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:])]
    return median(bends) * MAD_TO_SIGMA / CURVATURE


def _trained(losses: Series, step: int) -> float:
    """The mean training loss of the steps up to `step`: a twentieth of the run, WINDOW at least."""
    kept = [r.value for r in losses if r.step <= step][-max(WINDOW, len(losses) // 20) :]
    return statistics.fmean(kept) if kept else float("nan")


def _on_purpose(repeats: Series) -> bool:
    """True where one batch, kept by the script, is trained on in nearly every step: a trial whether the model can learn it at all."""
    return sum(bool(r.note.get("same_object")) for r in repeats) > len(repeats) / 2


def inject(case: Any) -> Any:
    """Six hundred characters of text, seen many times at a high rate."""
    end = len(case.corpus) // 10
    kept = case.corpus[: 10 * end].clone()
    training = kept[: 9 * end]
    training[:] = training[:600].repeat(len(training) // 600 + 1)[: len(training)]
    return case.but(corpus=kept, steps=max(case.steps, 400), eval_every=20, learning_rate=4 * case.learning_rate)


condition = Condition(
    id="overfitting",
    symptom="validation loss rises while training loss goes on falling",
    needs=("validation_loss", "train_loss"),
    uses=("batch_repeat",),
    diagnose=diagnose,
    prescribes=("stop-before-overfitting",),
    inject=inject,
)
