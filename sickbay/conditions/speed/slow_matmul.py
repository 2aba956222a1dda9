"""Products are computed in a slow way: position by position in Python, by broadcasting and summing, or in float64.

Looks like
    A step takes many times longer than models of this size need; the processor is busy; a larger batch costs hardly more.

Why
    A Python loop over positions or rows calls small products one after the other, each with the fixed cost of a call. A product written
    as (a * b).sum() makes the whole intermediate tensor. float64 halves the numbers per instruction and per byte of bandwidth.

Tell apart
    A recurrence, whose every call needs the one before, cannot be batched and is not this; nor are lists of heads or experts with weights
    of their own. float64 on purpose is a choice; its price is what is stated here. A step that waits for its batch is data-bottleneck.

Cure
    Keep positions as an axis of one matmul, use scaled_dot_product_attention; train in float32.

Sources
    Dao et al. 2022, FlashAttention, arXiv 2205.14135 (the attention matrix is never written out); PyTorch documentation,
    `torch.nn.functional.scaled_dot_product_attention`, performance tuning guide; Ivanov et al. 2021, arXiv 2007.00072 (data movement).
"""

from __future__ import annotations

import functools
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold

LOOP = Threshold(
    0.15, "share of step time", source="measured on the forward alone: the backward of a loop, not counted, costs more than itself"
)
WIDE = Threshold(0.3, "share of step time", source="calibration: a model bound by the fixed cost of calls gains up to 0.22 from float32")
WORTH = Threshold(0.01, "seconds", source="a pass of a hundredth of a second: below it the fixed cost of calls is most of it")
ATTENTION = Threshold(
    0.4, "share of step time", source="attention written out is a choice where rows are short; here it is most of the step"
)


def diagnose(chart: Chart) -> Diagnosis | None:
    """The largest measured saving above its limit; attention written out below it is a note."""
    found = [
        (reading, limit)
        for signal, limit in (("loop_gain", LOOP), ("broadcast_gain", LOOP), ("float64_gain", WIDE), ("attention_gain", ATTENTION))
        if (reading := chart[signal].worst()) is not None
        and reading.value >= limit
        and not reading.note.get("per_row")
        and reading.note.get("seconds64", WORTH) >= WORTH
    ]
    if not found:
        return None
    reading, limit = max(found, key=lambda pair: pair[0].value)
    evidence = (Evidence(reading, limit),)
    return Diagnosis(_text(reading), evidence, "warning", reading.step, reading.where, reading.source, seconds=reading.seconds)


def _text(reading: Reading) -> str:
    """What was found and what the other way takes, both measured on the run's own batch."""
    note, share = reading.note, f"{reading.value:.0%} of the step"
    if reading.signal == "loop_gain":
        times = note["loop_seconds"] / max(note["batched_seconds"], 1e-9)
        text = f"{note['count']} calls of {note['operation']} from one line in each forward, up to {note['width']} of them independent;"
        quicker = f"is {times:.1f} times as fast and " if times >= 1.1 else ""  # else what is saved is the calling itself
        return f"{text} one batched call {quicker}saves {share}."
    if reading.signal == "float64_gain":
        threads = " on one thread" if note.get("script_threads") == 1 else ""
        ratio = note["seconds64"] / max(note["seconds32"], 1e-9)
        return f"{note['elements']:,} weights in float64{threads}: the same pass in float32 is {ratio:.1f} times as fast and saves {share}."
    faster = note.get("product_seconds") or note.get("fused_seconds") or 1e-9
    other = "a matrix product" if reading.signal == "broadcast_gain" else "scaled_dot_product_attention"
    what = "A product multiplied by broadcasting and summed" if reading.signal == "broadcast_gain" else "Attention written out"
    shape = tuple(note["shape"])
    return (
        f"{what} over {shape}, {note['count']} times a forward; {other} is {note['seconds'] / faster:.1f} times as fast and saves {share}."
    )


def inject(case: Any) -> Any:
    """Every matrix product of the blocks is a broadcast multiplication and a sum."""

    def build(case: Any) -> Any:
        from torch import nn

        model = type(case).build(case)
        for part in model.blocks.modules():
            if isinstance(part, nn.Linear):
                part.forward = functools.partial(_by_broadcasting, part)  # type: ignore[method-assign]
        return model

    return case.but(build=build)


def _by_broadcasting(linear: Any, x: Any) -> Any:
    product = (x.unsqueeze(-2) * linear.weight).sum(-1)
    return product if linear.bias is None else product + linear.bias


condition = Condition(
    id="slow-matmul",
    symptom="products computed one position at a time, by broadcasting, or in float64",
    needs=("loop_gain",),
    uses=("float64_gain", "broadcast_gain", "attention_gain"),
    diagnose=diagnose,
    prescribes=("batch-the-loop", "use-float32"),
    leads_to=("small-batch",),
    inject=inject,
)
