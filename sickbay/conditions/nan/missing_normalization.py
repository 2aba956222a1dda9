"""The blocks have no LayerNorm or RMSNorm, and activations grow from block to block.

Looks like
The first loss is far above a uniform guess (ln of the vocabulary), gradient norms are large from the start, and a deeper
model is worse than a shallow one. In float16 it overflows; in float32 it trains badly or diverges.

Why
Every block adds to the residual stream. Without a normalisation what it adds is proportional to what it reads, so the
stream grows by a factor per block: 1.3 per block is 67 after 16. Logits of that size are confidently wrong, and
gradients are the product of the same factors.

Tell apart
poor initialisation: normalisations are there, and the weights' own scale is wrong.
exploding-gradients, learning-rate-too-high: at the first step, before any update, everything was in range.

Cure
Normalise the input of each attention and feed-forward part, and once more before the head (pre-norm):
`x = x + attention(norm1(x)); x = x + feed_forward(norm2(x))`.

Sources
Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture". Networks without normalisation that are
healthy scale their initialisation instead (Zhang et al. 2019, Fixup), so the absence alone is no fault.
Growth limits: calibration on healthy runs, whose blocks stay within a factor of 4 of each other over depth.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number

_CALIBRATED = "calibration on healthy transformers, whose blocks stay within a factor of 4 of each other"
GROWTH = Threshold(10.0, "x first block's RMS", source=_CALIBRATED)
GROWTH_WITH_LOSS = Threshold(3.0, "x first block's RMS", source=_CALIBRATED + "; counts with a first loss beyond LOSS_RATIO only")
LOSS_RATIO = Threshold(2.0, "x chance loss", source="a sound initialisation starts within 10 % of ln V: arithmetic of a uniform guess")
FEWEST_BLOCKS = 2


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    # A run may train several models one after another: a teacher's normalisation is none of its student's.
    normed = {r.note.get("blocks", 0) for r in chart["normalization_ops"] if r.value > 0}
    unnormed = [r for r in chart["normalization_ops"] if r.value == 0 and r.note.get("blocks", 0) >= FEWEST_BLOCKS]
    bare = next((r for r in unnormed if r.note["blocks"] not in normed), None)
    if bare is None or any(r.value > 0 and r.step >= bare.step for r in chart["normalization_ops"]):
        return None
    growth, last = _growth(chart, bare.step)
    if last is None:
        return NotExamined("activations were not sampled")
    first = next((r.value for r in chart["loss"] if r.step >= bare.step), math.nan)
    chance = next((r.value for r in chart["chance_loss"]), math.nan)
    above = not first < LOSS_RATIO * chance and chance == chance and first == first
    if not growth > (GROWTH_WITH_LOSS if above else GROWTH):
        return None
    loss = f"; the first loss is {number(first)} where a uniform guess has {number(chance)}" if above else ""
    return Diagnosis(
        summary=f"no normalisation in {bare.note['blocks']} blocks: activations grow {number(growth)} x from first to last{loss}",
        evidence=(Evidence(bare, 1.0), Evidence(last, last.value / growth * GROWTH if math.isfinite(growth) else None)),
        severity="critical" if above or not math.isfinite(growth) else "warning",
        step=bare.step,
        where=last.where,
        source=last.source or bare.source,
        certainty="confirmed" if above else "likely",
    )


def _growth(chart: Chart, begin: int) -> tuple[float, Reading | None]:
    """RMS of the deepest block over the shallowest at the first step from `begin` on that sampled both, and the deepest block's reading."""
    steps: dict[int, list[Reading]] = {}
    for reading in chart["activation_rms"]:
        if reading.step >= begin:
            steps.setdefault(reading.step, []).append(reading)
    for rows in steps.values():
        shallow, deep = (pick(rows, key=lambda r: r.note.get("depth", 0)) for pick in (min, max))
        if deep is not shallow and shallow.value > 0:
            return (deep.value / shallow.value if math.isfinite(deep.value) else math.inf), deep
    return math.nan, None


def inject(case: Any) -> Any:
    """Twelve blocks without any normalisation, their weights drawn to keep the variance, as a normalised model tolerates."""

    def build(sick: Any) -> Any:
        from torch import nn

        model = case.build(sick)
        for part in model.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_normal_(part.weight, gain=1.2)
        for block in model.blocks:
            block.attention_norm = block.feed_forward_norm = nn.Identity()
        model.final_norm = nn.Identity()
        return model

    return case.but(build=build, config=dataclasses.replace(case.config, num_layers=12))


condition = Condition(
    id="missing-normalization",
    symptom="blocks without LayerNorm or RMSNorm: activations grow with depth",
    needs=("normalization_ops",),
    uses=("activation_rms", "loss", "chance_loss"),
    diagnose=diagnose,
    prescribes=("add-normalization",),
    leads_to=(
        *(
            "learning-rate-too-high",
            "exploding-gradients",
            "softmax-overflow",
            "half-precision-overflow",
            "repetitive-generation",
            "incoherent-generation",
        ),
        *("attention-logit-growth", "loss-spike", "non-finite-weights", "scaler-collapse", "poor-initialization", "clipping-saturated"),
    ),
    inject=inject,
)
