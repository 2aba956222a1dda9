"""Every target of a batch is ignored, so the loss is a mean over nothing: 0/0, NaN.

Looks like
The loss is NaN at single steps, more often with small batches, short rows or a low masking rate. Gradients may be exactly
zero at that step, so the weights survive and only the loss curve has holes; averaged or accumulated with others, the NaN
spreads.

Why
cross_entropy divides by the number of targets that are not ignore_index. Truncating prompt-and-answer rows from the
right cuts the answer away and leaves only ignored prompt tokens; masking 1 % of 64 tokens leaves nothing in every second
row; a batch can consist of padding alone.

Tell apart
division-by-zero: another count is zero, not that of the loss's targets.
label-misalignment, padding-in-loss: there are targets, but the wrong ones.

Cure
Skip batches without targets, or sum the losses and divide by `count.clamp(min=1)`; mask at least one token per row;
truncate from the left so that the answer stays.

Sources
torch documentation, CrossEntropyLoss: the mean is over the targets that are not ignore_index.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold
from sickbay.core.nonfinite import origins

ALL_IGNORED = Threshold(1.0, "share of targets", source="definition: no target is left for the mean")
LOSSES = frozenset(
    {"cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", "nll_loss_forward", "nll_loss2d_forward"}
)


def diagnose(chart: Chart) -> Diagnosis | None:
    empty = [reading for reading in chart["ignored_targets"] if reading.value >= ALL_IGNORED]
    born = {origin.reading.step: origin.reading.source for origin in origins(chart["first_nonfinite"]) if origin.phase != "weight"}
    nan_loss = {reading.step for reading in chart["loss"] if reading.value != reading.value}
    noticed = {r.step for r in chart["nonfinite_step"] if r.note.get("what") == "loss"}
    bad = [reading for reading in empty if reading.step in born.keys() | nan_loss | noticed]
    if not bad or any(step < bad[0].step for step in born):
        return None
    reading = bad[0]
    steps = len({reading.step for reading in empty})
    return Diagnosis(
        summary=f"every target of a batch is ignored at step {reading.step} ({steps} such step{'s' * (steps > 1)}): the mean loss is 0/0",
        evidence=(Evidence(reading, ALL_IGNORED),),
        severity="critical",
        step=reading.step,
        where=reading.where,
        source=reading.source or born.get(reading.step, ""),
    )


def inject(case: Any) -> Any:
    """Every fourth batch was truncated on the wrong side: only ignored targets are left."""

    def batches(sick: Any, split: str) -> Any:
        import torch

        for index, (ids, targets) in enumerate(case.batches(sick, split)):
            yield ids, torch.full_like(targets, -100) if split == "train" and index % 4 == 3 else targets

    return case.but(batches=batches)


condition = Condition(
    id="missing-targets",
    symptom="every target of a batch is ignored: the loss is a mean over nothing",
    needs=("ignored_targets",),
    uses=("first_nonfinite", "nonfinite_step", "loss"),
    diagnose=diagnose,
    prescribes=("skip-empty-targets",),
    leads_to=("division-by-zero", "non-finite-weights", "scaler-collapse", "loss-spike"),
    inject=inject,
)
