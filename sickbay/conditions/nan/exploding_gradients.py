"""The gradient norm runs away: each step's gradient is many times the last, until the loss or the weights overflow.

Looks like
The gradient norm climbs by factors from one step to the next; the loss rises after it, one to four steps later, and ends
in infinity or NaN, or stays far above where it was.

Why
Gradients are products over layers and positions. Once a weight is large enough that the product grows, an update that
follows it makes the weight larger still. Nothing bounds that: no clipping, a loss that is summed and not averaged under
an optimizer that follows the gradient's size (SGD), a recurrence, a depth without normalisation.

Tell apart
learning-rate-too-high: the gradients were ordinary when the updates were already a tenth of the weights.
loss-spike: it comes back by itself. missing-normalization: the activations grow with depth from the first step.
A large norm by itself is not this: a summed loss has large gradients all its life and trains.

Cure
Clip the global norm to 1.0 before the step, after unscaling and after all accumulation:
`torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)`. If the clip is then always active, lower the learning rate.

Sources
Pascanu, Mikolov & Bengio 2013, "On the difficulty of training recurrent neural networks": clipping by the global norm.
The 10-times limit on the run's own median: healthy runs of transformers under 8 recipes, whose norm rises up to 25 times
while the loss falls, and never 10 times with a rising loss. BLOOM's norm rose 4000 times in 5 steps (chronicles, 2022-04-12).
"""

from __future__ import annotations

import math
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold, number
from sickbay.core.nonfinite import Origin, origins
from sickbay.core.robust import median

_CALIBRATED = "calibration on healthy transformer runs: SGD, Adam, warm-up, restarts, summed losses, fp16, post-norm, LoRA"
RUNAWAY = Threshold(10.0, "x median so far", source=_CALIBRATED)
LOSS_RISE = Threshold(1.2, "x loss before", source=_CALIBRATED)
OVERFLOWING = Threshold(1e12, "operand", source="float32 overflows in a sum of products of such numbers; no healthy activation comes near")
WINDOW, LASTING, TAIL = 50, 3, 5  # readings: of history, of a rise that is no accident, of the run's end
FEWEST = 2  # readings before a rise can be called one: short runs explode too
NAMED = frozenset(
    {"exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "logit", "sqrt", "rsqrt", "reciprocal", "softmax", "log_softmax"}
    | {"cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", "nll_loss_forward"}
)
NEAR = 3  # operations back: exp, sum, quotient
DIVISIONS = frozenset({"div", "true_divide", "truediv", "addcdiv"})


def diagnose(chart: Chart) -> Diagnosis | None:
    skipped = {reading.step for reading in chart["skipped_step"] if reading.value}
    norms = [reading for reading in chart["grad_norm"] if reading.step not in skipped]
    origin = next(iter(origins(chart["first_nonfinite"])), None)
    start, baseline = _onset(norms)
    if start is None and not (origin is not None and _by_growth(origin)):
        return None
    step = start.step if start is not None else min(origin.reading.step, norms[-1].step) if origin else 0
    harm = _harm(chart, step, norms, origin)
    peak = max((r for r in norms if r.step >= step and math.isfinite(r.value)), key=lambda r: r.value, default=norms[-1])
    if not harm:
        return None
    times = f", {number(peak.value / baseline)} x its median before" if start is not None else ""
    return Diagnosis(
        summary=f"from step {step} the gradient norm ran away to {number(peak.value)}{times}, and {harm}",
        evidence=(Evidence(peak, RUNAWAY * baseline if start is not None else None),),
        severity="critical",
        step=step,
        where=_where(chart, step) or (origin.reading.where if origin else ""),
        source=peak.source or (origin.reading.source if origin else ""),
    )


def _onset(norms: list[Reading]) -> tuple[Reading | None, float]:
    """The first reading of a lasting rise beyond RUNAWAY times the median before it, and that median.

    Each backward's line has a history of its own: a second training, of other weights on another task, begins anew.
    """
    lines = dict.fromkeys(reading.source for reading in norms)
    rises = (_rise([reading for reading in norms if reading.source == line]) for line in lines)
    begun = [(start, baseline) for start, baseline in rises if start is not None]
    return min(begun, key=lambda rise: rise[0].step, default=(None, math.nan))


def _rise(norms: list[Reading]) -> tuple[Reading | None, float]:
    values = [reading.value for reading in norms]
    for index in range(FEWEST, len(norms)):
        baseline = median(values[max(0, index - WINDOW) : index])
        ahead = values[index : index + LASTING]
        # "not <=" so that NaN counts as beyond; a lone infinity is an overflow, not a rise.
        if baseline > 0 and math.isfinite(ahead[0]) and all(not value <= RUNAWAY * baseline for value in ahead):
            return norms[index], baseline
    return None, math.nan


def _harm(chart: Chart, step: int, norms: list[Reading], origin: Origin | None) -> str:
    """What the rise did to the run and did not take back, in words; empty if it did nothing."""
    broken = next((r for r in norms if r.step >= step and not math.isfinite(r.value)), None)
    if origin is not None and _by_growth(origin):
        return f"{origin.op} overflowed at {origin.place} in step {origin.reading.step}"
    if broken is not None and (origin is None or not _has_its_own_cause(origin)):
        return f"it overflowed at step {broken.step}"
    losses = chart["loss"].of_one_training(step)
    before = median(losses.between(step - WINDOW, step - 1).values[-TAIL:])
    after, end = median(losses.between(step, step + WINDOW).values), losses.values[-TAIL:]
    if after > LOSS_RISE * before and not median(end) <= LOSS_RISE * before:
        return f"the loss went from {number(before)} to {number(median(end) if median(end) == median(end) else after)}"
    return ""


def _by_growth(origin: Origin) -> bool:
    """True where numbers grown huge overflowed in a sum or product, after at least one update, in a format wider than float16."""
    born = origin.forward or origin.phase in ("backward", "update")
    return born and origin.reading.step >= 1 and origin.largest > OVERFLOWING and not _has_its_own_cause(origin)


def _has_its_own_cause(origin: Origin) -> bool:
    """True where the operation, the batch or the format is what another condition names."""
    by_zero = origin.op in DIVISIONS and origin.divisor.zeros > 0
    of_exponentials = "exp" in origin.chain[:NEAR]
    return origin.phase in ("input", "weight") or origin.op in NAMED or by_zero or of_exponentials or origin.dtype == "float16"


def _where(chart: Chart, step: int) -> str:
    """The parameter with the largest gradient at the sampled step nearest after `step`."""
    later = [reading for reading in chart["param_grad_norm"] if reading.step >= step]
    first = [reading for reading in later if reading.step == later[0].step]
    return max(first, key=lambda r: (math.isfinite(r.value), r.value), default=Reading(step, "param_grad_norm", 0.0)).where


def inject(case: Any) -> Any:
    """The loss is summed over tokens and width, clipping is off, and plain SGD follows the gradient's size."""

    def optimizer(sick: Any, model: Any) -> Any:
        import torch

        return torch.optim.SGD(model.parameters(), lr=0.05)

    def loss(sick: Any, model: Any, ids: Any, targets: Any) -> Any:
        return case.loss(sick, model, ids, targets) * targets.numel() * sick.config.dim

    return case.but(optimizer=optimizer, loss=loss, clip=None, learning_rate=0.05)


condition = Condition(
    id="exploding-gradients",
    symptom="the gradient norm runs away against its own history, and the loss after it",
    needs=("grad_norm",),
    uses=("loss", "first_nonfinite", "skipped_step", "param_grad_norm"),
    diagnose=diagnose,
    prescribes=("clip-gradients", "lower-learning-rate"),
    leads_to=(
        "loss-spike",
        "half-precision-overflow",
        "non-finite-weights",
        "scaler-collapse",
        "repetitive-generation",
        "incoherent-generation",
    ),
    inject=inject,
)
