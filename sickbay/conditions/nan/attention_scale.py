"""Attention scores are not divided by √d_head: the division is missing, done twice, or uses another dimension.

Looks like
Nothing breaks. The loss falls more slowly and ends higher; scaled too little, attention is nearly one-hot from the start
and gradients are several times larger; scaled too much, every position attends to all others alike.

Why
The product of two vectors of d independent unit entries has variance d. Dividing by √d makes it 1, whatever the width of
a head. Dividing by √(embedding width) instead scales by one over the root of the number of heads too much; scaling both
in the layer and in scaled_dot_product_attention scales by 1/d.

Tell apart
attention-logit-growth: the scale is right and the scores grow as the model trains.
Architectures that declare another scale (T5 folds it into the initialisation, muP uses 1/d) are not ill.

Cure
Multiply the scores by head_dim ** -0.5 once, with the width of one head; or leave it to
torch.nn.functional.scaled_dot_product_attention, which does so by default.

Sources
Vaswani et al. 2017, section 3.2.1 and footnote 4. The tolerance lies below the smallest mistake possible, 1/√2 for two
heads, and above configured scales in use (0.94 in Gemma 2 27B).
Seen in Graylab/DL4Proteins-notebooks#12 and lucidrains/vit-pytorch#65.
"""

from __future__ import annotations

import math
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold, number

TOLERANCE = Threshold(1.3, "ratio either way", source="below √2, the mistake of two heads; above 1.07, the widest declared scale in use")


def diagnose(chart: Chart) -> Diagnosis | None:
    wrong = [reading for reading in chart["attention_scale"] if _distance(reading) > math.log(TOLERANCE)]
    # What weights made up for at the first look was meant, whatever training has made of those weights since.
    first = {reading.where: reading for reading in reversed(chart["attention_scale"])}
    wrong = [reading for reading in wrong if not reading.note.get("declared") and not first[reading.where].note.get("declared")]
    if not wrong:
        return None
    worst = max(wrong, key=_distance)
    places = len({reading.where for reading in wrong})
    return Diagnosis(
        summary=f"attention scores are scaled by {number(worst.value)} times 1/√d_head{_reason(worst)} ({places} attention layer(s))",
        evidence=(Evidence(worst, TOLERANCE if worst.value > 1 else 1 / TOLERANCE),),
        severity="warning",
        step=min(reading.step for reading in wrong),
        where=worst.where,
        source=worst.source,
    )


def _distance(reading: Reading) -> float:
    """|ln scale|: 0 is right; infinite for a scale that is zero or negative; 0 for one that could not be measured."""
    if reading.value != reading.value:
        return 0.0
    return abs(math.log(reading.value)) if reading.value > 0 else math.inf


def _reason(reading: Reading) -> str:
    """The likeliest slip, in words."""
    width, value = reading.note.get("head_dim") or 0, reading.value
    if value <= 0:
        return ": the scale is not positive"
    if width > 1 and math.isclose(value, math.sqrt(width), rel_tol=0.05):
        return f": not divided by √{width} at all"
    if width > 1 and math.isclose(value, 1 / math.sqrt(width), rel_tol=0.05):
        return f": divided by √{width} twice"
    heads = 1 / value**2
    if value < 1 and math.isclose(heads, round(heads), rel_tol=0.05) and width:
        return f": divided by √{width * round(heads)}, {round(heads)} heads together, instead of √{width}"
    return ""


def inject(case: Any) -> Any:
    """The scores are multiplied by 1: the scale was forgotten."""

    def build(sick: Any) -> Any:
        from torch.nn.functional import scaled_dot_product_attention

        def attend(query: Any, key: Any, value: Any, visible: Any, dropout: float) -> Any:
            return scaled_dot_product_attention(query, key, value, visible, dropout, is_causal=visible is None, scale=1.0)

        model = case.build(sick)
        for block in model.blocks:
            block.attention.attend = attend
        return model

    return case.but(build=build)


condition = Condition(
    id="attention-scale",
    symptom="attention scores are not divided by √d_head, or twice, or by the wrong dimension",
    needs=("attention_scale",),
    diagnose=diagnose,
    prescribes=("scale-attention",),
    leads_to=(
        "learning-rate-too-high",
        "attention-logit-growth",
        "softmax-overflow",
        "half-precision-overflow",
        "exploding-gradients",
        "loss-spike",
        "repetitive-generation",
        "incoherent-generation",
    ),
    inject=inject,
)
