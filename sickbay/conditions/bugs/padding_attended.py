"""The outputs of real tokens depend on what stands in the padding.

Looks like
    Nothing raises. The same text gives different results in different batches, quality drops as batches are padded more, and evaluation
    with batch size 1 disagrees with evaluation in batches.

Why
    The padding mask is not passed to the model, is inverted, or is lost on the way (a wrapper that does not forward attention_mask, a
    pooling that averages over all positions, padding on the left of a causal model without a mask).

Tell apart
    Padding on the right of a causal model is harmless to the real tokens before it and gives 0 here. padding-in-loss is about targets.
    Batch-norm mixes positions by design and is not judged. Convolutions over padding that is embedded as zero, with max-pooling, are
    healthy: what would stand there instead moves them, that it stands there does not.

Cure
    Pass attention_mask / src_key_padding_mask everywhere, and average over real positions only. Then ask again: change the padding and
    see that no real output moves.

Sources
    Vaswani et al. 2017, section 3.2.3 (masking by -inf before the softmax); transformers documentation, "attention mask"; PyTorch
    documentation, `nn.TransformerEncoder` (src_key_padding_mask).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from sickbay.core.chart import Chart, Reading, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

LIMIT = Threshold(1e-3, "ratio", source="calibration: exactly 0 with masked padding; float32 reordering noise is near 1e-6")
SHORTENED = Threshold(
    0.1,
    "ratio",
    source="calibration: convolutions over zero padding and max-pooling give 0 to 0.03; learned padding or a recurrent end, over 0.5",
)


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Real positions that move when only padding is changed."""
    seen = Series(r for r in chart["padding_influence"].finite() if not r.note.get("batch_norm"))
    moved = Series(r for r in seen if r.value > LIMIT)
    over = Series(r for r in moved if not _cut_off(r) <= (LIMIT if r.note.get("attention") else SHORTENED))
    worst = over.worst()
    if worst is None or 2 * len(over) <= len(moved):  # between two looks a bias may come to pass for the largest value of an empty place
        return None if seen else NotExamined("batch-norm mixes positions by design, or the outputs were not finite")
    return Diagnosis(
        summary=f"Changing only padding (id {worst.note.get('pad_id', '?')}) moves real tokens' outputs by {worst.value:.2g} times what "
        "changing real tokens does (0 if padding is masked): results depend on how a batch was padded.",
        evidence=(Evidence(worst, LIMIT),),
        severity="warning",
        step=over[0].step,
        where=worst.where,
        source=worst.source,
        seconds=over[0].seconds,
    )


def _cut_off(reading: Reading) -> float:
    """How much the answers move when padding is cut off, not changed; NaN where that is not known."""
    ratio = reading.note.get("cut")
    return float("nan") if ratio is None else float(ratio)


def inject(case: Any) -> Any:
    """Rows are padded on the left, and attention keeps its causal mask only."""
    batches, build, pad_id = case.batches, case.build, case.config.vocab_size

    def batches_padded(case: Any, split: str) -> Iterator[tuple[Any, Any]]:
        for ids, targets in batches(case, split):
            ids, targets = ids.clone(), targets.clone()
            for row in range(len(ids)):
                start = min(2 * row, ids.shape[1] - 2)
                ids[row, :start] = pad_id
                targets[row, :start] = pad_id
            yield ids, targets

    def build_unpadded(case: Any) -> Any:
        from torch.nn import functional

        model = build(case)
        for block in model.blocks:
            block.attention.attend = lambda query, key, value, visible, dropout: functional.scaled_dot_product_attention(
                query, key, value, None, dropout, is_causal=True
            )
        return model

    config = dataclasses.replace(case.config, pad_id=pad_id, vocab_size=pad_id + 1)
    return case.but(config=config, batches=batches_padded, build=build_unpadded)


condition = Condition(
    id="padding-attended",
    symptom="the outputs of real tokens depend on padding",
    needs=("padding_influence",),
    diagnose=diagnose,
    prescribes=("pad-mask",),
    inject=inject,
)
