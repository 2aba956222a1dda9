"""Predictions and targets of different shapes broadcast in the loss: every prediction is compared with every target of the batch.

Looks like
    No error. The loss falls to the variance of the targets and stays there; all predictions drift to the targets' mean, whatever the
    input. At most torch's warning about a target size that differs from the input size.

Why
    A model that ends in one output gives (N, 1) and the data set gives (N,), or the other way round: `(N, 1) - (N,)` is (N, N). The
    same happens where log-probabilities (N,) are multiplied by advantages (N, 1), or weights by losses per sample.

Tell apart
    Pairs on purpose (contrastive and ranking losses, distance matrices, quantile grids) are made by an unsqueeze or from tensors that
    both have a gradient, and are not summed up as they are. loss-plateau has no shape to show.

Cure
    Give both the same shape before the loss: `pred.squeeze(-1)`, or `target.unsqueeze(-1)`; assert `pred.shape == target.shape`.

Sources
    PyTorch documentation, "Broadcasting semantics" (backwards compatibility: it "may introduce incompatibilities ... in the case where two
    tensors do not have the same shape, but are broadcastable"); pytorch issue 16190 (mse_loss warns since).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold

GROWTH = Threshold(1, "ratio", source="an operation between two tensors of N elements each, one per sample, has N results")


def diagnose(chart: Chart) -> Diagnosis | None:
    """The first operation on the way to the loss whose operands met in all pairs."""
    found = next((r for r in chart["paired_broadcast"] if r.value > GROWTH), None)
    if found is None:
        return None
    shapes, result = (found.note.get("shapes") or [[], []]), tuple(found.note.get("result") or ())
    given = " and ".join(f"the {role} {tuple(shape)}" for role, shape in zip(found.note.get("roles") or (), shapes))
    text = f"{found.note.get('function')} gets {given}, which broadcast to {result}"
    summary = (
        f"{text}: each of {found.value:.0f} predictions is compared with all {found.value:.0f} targets, and the loss averages over that."
    )
    return Diagnosis(summary, (Evidence(found, GROWTH),), "critical", found.step, found.where, found.source, seconds=found.seconds)


def inject(case: Any) -> Any:
    """Per-sample mean losses get targets of one number per sample in another shape: the wrong one of two views."""

    def broadcast_loss(case: Any, model: Any, ids: Any, targets: Any) -> Any:
        logits = model(ids)
        predicted = logits.mean(dim=(1, 2), keepdim=True).squeeze(-1)
        wanted = targets.float().mean(dim=1)
        return ((predicted - wanted) ** 2).mean()

    return case.but(loss=broadcast_loss)


condition = Condition(
    id="silent-broadcast",
    symptom="predictions and targets broadcast in the loss: each is compared with all of the batch",
    needs=("paired_broadcast",),
    diagnose=diagnose,
    prescribes=("same-shape",),
    leads_to=("loss-plateau", "clipping-saturated"),
    inject=inject,
)
