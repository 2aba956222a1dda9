"""Evaluation keeps what it does not need: graphs that no backward will use, or all its outputs.

Looks like
    Training fits, validation runs out of memory, often minutes in; memory climbs batch by batch during evaluation and falls afterwards.

Why
    Without torch.no_grad() each forward builds a graph with all activations; a loss or output added to a total or list keeps it.
    Or the logits of the whole evaluation set are collected, vocabulary wide, before a metric reduces them.

Tell apart
    memory-leak grows over training steps. Outputs that are small, or needed whole by the metric, are kept on purpose.

Cure
    Wrap evaluation in torch.no_grad() or torch.inference_mode(); reduce each batch to numbers (argmax, sums); in transformers' Trainer
    preprocess_logits_for_metrics or eval_accumulation_steps.

Sources
    PyTorch documentation, "Locally disabling gradient computation"; transformers issues 8476, 12878, 15466, 18947 and 25313.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold
from sickbay.core.plan import gibibytes

GRAPHS = Threshold(4, "graphs", source="a loop's own variables hold one graph, or two while the next is built")
OUTPUTS = Threshold(256 << 20, "bytes", source="logits of an evaluation that are worth reducing on the fly; less is held without harm")
BESIDE = Threshold(1.0, "share of a training step", source="outputs that outweigh a whole training step decide what fits")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Several graphs of an evaluation are alive at once, or its outputs outweigh a training step; graphs built and dropped are a note."""
    built = [r for r in chart["evaluation_graphs"] if r.value >= GRAPHS]
    kept = [r for r in built if r.note.get("mode") == "evaluation" and r.note.get("kept", 0) >= GRAPHS]
    if kept:
        return _graphs(kept[0], "warning")
    step = sum(r.value for r in chart["memory_part"].finite() if r.where != "logits" and r.note.get("how") == "measured")
    outputs = [r for r in chart["evaluation_outputs"] if r.value >= max(OUTPUTS, BESIDE * step)]
    if outputs and step:
        most = max(outputs, key=lambda r: r.value)
        text = (
            f"{gibibytes(most.value)} of outputs were held after {most.note.get('forwards')} forwards of an evaluation; "
            f"a whole training step takes {gibibytes(step)}."
        )
        return Diagnosis(text, (Evidence(most, step),), "warning", most.step, most.where, most.source, seconds=most.seconds)
    dropped = [r for r in built if r.note.get("mode") == "evaluation"]
    return _graphs(dropped[0], "note") if dropped else None


def _graphs(reading: Reading, severity: Any) -> Diagnosis:
    kept = int(reading.note.get("kept", 0))
    held = f"{kept} of the graphs were alive at once" if severity == "warning" else "each was dropped at once"
    text = f"{int(reading.value)} forwards of an evaluation built graphs that no backward used (no torch.no_grad() around them); {held}."
    evidence = (Evidence(reading, 0.0),)
    return Diagnosis(text, evidence, severity, reading.step, reading.where, reading.source, seconds=reading.seconds)


def inject(case: Any) -> Any:
    """Validation adds up losses with their graphs."""

    def evaluate(case: Any, model: Any) -> float:
        model.eval()
        total: Any = 0.0
        batches = case.batches(case, "val")
        for _ in range(8):
            ids, targets = next(batches)
            total = total + case.loss(case, model, ids, targets)
        model.train()
        return float(total) / 8

    return case.but(evaluate=evaluate)


condition = Condition(
    id="evaluation-memory",
    symptom="evaluation builds graphs or keeps all its outputs",
    needs=("evaluation_graphs",),
    uses=("evaluation_outputs", "memory_part"),
    diagnose=diagnose,
    prescribes=("evaluate-lightly",),
    leads_to=("out-of-memory",),
    inject=inject,
)
