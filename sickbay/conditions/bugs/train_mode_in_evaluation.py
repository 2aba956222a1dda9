"""The model is evaluated, or generates, in training mode: dropout is on and batch-norm uses the batch.

Looks like
    Validation is worse and noisier than it should be, sometimes worse than training; two evaluations of the same
    weights differ; early stopping and the choice of the best checkpoint follow the noise.

Why
    model.eval() is missing before the evaluation, was called on a part of the model only, or torch.no_grad() was taken for it: no_grad
    stops gradients, not dropout.

Tell apart
    Monte-Carlo dropout runs the same batch several times in training mode on purpose, and is not a fault. overfitting is a gap that
    remains with model.eval().

Cure
    model.eval() before evaluating and generating, model.train() after it.

Sources
    PyTorch documentation, "Autograd mechanics: evaluation mode (nn.Module.eval())"; Gal & Ghahramani 2016, "Dropout as a Bayesian
    Approximation", arXiv 1506.02142 (repeated passes on purpose).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

SHARE = Threshold(0.5, "share of modules", source="a part kept in training mode on purpose, as one batch-norm, is the smaller part")
FORWARDS = Threshold(2, "evaluations", source="a single pass among many in evaluation mode may be a look at the training batch")
REPEATS = Threshold(3, "forwards", source="Gal & Ghahramani 2016: Monte-Carlo dropout averages over repeated passes of one batch")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Forwards without gradient in which most dropout and batch-norm modules were in training mode, repeated passes apart."""
    seen = Series(r for r in chart["evaluation_mode"].finite() if float(r.note.get("count") or 0) > 0)
    if not seen:
        return NotExamined("no evaluation of a model with dropout or batch-norm was seen")
    # Labels or values that each training step asks of the model itself are part of that step.
    if any(r.note.get("every_step") for r in chart["evaluation_mode"]):
        return None
    on = Series(r for r in seen if r.value > SHARE and not _repeated(seen.between(r.step, r.step)))
    worst = on.worst()
    # A mode is written down when it changes: one reading that another followed is a single look, not a habit.
    if worst is None or (len(on) < FORWARDS and on[-1].step < seen[-1].step):
        return None
    return Diagnosis(
        summary=f"{worst.value:.0%} of the {float(worst.note['count']):.0f} dropout and batch-norm modules were in training mode "
        f"in an evaluation (0 is right), from step {on[0].step} on: its results are noisier and worse than the model is.",
        evidence=(Evidence(worst, SHARE),),
        severity="warning",
        step=on[0].step,
        where=worst.where,
        source=worst.source,
        seconds=on[0].seconds,
    )


def _repeated(at_one_step: Series) -> bool:
    """True where one batch was passed three times or more without a step in between, as Monte-Carlo dropout does."""
    repeats = [float(r.note.get("repeats") or 0) for r in at_one_step]
    return max(repeats) >= REPEATS and (len(repeats) == 1 or max(repeats) - min(repeats) + 1 >= REPEATS)


def inject(case: Any) -> Any:
    """A model with dropout is evaluated without model.eval()."""

    def evaluate_in_training_mode(case: Any, model: Any) -> float:
        import itertools

        import torch

        with torch.no_grad():
            losses = [case.loss(case, model, ids, targets).item() for ids, targets in itertools.islice(case.batches(case, "val"), 4)]
        return float(sum(losses) / len(losses))

    config = dataclasses.replace(case.config, dropout=max(0.1, case.config.dropout))
    return case.but(config=config, evaluate=evaluate_in_training_mode)


condition = Condition(
    id="train-mode-in-evaluation",
    symptom="the model is evaluated in training mode: its dropout or batch-norm is on",
    needs=("evaluation_mode",),
    diagnose=diagnose,
    prescribes=("eval-mode",),
    leads_to=("repetitive-generation", "incoherent-generation"),
    inject=inject,
)
