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
    steps = list(chart["skipped_step"])
    scales = {reading.step: reading for reading in chart["loss_scale"]}
    late = [reading for reading in steps if reading.step >= steps[0].step + WARM_UP]
    skips = _unprovoked([reading for reading in late if reading.value], scales)
    share = len(skips) / len(late) if late else 0.0
    low = next((r for r in chart["loss_scale"] if r.value < SMALLEST_SCALE and any(s.value and s.step <= r.step for s in steps)), None)
    if low is None and (len(skips) < FEWEST_SKIPS or share <= SKIPPED_SHARE):
        return None
    seen = low or skips[0]
    newest = chart["loss_scale"][-1].value if scales else float("nan")
    return Diagnosis(
        summary=f"{sum(1 for r in steps if r.value)} of {len(steps)} optimizer steps were skipped; the loss scale is {number(newest)}",
        evidence=(Evidence(seen, SMALLEST_SCALE if low else 0.0),),
        severity="critical" if low is not None or share > MOSTLY else "warning",
        step=next(r.step for r in steps if r.value),
        where=seen.where,
        source=seen.source,
    )


def _unprovoked(skips: list[Reading], scales: dict[int, Reading]) -> list[Reading]:
    """The skips that no growth of the scale since the previous skip explains."""
    kept, before = [], float("inf")
    for skip in skips:
        reached = scales[skip.step - 1].value if skip.step - 1 in scales else before
        if reached <= before:
            kept.append(skip)
        before = scales[skip.step].value if skip.step in scales else reached
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
