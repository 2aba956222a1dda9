"""Trainable parameters get gradients but belong to no optimizer, so they never move.

Looks like
    Nothing raises. The loss falls, but not as far as it should, or not at all; the left-out part keeps its initial weights.

Why
    Layers kept in a plain Python list or dict (model.parameters() does not see them), modules added or replaced after the optimizer was
    built (a new head, LoRA adapters, .to() in old code, a lazily made layer), or a filter by name that misses some.

Tell apart
    missing-gradient: those parameters have no gradient to apply. update-not-applied: the optimizer has them and does not move them.
    Training only a head leaves everything before it out on purpose: that is noted, unless other parameters are frozen
    by requires_grad_(False), which says that the unfrozen ones are meant to learn.

Cure
    Register layers with nn.ModuleList / nn.ModuleDict, finish the model before building the optimizer, and pass model.parameters().

Sources
    PyTorch documentation, `nn.ModuleList` and `torch.optim` ("construct the optimizer after moving the model"); accelerate issue 2665
    (parameters replaced after the optimizer was built).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence


def diagnose(chart: Chart) -> Diagnosis | None:
    """Parameters with gradients and without optimizer, by how they came to be left out; stale ones support it, alone they are a note."""
    missing = [r for r in chart["missing_from_optimizer"] if r.value > 0]
    stale = [r for r in chart["stale_in_optimizer"] if r.value > 0]
    # Who freezes some parameters by requires_grad means the others to learn; otherwise a backbone may be left out on purpose.
    left_out = [r for r in missing if r.note.get("kind") != "upstream" or float(r.note.get("frozen") or 0) > 0]
    group = left_out or missing or stale
    if not group:
        return None
    first = max(group, key=lambda r: r.value)
    return Diagnosis(
        summary=_summary(first, left_out, missing),
        evidence=tuple(Evidence(r, 0.0) for r in (first, *stale[:1]) if r is first or left_out),
        severity="critical" if left_out else "note",
        step=first.step,
        where=first.where,
        source=first.source,
        seconds=first.seconds,
    )


HOW = {
    "upstream": "others are frozen with requires_grad, these were left trainable",
    "unregistered": "the model does not know them as its own, as in a plain list of layers",
    "created-later": "they were made after the optimizer was built",
    "skipped": "the model has them and the optimizer was not given them",
}


def _summary(first: Reading, left_out: list[Reading], missing: list[Reading]) -> str:
    names = [str(name) for name in first.note.get("names") or ()]
    shown = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    share = f", {float(first.note['share']):.0%} of the trainable weights," if first.note.get("share") is not None else ""
    if left_out:
        how = HOW.get(str(first.note.get("kind")), "they were left out")
        return f"{first.value:.0f} parameter tensors{shown}{share} get gradients and are in no optimizer: {how}."
    if missing:
        return f"{first.value:.0f} parameter tensors{shown}{share} before the trained part get gradients that nothing uses."
    return f"The optimizer holds {first.value:.0f} parameter tensors{shown} that the model no longer has."


def inject(case: Any) -> Any:
    """The blocks sit in a plain list, which the model does not register."""
    build = case.build

    def build_unregistered(case: Any) -> Any:
        model = build(case)
        blocks = list(model.blocks)
        del model.blocks
        model.blocks = blocks
        return model

    return case.but(build=build_unregistered)


condition = Condition(
    id="optimizer-missing-parameters",
    symptom="trainable parameters are in no optimizer",
    needs=("missing_from_optimizer",),
    uses=("stale_in_optimizer",),
    diagnose=diagnose,
    prescribes=("register-parameters",),
    leads_to=(
        "loss-plateau",
        "vanishing-gradients",
        "missing-backward",
        "optimizer-not-stepped",
        "update-not-applied",
        "repetitive-generation",
        "incoherent-generation",
    ),
    inject=inject,
)
