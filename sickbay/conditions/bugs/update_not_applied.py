"""The optimizer steps, and most elements that have a gradient do not move.

Looks like
    Gradients, norms and learning rate are all healthy; the loss falls very slowly or only through biases and small tensors.

Why
    A hand-written optimizer indexes the wrong element, writes to a copy (p = p - lr * g, or p.data of a clone), or a kernel that ignores
    non-contiguous memory leaves the result in a temporary; the optimizer may also hold copies of the model's parameters.

Tell apart
    low precision loses updates below one unit in the last place: those that rounding explains are taken off here. Elements without a
    gradient (unused rows of an embedding) are not counted, nor are steps with learning rate 0.

Cure
    Use torch.optim, or write in place under no_grad: p.add_(g, alpha=-lr). Then compare one tensor before and after a step.

Sources
    E. Simon 2025, "the bug that taught me more about PyTorch than years of using it" (non-contiguous addcmul on MPS); PyTorch
    documentation, `torch.optim` (updates are in place).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

LIMIT = Threshold(
    0.5, "share of elements", source="calibration: 0 but for rounding with SGD, momentum and Adam; a wrong index leaves all but a few"
)
STEPS = Threshold(2, "steps", source="one sampled step may be a warm-up's zero or a skipped one")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Tensors of which more than half the elements with a gradient stay put in two sampled steps, rounding apart."""
    still = {r.step for r in chart["learning_rate"] if r.value == 0} | {r.step for r in chart["skipped_step"] if r.value}
    seen = Series(r for r in chart["unmoved_share"].finite() if r.step not in still)
    if len(set(seen.steps)) < STEPS:
        return NotExamined(f"{len(set(seen.steps))} sampled steps that were to move the weights; this needs {STEPS:.0f}")
    places = seen.places()
    stuck = {where: Series(r for r in seen.at(where) if r.value * (1 - float(r.note.get("rounding") or 0)) > LIMIT) for where in places}
    stuck = {where: over for where, over in stuck.items() if len(over) >= STEPS and 2 * len(over) > len(seen.at(where))}
    by_hand = any(r.note.get("by_hand") for over in stuck.values() for r in over)
    if not stuck or (by_hand and 2 * len(stuck) <= len(places)):
        return None  # a step written by hand may move a few rows of a tensor on purpose, but not of most
    worst = max((over[0] for over in stuck.values()), key=lambda r: (float(r.note.get("elements") or 0), r.value))
    rounding = float(worst.note.get("rounding") or 0)
    return Diagnosis(
        summary=f"{worst.value:.1%} of the elements of {worst.where or 'a tensor'} that have a gradient did not move in a step "
        f"(0 is right; rounding explains {rounding:.0%} of them); {len(stuck)} of {len(places)} tensors are like it.",
        evidence=(Evidence(worst, LIMIT),),
        severity="critical",
        step=min(over[0].step for over in stuck.values()),
        where=worst.where,
        source=worst.source,
        seconds=worst.seconds,
    )


def inject(case: Any) -> Any:
    """A hand-written optimizer that writes one element of each tensor: the tensor's number instead of the loop's index."""

    def optimizer_of_one_element(case: Any, model: Any) -> Any:
        import torch

        class OneElement(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure: Any = None) -> Any:
                number = 0
                for group in self.param_groups:
                    for weight in group["params"]:
                        if weight.grad is not None:
                            weight.view(-1)[number % weight.numel()] -= group["lr"] * weight.grad.sum()
                        number += 1

        return OneElement(model.parameters(), {"lr": case.learning_rate})

    return case.but(optimizer=optimizer_of_one_element)


condition = Condition(
    id="update-not-applied",
    symptom="elements that have a gradient do not move when the optimizer steps",
    needs=("unmoved_share",),
    uses=("learning_rate", "skipped_step"),
    diagnose=diagnose,
    prescribes=("fix-optimizer",),
    leads_to=("clipping-saturated", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
