"""A weight is already NaN or infinite before the forward pass that shows it.

Looks like
NaN from the very first batch although the data are clean; or right after loading a checkpoint; or, with nothing wrong
in any forward or backward pass, after an update.

Why
A checkpoint saved after the run had gone bad; an initialisation that divides by zero or reads uninitialised memory
(`torch.empty`); an optimizer that divides by zero (eps=0, or an eps that the weights' format rounds to 0); an update in
place by hand. Weights that are NaN after a NaN loss are a consequence, and then the cause is shown instead of this.

Tell apart
non-finite-input: the weights are finite and the batch is not.
exploding-gradients: the weights overflow after their gradients had grown for steps.

Cure
Restore the last weights known to be finite, and check before saving: never overwrite a good checkpoint with one that is
not finite.

Sources
torch.empty: "returns a tensor filled with uninitialized data" (torch documentation). Adam's eps: Kingma & Ba 2015, algorithm 1.
"""

from __future__ import annotations

import math
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, first_by_step, number
from sickbay.core.nonfinite import UPDATE, origins


def diagnose(chart: Chart) -> Diagnosis | None:
    weight = first_by_step(list(chart["nonfinite_weight"]))
    origin = next(iter(origins(chart["first_nonfinite"])), None)
    reached = next((born.reading for born in origins(chart["first_nonfinite"]) if born.phase in UPDATE), None)
    if weight is None and reached is None:
        return None
    from_the_start = weight is not None and weight.note.get("updates_before") == 0
    step = weight.step if weight is not None else math.inf
    before = origin if origin is not None and origin.phase not in UPDATE and origin.reading.step <= step else None
    if before is not None and not from_the_start and reached is None:
        return None
    reading: Reading = weight or reached or chart["first_nonfinite"][0]
    when = "before the first update" if from_the_start else f"after {reading.note.get('updates_before', reading.step)} updates"
    # Where the operation is no other condition's, this finding stands alone and must say what is known of it.
    made = f"; the first such value came from {before.op} at {before.place} in step {before.reading.step}" if before else ""
    return Diagnosis(
        summary=f"{number(reading.value)} elements of {reading.where or 'the weights'} are NaN or infinite {when}{made}",
        evidence=(Evidence(reading, 0.0),),
        severity="critical",
        step=before.reading.step if before else reading.step,
        where=reading.where,
        source=(before.reading.source if before else reading.source) or (origin.reading.source if origin else ""),
        certainty="confirmed" if from_the_start else "likely",
    )


def inject(case: Any) -> Any:
    """One weight of the last feed-forward block is NaN when training starts."""

    def build(sick: Any) -> Any:
        model = case.build(sick)
        model.blocks[-1].feed_forward.down.weight.data[0, 0] = float("nan")
        return model

    return case.but(build=build)


condition = Condition(
    id="non-finite-weights",
    symptom="a weight is already NaN or infinite before the forward pass",
    needs=("nonfinite_weight",),
    uses=("first_nonfinite",),
    diagnose=diagnose,
    prescribes=("restore-weights",),
    leads_to=("scaler-collapse",),
    inject=inject,
)
