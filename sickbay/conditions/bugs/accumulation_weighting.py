"""The accumulated gradient is not the gradient of the joined batch: micro-batches are weighted wrongly.

Looks like
    Results change with the number of micro-batches although the total batch stays the same; the reported loss may be right all the same.
    Undivided: the step is as if the learning rate were k times higher (with clipping: always clipped). Divided twice: 1/k of it.

Why
    loss.backward() on k micro-batches sums k means: the division by k is missing, or is done both by hand and by the framework. With a
    mean over unequal numbers of tokens each micro-batch weighs the same, so tokens of short ones weigh more. Gradients that are divided
    after every backward, sum and all, leave the first micro-batch 1/k^k. A last cycle of fewer than k micro-batches is zeroed without
    a step. transformers' Trainer leaves the division to a model whose forward takes **kwargs, and several such models (T5 among them)
    take num_items_in_batch and do not use it: their micro-batches are summed.

Tell apart
    gradients-not-zeroed keeps gradients beyond the step. A loss that is a sum over tokens has large values by choice and is not judged.
    A cycle dropped because its loss was not finite is a precaution, not a fault.

Cure
    Sum the losses of all micro-batches and divide by the number of counted targets of the whole step; step on the last partial cycle.
    Under transformers' Trainer with a model that ignores num_items_in_batch: model.accepts_loss_kwargs = False, or compute_loss_func.

Sources
    guide, "Memory Issues: Batch Size Too Large" (gradient accumulation); transformers pull request 34191 and the fixes that followed it;
    accelerate issue 641.
"""

from __future__ import annotations

import statistics
from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

TOLERANCE = Threshold(
    0.15, "share", source="k and 1/k are exact by construction; 15 % is left for auxiliary losses, and keeps k = 2 apart from 1"
)
UNEQUAL = Threshold(0.2, "share", source="a micro-batch off by a fifth of its weight; batches of equal length have 0")
DROPPED = Threshold(0.05, "share of backward calls", source="a partial cycle once in twenty or less is noise beside the order of the data")
STEPS = Threshold(2, "steps", source="one step may be the last, partial cycle")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Summed or twice divided losses first, then unequal token counts, then cycles that were thrown away."""
    weights = Series(r for r in chart["loss_weight_sum"].finite() if float(r.note.get("count") or 0) >= 2)
    if len(weights) < STEPS:
        return NotExamined(f"{len(weights)} steps with gradient accumulation; this needs {STEPS:.0f}")
    again = [r for r in weights if r.note.get("divided_between") and _worst(r) > UNEQUAL]
    if 2 * len(again) > len(weights):
        return Diagnosis(_between(again[0]), (Evidence(again[0], 1.0),), "critical", **_place(again[0]))
    summed = [r for r in weights if abs(r.value / float(r.note["count"]) - 1) <= TOLERANCE]
    divided = [r for r in weights if abs(r.value * float(r.note["count"]) - 1) <= TOLERANCE]
    for group, meaning in ((summed, "their sum, not their mean"), (divided, "their mean divided by the number once more")):
        if 2 * len(group) > len(weights):
            k = float(group[0].note["count"])
            text = f"The weights of {k:.0f} micro-batches add up to {group[0].value:.3g} (1 is right): the step uses {meaning}."
            return Diagnosis(text, (Evidence(group[0], 1.0),), "critical", **_place(group[0]))
    worst = weights[max(range(len(weights)), key=lambda i: _worst(weights[i]))]
    typical = statistics.median(_worst(r) for r in weights)
    if typical > UNEQUAL:
        text = f"Micro-batches of one step weigh up to {_worst(worst):.0%} off their share of tokens (typically {typical:.0%}; 0 is right)."
        return Diagnosis(text, (Evidence(worst, 1.0),), "warning", **_place(worst))
    return _dropped(chart["dropped_backwards"], sum(float(r.note["count"]) for r in weights))


def _dropped(dropped: Series, used: float) -> Diagnosis | None:
    """A finding if cycles with a finite loss were zeroed without a step: a warning beyond 5 % of all backward calls."""
    lost = [r for r in dropped.finite() if r.value > 0 and r.note.get("finite_loss") is not False]
    if not lost:
        return None
    number = sum(r.value for r in lost)
    share = number / (number + used)
    text = f"{number:.0f} backward calls ({share:.0%}) were zeroed before any step used them, as in a last, partial cycle."
    return Diagnosis(text, (Evidence(lost[0], 0.0),), "warning" if share > DROPPED else "note", **_place(lost[0]))


def _between(reading: Any) -> str:
    weights = ", ".join(f"{float(weight):.3g}" for weight in list(reading.note.get("weights") or ())[:8])
    return f"Accumulated gradients are divided once more after every micro-batch: these weigh {weights} where each should weigh the same."


def _worst(reading: Any) -> float:
    """The largest relative deviation from token weighting in one step; 0 where it is unknown."""
    worst = float(reading.note.get("worst") or 0)
    return worst if worst == worst else 0.0


def _place(reading: Any) -> dict[str, Any]:
    return {"step": reading.step, "where": reading.where, "source": reading.source, "seconds": reading.seconds}


def inject(case: Any) -> Any:
    """Four micro-batches a step, and the loss of each is not divided."""
    return case.but(accumulation=max(4, case.accumulation), backward=lambda case, loss: loss.backward())


condition = Condition(
    id="accumulation-weighting",
    symptom="accumulated micro-batches are weighted wrongly: summed, divided twice, by unequal token counts, or dropped",
    needs=("loss_weight_sum",),
    uses=("dropped_backwards",),
    diagnose=diagnose,
    prescribes=("weight-by-tokens",),
    leads_to=("clipping-saturated", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
