"""Whether training longer would help, from the losses seen on the way, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sickbay.reference.evaluation.evaluation import Evaluation

LEAST_POINTS = 4  # a line through fewer leaves less than two points to tell its noise from
CLEAR = 2.0  # standard errors
FALLEN = 0.5  # of the highest learning rate: below it the fall of the rate shows in the loss as much as the steps do
WORTH = 0.01  # of the loss, gained by as many steps as the fit spans: less is not worth a run

Verdict = Literal["helps", "little", "overfits", "schedule over", "not known"]


@dataclass(frozen=True)
class Outlook:
    """`slope`: nats per 1,000 steps over the last `points` evaluations, `error` its standard error; NaN where it is not known.

    `gap`: validation loss minus training loss, both of the finished model; `reason` is a sentence.
    """

    verdict: Verdict
    reason: str
    slope: float
    error: float
    points: int
    gap: float


def outlook(history: Sequence[tuple[int, float]], train: Evaluation, validation: Evaluation, rate: float = 1.0) -> Outlook:
    """What the evaluations under way, `(step, validation loss)` in order, say of the steps to come. `train`: on as many training rows.

    `rate`: the last learning rate over the highest. Where the schedule has lowered it, neither a loss that falls (a falling rate lowers
    it) nor one that stands still (short steps move little) tells what more steps would do. All evaluations under way are over the same
    windows, so what scatters around their line is the training's noise.
    """
    gap = validation.loss - train.loss
    gap_text = f"{gap:+.3f} +- {CLEAR * math.hypot(train.error, validation.error):.3f}"
    last = list(history)[-max(LEAST_POINTS, -(-len(history) // 2)) :]
    if len(last) < LEAST_POINTS:
        had = f"{len(last)} evaluation{'' if len(last) == 1 else 's'} under way"
        return Outlook("not known", f"{had}, {LEAST_POINTS} are needed to see a trend", math.nan, math.nan, len(last), gap)
    slope, error = line(last)
    span = (last[-1][0] - last[0][0]) / 1000
    trend = f"{slope:+.4f} +- {CLEAR * error:.4f} nats per 1,000 steps over the last {len(last)} evaluations"
    best_step, best = min(history, key=lambda point: point[1])
    if slope > CLEAR * error:
        reason = f"the validation loss rises, {trend}; it was lowest at step {best_step:,} ({best:.4f}); train-validation gap {gap_text}"
        return Outlook("overfits", reason, slope, error, len(last), gap)
    falls = slope < -CLEAR * error and -slope * span > WORTH * validation.loss
    scatters = not falls and CLEAR * error * span > WORTH * validation.loss
    if rate < FALLEN and not scatters:
        moves = "still falls" if falls else "hardly moves any more"
        now = f"the learning rate is down to {rate:.0%} of its highest"
        why = "which lowers the loss by itself" if falls else "where no step moves much"
        shown = "a new run with a larger --steps shows what more would do"
        reason = f"the validation loss {moves}, {trend}, and {now}, {why}; {shown}; gap {gap_text}"
        return Outlook("schedule over", reason, slope, error, len(last), gap)
    if falls:
        reason = f"the validation loss still falls, {trend}; train-validation gap {gap_text}"
        return Outlook("helps", reason, slope, error, len(last), gap)
    if scatters:
        return Outlook("not known", f"the validation loss scatters too much to see a trend, {trend}", slope, error, len(last), gap)
    return Outlook("little", f"the validation loss hardly moves any more, {trend}; gap {gap_text}", slope, error, len(last), gap)


def line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(slope, its standard error) of the least-squares line through three `points` or more, per 1,000 steps."""
    steps, losses = (np.array(column, dtype=np.float64) for column in zip(*points))
    steps = (steps - steps.mean()) / 1000
    slope = float(steps @ losses / (steps @ steps))
    residuals = losses - losses.mean() - slope * steps
    return slope, math.sqrt(float(residuals @ residuals) / (len(points) - 2) / float(steps @ steps))
