"""A document packed into a row sees its neighbour in the same row.

Looks like
    Nothing raises, and pre-training hardly shows it. Fine-tuning on packed examples loses quality against unpadded, unpacked training;
    answers carry over names and facts from an unrelated example.

Why
    Packing puts several documents into one row; a plain causal mask lets each read all before it. The block-diagonal mask, the restarted
    positions or the cumulative lengths were prepared and then dropped by an attention path that takes none of them.

Tell apart
    causal-leak is about later tokens. Pre-training code that joins documents with an end token and lets them see each other does so on
    purpose: only documents that the script keeps apart, by positions, numbers or lengths, are examined.

Cure
    Give attention a block-diagonal mask (or the documents' cumulative lengths) and restart the positions with each document. Then ask
    again: change one document and see that the other's outputs stay.

Sources
    Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination", arXiv 2107.02027; transformers pull request 46634
    (a fast path that dropped the mask), trl issues 784 and 805, LLaMA-Factory issues 4224 and 7318.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

LIMIT = Threshold(1e-3, "ratio", source="calibration: exactly 0 with a block-diagonal mask; float32 reordering noise is near 1e-6")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """A packed document's outputs that move when only its neighbour is changed."""
    seen = Series(r for r in chart["packing_influence"].finite() if not r.note.get("batch_norm"))
    over = Series(r for r in seen if r.value > LIMIT)
    worst = over.worst()
    if worst is None:
        return None if seen else NotExamined("batch-norm mixes positions by design, or the outputs were not finite")
    return Diagnosis(
        summary=f"Changing one packed document moves its neighbour's outputs by {worst.value:.2g} times what it moves its own "
        f"(0 if they are kept apart; documents known by {worst.note.get('known_by') or 'their boundaries'}).",
        evidence=(Evidence(worst, LIMIT),),
        severity="warning",
        step=over[0].step,
        where=worst.where,
        source=worst.source,
        seconds=over[0].seconds,
    )


def inject(case: Any) -> Any:
    """Rows hold two documents each, the model is told so, and attention ignores it."""
    build = case.build

    def build_undivided(case: Any) -> Any:
        from torch.nn import functional

        model = build(case)
        for block in model.blocks:
            block.attention.attend = lambda query, key, value, visible, dropout: functional.scaled_dot_product_attention(
                query, key, value, None, dropout, is_causal=True
            )
        return model

    def loss_of_packed(case: Any, model: Any, ids: Any, targets: Any) -> Any:
        import torch

        second = torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] // 2
        logits = model(ids, documents=second.long().expand(ids.shape))
        # The first document's last target would be the second's first token.
        ends = torch.nn.functional.pad(second[1:] & ~second[:-1], (0, 1))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.masked_fill(ends, -100).flatten())

    return case.but(build=build_undivided, loss=loss_of_packed)


condition = Condition(
    id="packing-contamination",
    symptom="a packed document sees its neighbour",
    needs=("packing_influence",),
    diagnose=diagnose,
    prescribes=("document-mask",),
    inject=inject,
)
