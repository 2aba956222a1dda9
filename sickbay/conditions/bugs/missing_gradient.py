"""Trainable parameters that never receive a gradient.

Looks like
    Nothing raises. A part of the model keeps its initial weights; the loss stops early at what the rest can do alone.

Why
    The graph is cut between the parameter and the loss: .detach(), .item() or .data, a torch.no_grad() block, argmax or rounding, a
    tensor rebuilt with torch.tensor(...), NumPy in between, or activation checkpointing (reentrant) over inputs that need no gradient.
    Or the parameter is not used in the forward at all.

Tell apart
    optimizer-missing-parameters: the gradient is there and nobody applies it. missing-backward: no parameter has any. Frozen parameters
    (requires_grad False) are not counted; experts that no token chose, and heads that are not used, do not change the output and are
    noted without alarm.

Cure
    Reconnect: remove the named operation or give it a gradient (a straight-through estimator, use_reentrant=False). If the part is meant
    to stay as it is, say so with requires_grad_(False).

Sources
    guide, "Implementation Bugs: Gradient Not Flowing"; transformers issues 21381 and 23170 and pull request 42494 (checkpointing cuts the
    gradient); PyTorch documentation, `torch.utils.checkpoint`.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

BACKWARDS = Threshold(3, "backward calls", source="a sparse part may sit out a batch; three without any gradient are a pattern")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """The newest word on each place: a cut graph first, then what stayed without gradient for unknown reasons, then unused parts."""
    absent = chart["gradient_absent"]
    newest = [r for r in (absent.at(where)[-1] for where in absent.places()) if r.value > 0]
    cut = [r for r in newest if r.note.get("changes_output") is True]
    unknown = [r for r in newest if r.note.get("changes_output") is None and float(r.note.get("backwards") or 0) >= BACKWARDS]
    unused = [r for r in newest if r.note.get("changes_output") is False]
    group = cut or unknown or unused
    if not group:
        return NotExamined(f"fewer than {BACKWARDS:.0f} backward calls so far") if newest else None
    most = max(group, key=lambda r: (r.value, -r.step))
    return Diagnosis(
        summary=_summary(most, sum(int(r.value) for r in group)),
        evidence=(Evidence(most, 0.0),),
        severity="critical" if cut else "warning" if unknown else "note",
        certainty="likely" if unknown and not cut else "confirmed",
        step=most.step,
        where=most.where,
        source=most.source,
        seconds=most.seconds,
    )


def _summary(most: Reading, total: int) -> str:
    names = [str(name) for name in most.note.get("names") or ()]
    shown = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    start = f"{total} trainable parameter tensor{'s have' if total != 1 else ' has'} had no gradient in any backward so far{shown}"
    changes = most.note.get("changes_output")
    if changes is True:
        op = f"; the graph is cut at {most.note['op']}" if most.note.get("op") else ""
        return f"{start} although the output depends on them{op}."
    if changes is False:
        return f"{start}: the loss does not depend on them, they are unused."
    ran = f"; they run under {most.note['op']}" if most.note.get("op") else ""
    return f"{start}, over {most.note.get('backwards')} backward calls{ran}."


def inject(case: Any) -> Any:
    """The first block's output is detached, so neither it nor what feeds it gets a gradient."""
    build = case.build

    def build_cut(case: Any) -> Any:
        import torch

        class Detached(torch.nn.Module):
            def __init__(self, block: torch.nn.Module) -> None:
                super().__init__()
                self.block = block

            def forward(self, *inputs: Any) -> torch.Tensor:
                output: torch.Tensor = self.block(*inputs)
                return output.detach()

        model = build(case)
        model.blocks[0] = Detached(model.blocks[0])
        return model

    return case.but(build=build_cut)


condition = Condition(
    id="missing-gradient",
    symptom="trainable parameters never receive a gradient",
    needs=("gradient_absent",),
    diagnose=diagnose,
    prescribes=("reconnect-graph",),
    leads_to=("loss-plateau", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
