"""What the blocks keep for backward outweighs everything else in memory.

Looks like
    Memory follows rows and positions, hardly the size of the model; out of memory as soon as either is raised.

Why
    Each block keeps its intermediate results until its backward has run. With long rows or many of them that is more than weights,
    gradients and optimizer state together.

Tell apart
    large-vocabulary: there the logits and the embedding's rows are what is large. Small runs have more activations than weights by nature
    and nothing to gain.

Cure
    Checkpoint groups of about sqrt(L) blocks (the summary gives the saving), fused attention, 16-bit autocast, smaller micro-batches.

Sources
    Chen et al. 2016, arXiv 1604.06174; Korthikanti et al. 2022, arXiv 2205.05198, section 4; Dao et al. 2022, arXiv 2205.14135.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold
from sickbay.core.plan import Parts, best_segment, gibibytes

SHARE = Threshold(0.6, "share of the step's memory", source="below it halving the activations frees less than a third")
WORTH = Threshold(256 << 20, "bytes", source="less is no burden on any machine that trains")
BLOCKS = Threshold(3, "blocks", source="with two blocks there is nothing to divide into segments")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Activations are most of the measured step, in blocks enough that checkpointing pays."""
    parts = {r.where: r for r in chart["memory_part"].finite() if r.note.get("how") == "measured"}
    if "activations" not in parts:
        return NotExamined("no step's graph was looked into")
    kept = parts["activations"]
    total = sum(parts[name].value for name in ("weights", "gradients", "optimizer", "activations") if name in parts)
    blocks = list(chart["block_activations"].finite())
    inside = sum(block.value for block in blocks)
    if kept.value < WORTH or kept.value < SHARE * total or len(blocks) < BLOCKS or inside < SHARE * kept.value:
        return None
    boundary = max(float(blocks[0].note.get("boundary") or 0), 0.0)
    whole = Parts(0, 0, 0, tuple(block.value for block in blocks), kept.value - inside, boundary, 0, 0)
    every = best_segment(whole)
    left = whole.checkpointed(every).activations
    text = (
        f"Activations kept for backward are {gibibytes(kept.value)}, {kept.value / total:.0%} of the step's {gibibytes(total)}; "
        f"checkpointing every {every} of {len(blocks)} blocks would leave {gibibytes(left)} for about one more forward per step."
    )
    return Diagnosis(text, (Evidence(kept, SHARE * total),), "note", kept.step, max(blocks, key=lambda b: b.value).where)


def inject(case: Any) -> Any:
    """Six narrow blocks and very many rows."""
    from dataclasses import replace

    return case.but(config=replace(case.config, num_layers=6), batch_size=640, steps=4, eval_every=0)


condition = Condition(
    id="activation-memory",
    symptom="what the blocks keep for backward is most of the memory",
    needs=("memory_part",),
    uses=("block_activations",),
    diagnose=diagnose,
    prescribes=("checkpoint-blocks",),
    inject=inject,
)
