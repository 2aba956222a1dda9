"""Gradients are carried over from one optimizer step into the next: nothing sets them to zero between.

Looks like
The loss falls at first and then wanders, oscillates or blows up; with clipping the blow-up is hidden and the run is only
slow and restless. Under Adam it can look almost healthy.

Why
backward() adds to .grad. Without zero_grad every step follows the sum of all gradients since the start: a momentum that
never decays. The direction is stale and its length grows with the number of steps.

Tell apart
Gradient accumulation on purpose: several backward calls, then one step, then zero. This is about what is still there when
the next cycle begins.
learning-rate-too-high: the steps are too large although each follows its own batch alone.

Cure
Call `optimizer.zero_grad(set_to_none=True)` once per step, right after `optimizer.step()` or right before the first backward.

Sources
torch documentation, "Zeroing out gradients in PyTorch". The measure is exact: the norm of what is still there when the
first backward after a step begins, over the norm at that step; 0 when zeroed, 1 when not.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold, number

CARRIED = Threshold(0.5, "share of norm", source="between the only two exact values, 0 (zeroed) and 1 (kept)")
TIMES = Threshold(2, "steps", source="once may be the end of a phase of training; twice is a habit")
HABIT = Threshold(0.5, "share of steps", source="most steps, not an exception")


def diagnose(chart: Chart) -> Diagnosis | None:
    dropped = {reading.step for reading in chart["dropped_backwards"]}
    for place in chart["carried_gradient"].places():
        known = [r for r in chart["carried_gradient"].at(place) if r.value == r.value]
        # Zeroed after another model's backward ran through it (a GAN's discriminator) counts as zeroed.
        carried = [r for r in known if r.value > CARRIED and r.step not in dropped]
        if len(carried) < TIMES or len(carried) <= HABIT * len(known):
            continue
        return Diagnosis(
            summary=f"{number(100 * carried[0].value)} % of the gradient was still there when the next step's backward began, "
            f"in {len(carried)} of {len(known)} steps: nothing zeroes it",
            evidence=(Evidence(carried[0], CARRIED),),
            severity="critical",
            step=carried[0].step,
            where=place,
            source=carried[0].source,
        )
    return None


def inject(case: Any) -> Any:
    """Clip and step, and forget zero_grad."""

    def update(sick: Any, model: Any, optimizer: Any) -> None:
        from torch.nn.utils import clip_grad_norm_

        if sick.clip is not None:
            clip_grad_norm_(model.parameters(), sick.clip)
        optimizer.step()

    return case.but(update=update)


condition = Condition(
    id="gradients-not-zeroed",
    symptom="gradients are carried over from one optimizer step into the next",
    needs=("carried_gradient",),
    uses=("dropped_backwards",),
    diagnose=diagnose,
    prescribes=("zero-gradients",),
    leads_to=(
        *(
            "learning-rate-too-high",
            "exploding-gradients",
            "loss-spike",
            "attention-logit-growth",
            "repetitive-generation",
            "incoherent-generation",
        ),
        *("softmax-overflow", "half-precision-overflow", "non-finite-weights", "scaler-collapse"),
    ),
    inject=inject,
)
