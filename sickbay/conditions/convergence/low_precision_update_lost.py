"""The weights themselves are bfloat16 or float16, and most updates are too small for them: they round to nothing.

Looks like
    The loss falls slowly or stops early; a smaller learning rate stops it altogether; the same script with float32 weights learns.
    Weights near zero and biases move, large ones never do.

Why
    bfloat16 keeps 8 significant bits: next to 1.0 the next number is 1.0078. An update below half that step is rounded away, each time
    anew, so a thousand of them move nothing. Updates of 1e-3 of the weight, the healthy size, are below it.

Tell apart
    Autocast, float32 master weights, Kahan summation and stochastic rounding keep what rounding would lose: their weights are float32
    or their optimizer is not the plain one. update-not-applied: elements stay although their update is large enough.
    learning-rate-too-low: updates are tiny but arrive.

Cure
    Keep the weights in float32 and compute in bfloat16 by `torch.autocast`; or use an optimizer with float32 master weights or
    stochastic rounding.

Sources
    torchao pull request 1124 (stochastic rounding for bfloat16 weights); pytorch/torchtune issue 2254. The half unit in the last place:
    round to nearest, IEEE 754-2019, section 4.3.1.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

LOST = Threshold(
    0.5,
    "share of elements",
    source="half of all updates lost; healthy bfloat16 runs at a fit learning rate lose those of norms and biases only",
)
STEPS = Threshold(2, "steps", source="one sampled step may be the first of a warm-up")
FULL_RATE = Threshold(0.5, "x largest learning rate", source="in a warm-up's or decay's tail tiny updates are meant")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """At most steps with a full learning rate more than half of all elements with a gradient stayed, and rounding explains it."""
    low = [r for r in chart["unmoved_share"].finite() if r.note.get("dtype")]
    if not low:
        return None if len(chart["unmoved_share"]) else NotExamined("no update was sampled")
    exact = [r for r in low if r.note.get("exact")]
    if not exact:
        return NotExamined("the optimizer is not torch's own: whether it keeps what rounding loses is not known")
    peak = max(float(r.note.get("rate") or 0) for r in exact)
    steps: dict[int, list[Reading]] = {}
    for reading in exact:
        if float(reading.note.get("rate") or 0) >= FULL_RATE * peak:
            steps.setdefault(reading.step, []).append(reading)
    lost = {step: rows for step, rows in steps.items() if _lost(rows) > LOST}
    if len(lost) < STEPS or 2 * len(lost) <= len(steps):
        return None
    share = sorted(_lost(rows) for rows in lost.values())[len(lost) // 2]
    worst = max(next(iter(lost.values())), key=lambda r: float(r.note.get("elements") or 0) * r.value * float(r.note.get("rounding") or 0))
    return Diagnosis(
        summary=f"the weights are {worst.note['dtype']}, and {share:.0%} of the elements that have a gradient do not move in a step "
        f"(learning rate {peak:g}): their updates are below half a unit in the last place.",
        evidence=(Evidence(worst, LOST),),
        severity="warning",
        step=worst.step,
        where=worst.where,
        source=worst.source,
    )


def _lost(rows: list[Reading]) -> float:
    """The share of all elements with a gradient whose update was rounded away."""
    elements = sum(float(r.note.get("elements") or 0) for r in rows)
    return sum(r.value * float(r.note.get("rounding") or 0) * float(r.note.get("elements") or 0) for r in rows) / max(elements, 1.0)


def inject(case: Any) -> Any:
    """The whole model is cast to bfloat16 and trained at a learning rate that float32 weights would take."""
    return case.but(build=lambda sick: case.build(sick).bfloat16(), learning_rate=1e-5)


condition = Condition(
    id="low-precision-update-lost",
    symptom="bfloat16 or float16 weights whose updates round to nothing",
    needs=("unmoved_share",),
    diagnose=diagnose,
    prescribes=("master-weights",),
    leads_to=(
        "update-not-applied",
        "learning-rate-too-low",
        "loss-plateau",
        "clipping-saturated",
        "repetitive-generation",
        "incoherent-generation",
    ),
    inject=inject,
)
