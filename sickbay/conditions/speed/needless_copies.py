"""Much of a step goes into copies, casts and checks that change nothing.

Looks like
    Profiles full of clone, copy_ and _to_copy; memory traffic without arithmetic; on a GPU the queue runs empty at every .item().

Why
    .clone() and .contiguous() of what nobody changes, casts to another type and back, a NaN check or .item() of every activation, a
    snapshot of all weights in each step that nothing reads.

Tell apart
    A copy is needed where the original is changed afterwards, and a layout change can pay for itself: here outputs and gradients are the
    same to the last bit without the copies, or nothing reads the copy. A copy that costs little is no fault.

Cure
    Delete them; keep checks and snapshots for every hundredth step.

Sources
    Ivanov et al. 2021, arXiv 2007.00072 (data movement is what transformers wait for); PyTorch documentation, performance tuning guide
    ("avoid unnecessary CPU-GPU synchronization").
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

SHARE = Threshold(
    0.07,
    "share of step time",
    source="calibration: sick scripts from 0.075, two assertions in a small model up to 0.065 on a busy machine; "
    "copies with a reason count nothing, exactly told",
)


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Copies inside the forward and unread snapshots between steps, together above the limit."""
    inside = chart["copy_share"].worst()
    beside = chart["idle_copies"][-1] if len(chart["idle_copies"]) else None
    shares = [reading.value if reading is not None else 0.0 for reading in (inside, beside)]
    if sum(shares) < SHARE:
        return None if inside is not None else NotExamined(chart.why_unobserved("copy_share") or "no step was profiled")
    parts = []
    if inside is not None and inside.value:
        kinds = " and ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in inside.note["kinds"].items())
        parts.append(f"{kinds} in each forward change nothing and take {shares[0]:.0%} of the step")
    if beside is not None and beside.value:
        parts.append(f"a copy that nothing reads takes {shares[1]:.0%}")
    main = max((r for r in (inside, beside) if r is not None), key=lambda r: r.value)
    evidence = tuple(Evidence(r, SHARE) for r in (inside, beside) if r is not None and r.value)
    return Diagnosis("; ".join(parts).capitalize() + ".", evidence, "warning", main.step, main.where, main.source, seconds=main.seconds)


def inject(case: Any) -> Any:
    """Every block's input is copied, cast to float64 and back, and looked at for NaN."""

    def copied(module: Any, args: Any) -> Any:
        x = args[0]
        for _ in range(12):
            x = x.clone().double().float().contiguous().clone()
            if x.isnan().any().item() or x.abs().max().item() > 1e9:
                raise ValueError("an activation is not finite")
        return (x, *args[1:])

    def build(case: Any) -> Any:
        model = type(case).build(case)
        for block in model.blocks:
            block.register_forward_pre_hook(copied)
        return model

    return case.but(build=build)


condition = Condition(
    id="needless-copies",
    symptom="copies, casts and checks that change nothing take a large part of each step",
    needs=(),
    uses=("copy_share", "idle_copies"),
    diagnose=diagnose,
    prescribes=("drop-copies",),
    leads_to=("small-batch",),
    inject=inject,
)
