"""Backward runs again and again, and the weights never change, because optimizer.step() is not called.

Looks like
    The loss is flat up to the noise of the batches; gradients look healthy; checkpoints are all alike.

Why
    optimizer.step() is missing, is indented out of the loop, is behind an accumulation condition that is never true, or scheduler.step()
    stands where optimizer.step() was meant.

Tell apart
    Gradient accumulation over many micro-batches steps in the end. A GradScaler that skips every step is the scaler's collapse. A step
    over other tensors than the model's is optimizer-missing-parameters. A learning rate of 0 steps, to no effect.

Cure
    Call optimizer.step() after backward (after every k-th when accumulating), and once more for an incomplete last cycle.

Sources
    PyTorch documentation, "Optimizing Model Parameters" and `torch.optim` ("Taking an optimization step").
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

RUNNING = Threshold(
    8, "backward calls", source="longer than common accumulation cycles (1 to 8); a longer cycle ends in a step, which clears this"
)
ENDED = Threshold(2, "backward calls", source="at the end of a run no step can follow; one backward alone is a check of gradients")


_UNMOVED = "the weights are those the run began with"


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Backward calls, with an optimizer at hand, that no step ever followed, whether their gradients piled up or were zeroed."""
    waiting = [r for r in chart["backwards_without_step"].finite() if float(r.note.get("optimizers") or 0) >= 1]
    # Beside an optimizer that steps, one that never does may be a leftover of an earlier set-up: it is mentioned, no more,
    # unless nobody else has its parameters, which then get gradients and stay what they were.
    others_step = len(chart["backwards_since_step"]) > 0
    if others_step:
        waiting = [r for r in waiting if r.where]
    zeroed = [] if others_step else [r for r in chart["dropped_backwards"].finite() if r.note.get("finite_loss") is not False]
    if not (waiting or zeroed) or any(float(r.note.get("scaler_skips") or 0) > 0 for r in waiting):
        return None
    alone = [r for r in waiting if r.note.get("alone") and r.value > RUNNING] if others_step else []
    waiting = alone or waiting
    last, first = (waiting or zeroed)[-1], min((*waiting, *zeroed), key=lambda r: r.step)
    calls = max(waiting[-1].value if waiting else 0, sum(r.value for r in zeroed))
    ended = any(chart.facts.get(fact) is not None for fact in ("ended", "ended_inside"))
    if calls < ENDED or (calls <= RUNNING and not ended):
        return NotExamined(f"{calls:.0f} backward calls so far and no step: it may still come")
    return Diagnosis(
        summary=f"{calls:.0f} backward calls and not one step of {last.where or 'the optimizer'}: "
        f"{'other optimizers do step' if others_step and not alone else _UNMOVED}{', and no other optimizer has them' if alone else ''}.",
        evidence=(Evidence(last, 0.0),),
        severity="note" if others_step and not alone else "critical",
        step=first.step,
        where=last.where,
        source=last.source,
        seconds=last.seconds,
    )


def inject(case: Any) -> Any:
    """The update clips and zeroes the gradients, and does not step."""

    def update_without_step(case: Any, model: Any, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)

    return case.but(update=update_without_step)


condition = Condition(
    id="optimizer-not-stepped",
    symptom="backward runs and the weights never change: optimizer.step() is not called",
    needs=("backwards_without_step",),
    uses=("backwards_since_step", "dropped_backwards"),
    diagnose=diagnose,
    prescribes=("call-step",),
    leads_to=("repetitive-generation", "incoherent-generation"),
    inject=inject,
)
