"""Gradients are clipped while they are still multiplied by the loss scale, so nearly all of them is cut away.

Looks like
Mixed-precision training in float16 converges far more slowly than float32, or only when clipping is off. No error, no
NaN; the clip reports norms of many thousands at every step.

Why
The scaler multiplies the loss, and so the gradients, by up to 65,536. A clip to 1.0 before `unscale_` leaves a scaled norm
of 1, which after unscaling is 1/65,536: the learning rate is divided by the scale, and under Adam every step has the
same length and the epsilon takes over.

Tell apart
learning-rate-too-low: the gradients reach the optimizer in full.
Clipping to max_norm times the scale is the same as unscaling first, and is not this.

Cure
Call `scaler.unscale_(optimizer)` before `clip_grad_norm_`, then `scaler.step(optimizer)` as before; it does not unscale twice.

Sources
torch documentation, "Automatic Mixed Precision examples: gradient clipping". Lightning-AI/pytorch-lightning#9599.
"""

from __future__ import annotations

import math
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold, number

SCALE = Threshold(1.0, "loss scale", source="definition: at a scale of 1 the order does not matter")
TIMES = Threshold(2, "steps", source="every step has the same order of calls; one may be a script's own probe of the norm")


def diagnose(chart: Chart) -> Diagnosis | None:
    limits = {reading.step: float(reading.note.get("max_norm", 0.0)) for reading in chart["clip_norm"]}
    wrong = [reading for reading in chart["clip_on_scaled"] if reading.value > SCALE and not _allowed(reading, limits)]
    if len({reading.step for reading in wrong}) < TIMES:
        return None
    first = wrong[0]
    return Diagnosis(
        summary=f"gradients were clipped while still multiplied by the loss scale of {number(first.value)}, in {len(wrong)} steps: "
        "call unscale_ first",
        evidence=(Evidence(first, SCALE),),
        severity="critical",
        step=first.step,
        where=first.where,
        source=first.source,
    )


def _allowed(reading: Reading, limits: dict[int, float]) -> bool:
    """True where the limit itself was multiplied by the scale, or is infinite because only the norm was wanted."""
    limit = limits.get(reading.step, 0.0)
    return limit >= reading.value or math.isinf(limit)


def inject(case: Any) -> Any:
    """Scale, clip, step: unscale_ was forgotten."""
    scalers: list[Any] = []

    def scaler() -> Any:
        import torch

        if not scalers:
            scalers.append(torch.amp.GradScaler("cpu", init_scale=2.0**12))
        return scalers[0]

    def backward(sick: Any, loss: Any) -> None:
        scaler().scale(loss / sick.accumulation).backward()

    def update(sick: Any, model: Any, optimizer: Any) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(model.parameters(), sick.clip or 1.0)
        scaler().step(optimizer)
        scaler().update()
        optimizer.zero_grad(set_to_none=True)

    return case.but(backward=backward, update=update)


condition = Condition(
    id="clip-before-unscale",
    symptom="gradients are clipped while they are still multiplied by the loss scale",
    needs=("clip_on_scaled",),
    uses=("clip_norm",),
    diagnose=diagnose,
    prescribes=("unscale-before-clip",),
    inject=inject,
)
