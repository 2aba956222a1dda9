"""Two tensors met in an operation that their shapes do not allow.

Looks like
    The script stops with "mat1 and mat2 shapes cannot be multiplied", "The size of tensor a must match the size of tensor b",
    "shape '[...]' is invalid for input of size ..." or an expected input of another rank.

Why
    Most often one of three slips: a matrix used without its transpose (K instead of K^T, `x @ weight` instead of `x @ weight.T`),
    heads not split (or split by the wrong factor) before attention, or a missing or surplus batch dimension
    ((sequence, hidden) where (batch, sequence, hidden) is meant, or batch_first set one way and fed the other).

Tell apart
    token-id-out-of-range is about a value, not a shape. Shapes that do not match but broadcast raise nothing and are another fault.

Cure
    Change the named line so that the two sizes shown agree. The shapes along the module path tell where the wrong size came in:
    the first module whose input is not what its weight expects.

Sources
    guide, "Implementation Bugs: Dimension Mismatches"; PyTorch documentation, "Broadcasting semantics" and `torch.matmul`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence

SHOWN = 3  # shapes or modules in the sentence; all of them stand in the record


def diagnose(chart: Chart) -> Diagnosis | None:
    """The first uncaught exception whose cause is a shape; None if there was none."""
    error = next((r for r in chart["exception"] if r.note.get("kind") == "shape"), None)
    if error is None:
        return None
    note = error.note
    shapes = ", ".join(f"{s.get('name') or 'operand'} {_size(s.get('shape'))}" for s in (note.get("shapes") or ())[:SHOWN])
    first_line = next(iter(str(note.get("message") or note.get("type") or "").splitlines()), "")
    seen = f"{note.get('operation') or 'an operation'} got {shapes}" if shapes else first_line
    likely = f": {str(note['likely']).rstrip('.')}" if note.get("likely") else ""
    path = [p for p in note.get("path") or () if p.get("module") and p.get("shape_in")]
    way = " -> ".join(f"{p['module']} {_size(p['shape_in'])}" for p in path[-SHOWN:])
    on_the_way = f" (on the way: {way})" if way else ""
    return Diagnosis(
        summary=f"The shapes do not fit: {seen}{likely}{on_the_way}.",
        evidence=(Evidence(error, label=str(note.get("type") or "exception")),),
        severity="critical",
        step=error.step,
        where=error.where,
        source=error.source,
        seconds=error.seconds,
    )


def _size(shape: Any) -> str:
    """One shape as a tuple, several by the names they are given under."""
    if isinstance(shape, Mapping):
        return ", ".join(f"{name} {_size(size)}" for name, size in list(shape.items())[:SHOWN])
    return str(tuple(shape or ()))


def inject(case: Any) -> Any:
    """A feed-forward matrix is used without its transpose."""
    build = case.build

    def build_untransposed(case: Any) -> Any:
        import torch

        class Untransposed(torch.nn.Module):
            def __init__(self, linear: torch.nn.Linear) -> None:
                super().__init__()
                self.weight = linear.weight

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x @ self.weight

        model = build(case)
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and module.in_features == case.config.hidden_dim != module.out_features:
                model.set_submodule(name, Untransposed(module))
                return model
        raise ValueError("the model has no linear map out of the feed-forward width")

    return case.but(build=build_untransposed)


condition = Condition(
    id="shape-mismatch",
    symptom="the script stops because two tensors' shapes do not fit together",
    needs=("exception",),
    diagnose=diagnose,
    prescribes=("fix-shape",),
    inject=inject,
)
