"""optimizer.step() is called although no backward has reached its parameters since the last one.

Looks like
    The loss is flat, or drifts by weight decay and momentum alone; nothing raises, because an optimizer skips parameters without
    gradient and uses stale ones without asking.

Why
    loss.backward() is missing, is behind a condition that is never true, or is called on another loss; or zero_grad() comes between
    backward() and step().

Tell apart
    missing-gradient: backward runs, and some parameters are cut off. optimizer-missing-parameters: it runs, and the optimizer holds other
    tensors. A closure passed to step() runs backward inside it; gradients written by hand (functional gradients, evolution strategies)
    need no backward at all: where the gradients change from step to step without one, this is not a fault.

Cure
    Keep the order zero_grad, forward, loss.backward(), clip, step, in every iteration that steps.

Sources
    guide, "Implementation Bugs: Gradient Not Flowing" (missing backward() call); PyTorch documentation, "Optimizing Model Parameters".
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

STEPS = Threshold(2, "steps", source="one step without backward is a slip at the start or the end of a loop; two are a habit")
SHARE = Threshold(0.1, "share of steps", source="an extra step once in ten or less changes the result by less than a learning-rate choice")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Steps, of one optimizer, before which no backward reached its parameters."""
    calls = chart["backwards_since_step"].finite()
    if not calls:
        return NotExamined("no step with a known number of backward calls")
    norm = {r.step: r.value for r in chart["grad_norm"]}
    emptied = _no_gradient_ever(chart, norm)
    empty = calls if emptied else Series(r for r in calls if r.value == 0)
    if not empty or _written_by_hand(empty, norm):
        return None
    where = max(empty.places(), key=lambda place: len(empty.at(place)))
    first, here, all_here = empty.at(where)[0], len(empty.at(where)), max(len(calls.at(where)), chart.last_step + 1)
    severe = here >= STEPS and (emptied or here >= SHARE * all_here)
    wrong = "found no gradient, whatever backward did" if emptied else "had no backward since the step before (1 or more is right)"
    return Diagnosis(
        summary=f"{here} of {all_here} optimizer steps {wrong}: "
        f"{'the weights move by stale gradients and decay at most' if severe else 'a stray step'}.",
        evidence=(Evidence(first, None if emptied else 1.0),),
        severity="critical" if severe else "note",
        step=first.step,
        where=first.where,
        source=first.source,
        seconds=first.seconds,
    )


def _no_gradient_ever(chart: Chart, norm: dict[int, float]) -> bool:
    """True where finite losses went into backward and the optimizer never found a gradient other than zero: zeroed before each step."""
    watched = len(chart["loss"].finite()) >= STEPS and "grad_norm" not in chart.unobserved
    return watched and not any(value != 0 for value in norm.values()) and (bool(norm) or not len(chart["update_ratio"]))


def _written_by_hand(empty: Series, norm: dict[int, float]) -> bool:
    """True where most steps without backward have a gradient norm other than the step before: somebody writes the gradients directly."""
    compared = [r.step for r in empty if r.step in norm and r.step - 1 in norm]
    fresh = [step for step in compared if norm[step] > 0 and norm[step] != norm[step - 1]]
    return len(compared) >= STEPS and 2 * len(fresh) > len(compared)


def inject(case: Any) -> Any:
    """The loss is computed and nothing else is done with it."""
    return case.but(backward=lambda case, loss: None)


condition = Condition(
    id="missing-backward",
    symptom="optimizer.step() runs without a backward since the last step",
    needs=("backwards_since_step",),
    uses=("grad_norm", "loss", "update_ratio"),
    diagnose=diagnose,
    prescribes=("call-backward",),
    leads_to=("missing-gradient", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
