"""The outputs of one row of a batch depend on the other rows.

Looks like
    Nothing raises. Training may even look good, because the rows' answers help one another; a prediction changes with the company it is
    made in, and batch size 1 gives other results than batch size 32.

Why
    A view or reshape in the wrong order (transpose was meant), batch_first set one way and fed the other so that attention runs over the
    batch, or a mean, norm or softmax over dimension 0.

Tell apart
    Batch-norm mixes rows on purpose and is not judged. A contrastive loss compares rows, but the model's outputs stay per row.
    causal-leak and mask-blocks-past follow from attention over the wrong dimension: mend this first.

Cure
    Find the first module whose output for row 0 moves with row 1, and mend its reshape, transpose or dim. Then ask again.

Sources
    lightning-bolts, BatchGradientVerification and its issue 568 (batch-norm is a false alarm); PyTorch documentation,
    `nn.Transformer` (batch_first is False by default); transformers issue 47394 (a shift that ran across rows).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

LIMIT = Threshold(1e-3, "ratio", source="calibration: exactly 0 between independent rows; float32 reordering noise is near 1e-6")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Rows that move when only another row is changed, in a model without batch-norm."""
    seen = Series(r for r in chart["row_influence"].finite() if not r.note.get("batch_norm"))
    over = Series(r for r in seen if r.value > LIMIT)
    worst = over.worst()
    if worst is None:
        return None if seen else NotExamined("batch-norm mixes the rows by design, or the outputs were not finite")
    return Diagnosis(
        summary=f"Changing one row of the batch moves the other rows' outputs by {worst.value:.2g} times what it moves its own "
        "(0 if rows are independent): a dimension is confused with the batch's.",
        evidence=(Evidence(worst, LIMIT),),
        severity="critical",
        step=over[0].step,
        where=worst.where,
        source=worst.source,
        seconds=over[0].seconds,
    )


def inject(case: Any) -> Any:
    """The last norm takes its mean over the batch instead of the features."""
    build = case.build

    def build_mixed(case: Any) -> Any:
        import torch

        class NormOverRows(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5)

        model = build(case)
        model.final_norm = NormOverRows()
        return model

    return case.but(build=build_mixed)


condition = Condition(
    id="batch-mixing",
    symptom="one row's output depends on the other rows of the batch",
    needs=("row_influence",),
    diagnose=diagnose,
    prescribes=("keep-batch-axis",),
    leads_to=(
        "loss-plateau",
        "causal-leak",
        "mask-blocks-past",
        "padding-attended",
        "packing-contamination",
        "repetitive-generation",
        "incoherent-generation",
    ),
    inject=inject,
)
