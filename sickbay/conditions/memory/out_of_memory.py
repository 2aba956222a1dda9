"""An allocation failed: the step needs more memory than there is.

Looks like
    torch.OutOfMemoryError, "DefaultCPUAllocator: can't allocate memory", MemoryError, or a process that is gone with SIGKILL (137).

Why
    Weights, their gradients and the optimizer's state stand all the time (16 bytes a parameter with Adam in float32); activations grow with
    rows times positions, unfused attention with positions squared, logits with rows times positions times vocabulary, three times over in
    the loss. Which of them is too large decides what helps.

Tell apart
    memory-leak fails late, after growth at every step, and comes first where it is found; this fails in the first steps or at the longest
    batch. evaluation-memory fails in validation.

Cure
    Smaller micro-batches with gradient accumulation keep the batch; checkpointing every sqrt(L) blocks keeps only their inputs; 16-bit
    autocast halves activations; an optimizer with less state; a smaller or chunked vocabulary loss. The summary gives a setting that fits.

Sources
    Chen et al. 2016, arXiv 1604.06174 (checkpointing); Rajbhandari et al. 2020, arXiv 1910.02054, section 3 (what stands);
    Korthikanti et al. 2022, arXiv 2205.05198, section 4 (activations).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined
from sickbay.core.plan import Parts, fits, gibibytes

ORDER = ("weights", "gradients", "optimizer", "activations", "logits")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """An exception says so, or the system killed the process for it; with what filled memory and a setting that fits."""
    failed = [r for r in chart["exception"] if r.note.get("kind") == "out-of-memory"]
    if not failed and chart.facts.get("ended") != "out-of-memory":
        return None
    limits = chart["memory_limit"]
    limit = limits[-1] if limits else None
    parts = {r.where: r for r in chart["memory_part"].finite()}
    text = _what(failed[-1] if failed else None, limit) + _filled(parts) + _plan(parts, limit)
    evidence = [Evidence(parts[name], limit.value if limit else None, name) for name in ORDER if name in parts]
    evidence += [Evidence(failed[-1])] if failed else []
    first = failed[-1] if failed else None
    step = first.step if first else chart.last_step
    return Diagnosis(text, tuple(evidence), "critical", step, first.where if first else "", first.source if first else "")


def _what(failed: Reading | None, limit: Reading | None) -> str:
    asked = float(limit.note.get("asked") or 0) if limit else 0.0
    of = f" of {gibibytes(limit.value)} ({limit.note.get('what')})" if limit and limit.value else ""
    if failed is None:
        return "The system killed the process for want of memory."
    return f"An allocation of {gibibytes(asked)} failed{of}." if asked else f"An allocation failed{of}."


def _filled(parts: dict[str, Reading]) -> str:
    if not parts:
        return ""
    rows = next((int(r.note.get("rows") or 0) for r in parts.values()), 0)
    listed = ", ".join(f"{name} {gibibytes(parts[name].value)}" for name in ORDER if name in parts)
    return f" A step{f' of {rows} rows' if rows else ''} needs {listed}."


def _plan(parts: dict[str, Reading], limit: Reading | None) -> str:
    """The gentlest settings that fit, by the same arithmetic as `sickbay plan`; "" where it cannot be worked out."""
    if limit is None or not limit.value or "activations" not in parts or not limit.note.get("blocks"):
        return ""
    note, rows = limit.note, int(limit.note.get("rows") or 0)
    if rows < 1:
        return ""
    whole = Parts(
        weights=parts["weights"].value,
        gradients=parts["gradients"].value,
        optimizer=parts["optimizer"].value,
        blocks=tuple(float(size) for size in note["blocks"]),
        around=float(note.get("around") or 0),
        boundary=float(note.get("boundary") or 0),
        outputs=float(note.get("outputs") or 0),
        logits=parts["logits"].value if "logits" in parts else 0.0,
        largest=float(note.get("largest") or 0),
        rows=rows,
    )
    ways = fits(whole, rows, limit.value)
    if not ways:
        return " Not even one row fits: the model itself is too large for this memory."
    return f" Predicted peak {gibibytes(whole.peak)}; this fits: {'; or '.join(str(way) for way in ways[:3])}."


def inject(case: Any) -> Any:
    """The third step asks for more memory than any machine has."""
    import torch

    steps = iter(range(1_000_000))
    loss = case.loss

    def too_large(case: Any, model: Any, ids: Any, targets: Any) -> Any:
        value = loss(case, model, ids, targets)
        return value + torch.empty(1 << 50).sum() if next(steps) == 2 else value

    return case.but(loss=too_large)


condition = Condition(
    id="out-of-memory",
    symptom="an allocation failed: the step needs more memory than there is",
    needs=("exception",),
    uses=("memory_part", "memory_limit"),
    diagnose=diagnose,
    prescribes=("fit-memory",),
    inject=inject,
)
