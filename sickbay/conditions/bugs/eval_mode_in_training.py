"""The model is trained in evaluation mode: dropout is off and batch-norm does not learn its statistics.

Looks like
    Nothing raises. Training loss falls faster than it should and validation rises earlier: the regularisation that was asked for is not
    there. Often it begins after the first evaluation.

Why
    model.eval() was called for an evaluation and model.train() not after it, only once before the loop, or on another object than the
    one trained. Models loaded with from_pretrained start in evaluation mode.

Tell apart
    Without dropout or batch-norm the mode changes nothing, and nothing is said. Freezing batch-norm alone leaves the dropout on and is
    done on purpose. overfitting that remains in training mode has another cause.

Cure
    Call model.train() at the start of every training epoch and after every evaluation.

Sources
    PyTorch documentation, `nn.Module.train`; joeynmt issue 184, vsepp issue 4, mcan-vqa issue 26 (left in eval mode in published code).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

STEPS = Threshold(2, "steps", source="one forward in evaluation mode may be a probe of the user's own")
SHARE = Threshold(
    0.1, "share of steps", source="dropout missing in fewer than one step in ten changes the regularisation by less than that"
)


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Training steps of which every dropout and batch-norm module was in evaluation mode."""
    seen = Series(r for r in chart["training_mode"].finite() if float(r.note.get("count") or 0) > 0)
    total = chart.last_step + 1 - seen[0].step if seen else 0
    if total < STEPS:
        return NotExamined(f"{total} training steps of a model with dropout or batch-norm; this needs {STEPS:.0f}")
    # A mode is written down when it changes and holds until the next reading.
    until = [*seen.steps[1:], chart.last_step + 1]
    off = sum(end - r.step for r, end in zip(seen, until) if r.value == 0)
    if off < STEPS or off < SHARE * total:
        return None
    first = next(r for r in seen if r.value == 0)
    return Diagnosis(
        summary=f"In {off} of {total} training steps all {float(first.note['count']):.0f} dropout and batch-norm modules were in "
        f"evaluation mode (none should be), from step {first.step} on: the regularisation that was asked for is switched off.",
        evidence=(Evidence(first, 1.0),),
        severity="warning",
        step=first.step,
        where=first.where,
        source=first.source,
        seconds=first.seconds,
    )


def inject(case: Any) -> Any:
    """A model with dropout starts in evaluation mode, as a loaded one does, and goes back to it after each evaluation."""
    build, evaluate = case.build, case.evaluate

    def evaluate_and_stay(case: Any, model: Any) -> float:
        loss: float = evaluate(case, model)
        model.eval()
        return loss

    config = dataclasses.replace(case.config, dropout=max(0.1, case.config.dropout))
    return case.but(config=config, build=lambda case: build(case).eval(), evaluate=evaluate_and_stay)


condition = Condition(
    id="eval-mode-in-training",
    symptom="the model is trained in evaluation mode: its dropout or batch-norm is off",
    needs=("training_mode",),
    diagnose=diagnose,
    prescribes=("train-mode",),
    inject=inject,
)
