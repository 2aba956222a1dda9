"""The model is called once per example although the examples could go together.

Looks like
    The time of a step grows in proportion to the batch; the processor or GPU is hardly used; each call has a first dimension of 1.

Why
    A loop `for example in batch: model(example)` pays the fixed cost of every operation once per example, and its matrices have too few
    rows to keep the hardware busy.

Tell apart
    Accumulating gradients over single rows because memory allows no more is a choice: there each row is fetched on its own. Rows of
    different lengths, an agent's steps, and calls that pass on a state need one another or cannot be stacked.

Cure
    Stack the examples (pad_sequence and a mask where lengths differ), one forward, one backward of the mean loss.

Sources
    Goyal et al. 2017, arXiv 1706.02677, section 2 (the mean over a minibatch is the mean of its parts); PyTorch documentation, performance
    tuning guide; PyTorch forum, "Batch processing vs looping over samples".
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

SAVED = Threshold(0.4, "share of step time", source="the call on all rows together, measured: less is not worth a change of the loop")
INSIDE = Threshold(0.2, "share of step time", source="as for a loop over positions: one call was measured in place of the loop")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """A step's single-row calls that one call would save; a note where the rows do not lie in one tensor."""
    inside = chart["loop_gain"].worst()
    if inside is not None and inside.note.get("per_row") and inside.value >= INSIDE:
        note = inside.note
        text = f"The forward calls {note['operation']} {note['count']} times, once for each of its {note['width']} rows; "
        text += f"one call for all saves {inside.value:.0%} of the step."
        return Diagnosis(text, (Evidence(inside, INSIDE),), "warning", inside.step, inside.where, inside.source, seconds=inside.seconds)
    calls = chart["single_forwards"].worst()
    if calls is None and inside is None:
        return NotExamined(chart.why_unobserved("loop_gain") or "no step was profiled")
    if calls is None or calls.value < 2 or calls.note["saved"] < SAVED:
        return None
    note = calls.note
    text = f"The model is called {calls.value:.0f} times in a step on one row of shape {tuple(note['shape'])} each; "
    text += f"one call on all of them is {note['gain']:.1f} times as fast and saves {note['saved']:.0%} of the step."
    severity = "warning" if note["same_storage"] else "note"
    return Diagnosis(text, (Evidence(calls, 1.0),), severity, calls.step, calls.where, calls.source, seconds=calls.seconds)  # type: ignore[arg-type]


def inject(case: Any) -> Any:
    """The loss is the mean over the rows, each of which goes through the model alone."""
    loss = case.loss

    def row_by_row(case: Any, model: Any, ids: Any, targets: Any) -> Any:
        return sum(loss(case, model, ids[i : i + 1], targets[i : i + 1]) for i in range(len(ids))) / len(ids)

    return case.but(loss=row_by_row, batch_size=max(case.batch_size, 16))


condition = Condition(
    id="unbatched-forward",
    symptom="the model is called once per example",
    needs=(),
    uses=("single_forwards", "loop_gain"),
    diagnose=diagnose,
    prescribes=("stack-examples",),
    leads_to=("small-batch", "slow-matmul"),
    inject=inject,
)
