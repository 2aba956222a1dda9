"""The GradScaler halves its scale again and again, and skips the optimizer's steps without a word.

Looks like
The loss stands still or crawls, without an error and without a NaN in sight: every overflow is caught, and the step is
left out. The scale falls from 65,536 toward zero.

Why
A GradScaler multiplies the loss so that small float16 gradients survive, halves the factor when a gradient overflows and
skips that step. That is right a few times at the start. If gradients overflow at every scale, something else is
infinite: the forward pass in float16, a NaN in the data, a weight.

Tell apart
half-precision-overflow, non-finite-input and the like: the operation that makes the infinity; then it is shown first.
optimizer-not-stepped: nothing calls step at all.
A skip right after the scale has grown is the scaler probing its limit, by design.

Cure
Find what overflows and run it in float32, or train in bfloat16, which needs no scaler. If only the start is too high,
give the scaler a lower `init_scale`.

Sources
torch.amp.GradScaler: init_scale 65,536, backoff 0.5, growth every 2000 steps. Micikevicius et al. 2018, section 3.2.
A collapse in the wild: EleutherAI/gpt-neox#291 (scale halved to its minimum).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold, number

WARM_UP = Threshold(10, "steps", source="ten halvings lead from 2**24 to 2**14: no usual init_scale needs more")
SKIPPED_SHARE = Threshold(0.05, "share of steps", source="a settled scaler skips 1 step in 2000 (growth_interval of torch.amp.GradScaler)")
FEWEST_SKIPS = Threshold(3, "steps", source="two may be one unlucky batch and its echo")
SMALLEST_SCALE = Threshold(1.0, "factor", source="below 1 the scaler shrinks gradients: the opposite of its purpose")
MOSTLY = Threshold(0.5, "share of steps", source="more steps skipped than taken")


def diagnose(chart: Chart) -> Diagnosis | None:
    scales = list(chart["loss_scale"])
    skips = _skips(chart)
    begin = (scales[0].step if scales else 0) + WARM_UP
    late = _unprovoked([reading for reading in skips if reading.step >= begin], scales)
    steps = sum(1 for reading in chart["skipped_step"] if reading.step >= begin)
    share = len(late) / steps if steps else 0.0
    low = next((r for r in scales if r.value < SMALLEST_SCALE and any(skip.step <= r.step for skip in skips)), None)
    if low is None and (len(late) < FEWEST_SKIPS or share <= SKIPPED_SHARE):
        return None
    seen = low or late[0]
    return Diagnosis(
        summary=f"{len(skips)} of {len(chart['skipped_step'])} optimizer steps were skipped, and the loss scale fell from "
        f"{number(scales[0].value)} to {number(scales[-1].value)}",
        evidence=(Evidence(seen, SMALLEST_SCALE if low else None),),
        severity="critical" if low is not None or share > MOSTLY else "warning",
        step=skips[0].step,
        where=seen.where,
        source=seen.source,
    )


def _skips(chart: Chart) -> list[Reading]:
    """The steps left out. A fused optimizer is called all the same and leaves the step out inside: then the fall of the scale tells."""
    flagged = [reading for reading in chart["skipped_step"] if reading.value > 0]
    scales = list(chart["loss_scale"])
    return flagged or [now for before, now in itertools.pairwise(scales) if now.value < before.value]


def _unprovoked(skips: list[Reading], scales: list[Reading]) -> list[Reading]:
    """The skips that no growth of the scale since the previous skip explains."""
    grown = [now.step for before, now in itertools.pairwise(scales) if now.value > before.value]
    kept, previous = [], -math.inf
    for skip in skips:
        if not any(previous < step <= skip.step for step in grown):
            kept.append(skip)
        previous = skip.step
    return kept


def inject(case: Any) -> Any:
    """Gradients pass through float16 multiplied by 1e9, as in a communication hook that sums before it divides."""
    scalers: list[Any] = []

    def scaler() -> Any:
        import torch

        if not scalers:
            scalers.append(torch.amp.GradScaler("cpu"))
        return scalers[0]

    def backward(sick: Any, loss: Any) -> None:
        scaler().scale(loss / sick.accumulation).backward()

    def update(sick: Any, model: Any, optimizer: Any) -> None:
        for parameter in model.parameters():
            parameter.grad = (parameter.grad * 1e9).half().float() / 1e9
        scaler().step(optimizer)
        scaler().update()
        optimizer.zero_grad(set_to_none=True)

    return case.but(backward=backward, update=update)


condition = Condition(
    id="scaler-collapse",
    symptom="the loss scale halves again and again, and optimizer steps are skipped silently",
    needs=("loss_scale", "skipped_step"),
    diagnose=diagnose,
    prescribes=("use-bfloat16", "lower-loss-scale"),
    leads_to=("optimizer-not-stepped",),
    inject=inject,
)
