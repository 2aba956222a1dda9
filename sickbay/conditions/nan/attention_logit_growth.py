"""The largest attention score drifts up from exam to exam, while a head's entropy goes to zero: an early warning.

Looks like
Nothing yet in the loss. The largest score before softmax grows through hundreds to thousands, and at least one head looks
at a single position; weeks later the loss diverges, or float16 overflows.

Why
The scores are a product of two learned projections; nothing limits the size of either. Once a head is one-hot its gradient
is almost zero for everything but the largest score, which goes on growing.

Tell apart
attention-scale: the scores are too large from the first step because of a missing scale.
Sharp heads alone are healthy: a head that copies the previous position has entropy near zero and modest scores.

Cure
Normalise queries and keys (QK-norm); or cap the scores, add a z-loss of 1e-4, or lower the learning rate.

Sources
Wortsman et al. 2023 (arXiv:2309.14322): runs whose largest score passes 1e4 diverge; QK-norm and z-loss prevent it.
Dehghani et al. 2023 (ViT-22B): QK-norm. Kimi K2 report 2025: QK-clip acts from a score of 100.
Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse".
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Severity, Threshold, number

LARGE = Threshold(100.0, "score", source="Kimi K2 report 2025: QK-clip's threshold")
EXTREME = Threshold(1e4, "score", source="Wortsman et al. 2023 (arXiv:2309.14322), section 3.1")
COLLAPSED = Threshold(0.05, "share of ln n", source="Zhai et al. 2023: entropy collapse, heads near one-hot")
GROWTH = Threshold(2.0, "x first half's median", source="a drift, not the spread between exams")
EXAMS = Threshold(4, "exams", source="two points on each side of the comparison")


def diagnose(chart: Chart) -> Diagnosis | None:
    found: list[tuple[Reading, float, Reading | None]] = []
    for place in chart["attention_logit_max"].places():
        series = chart["attention_logit_max"].at(place).finite()
        half = len(series) // 2
        early, late = max(series.values[:half], default=0.0), min(series.values[half:], default=0.0)
        if len(series) >= EXAMS and late > early * GROWTH and series[-1].value > LARGE:
            sharp = chart["attention_entropy"].at(place).finite()
            collapsed = sharp[-1] if len(sharp) and sharp[-1].value < COLLAPSED else None
            found.append((series[-1], early, collapsed))
    if not found:
        return None
    worst, early, collapsed = max(found, key=lambda row: row[0].value)
    severity: Severity = "warning" if worst.value > EXTREME or collapsed is not None else "note"
    entropy = f"; a head's entropy is {number(collapsed.value)} of uniform" if collapsed is not None else ""
    return Diagnosis(
        summary=f"the largest attention score grew from {number(early)} to {number(worst.value)}{entropy}",
        evidence=tuple(Evidence(r, limit) for r, limit in ((worst, LARGE), (collapsed, COLLAPSED)) if r is not None),
        severity=severity,
        step=worst.step,
        where=worst.where,
        source=worst.source,
        certainty="likely",
    )


def inject(case: Any) -> Any:
    """Query and key weights grow by a tenth at every update."""

    def update(sick: Any, model: Any, optimizer: Any) -> None:
        case.update(sick, model, optimizer)
        for block in model.blocks:
            block.attention.query_key_value.weight.data[: 2 * sick.config.dim] *= 1.1

    return case.but(update=update, steps=max(case.steps, 60))


condition = Condition(
    id="attention-logit-growth",
    symptom="the largest attention score drifts up and head entropy falls: an early warning",
    needs=("attention_logit_max",),
    uses=("attention_entropy",),
    diagnose=diagnose,
    prescribes=("qk-norm", "lower-learning-rate"),
    leads_to=("softmax-overflow", "half-precision-overflow", "exploding-gradients", "loss-spike"),
    inject=inject,
)
