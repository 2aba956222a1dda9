"""Gradient clipping acts on nearly every step: the limit sets the size of the steps, and not the gradients.

Looks like
The logged gradient norm is far above the limit from the end of the warm-up to the end of the run.

Why
The limit was taken over from another loss, batch or model. Under SGD every step then has the same length; under Adam, which divides by
the gradient's own size, little changes until a rare large gradient comes, which is cut like all others.

Tell apart
exploding-gradients: the norm runs away, and the clip is what saves the run. A summed loss has large norms by design.

Cure
Set the limit to about twice the median norm of a healthy stretch, or lower the learning rate if the norm is still growing.

Sources
Pascanu, Mikolov & Bengio 2013, section 3.2: a limit of half to ten times the average norm. The share of 90 %: the audit's limit.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number
from sickbay.core.robust import median

SATURATED = Threshold(0.9, "share of steps", source="the catalogue's limit: clipping that spares one step in ten is no exception any more")
CLEARLY = Threshold(2.0, "x limit", source="a limit within twice the median norm is where the advice would put it")
WARM = Threshold(0.1, "share of the run", source="warm-ups last up to a tenth of a run, and large norms are usual in them")
FEWEST = 40  # clipped or not: readings after the warm-up


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    norms = [r for r in chart["clip_norm"].finite() if r.step > WARM * chart.last_step and r.note.get("max_norm", 0) > 0]
    norms = [r for r in norms if r.note["max_norm"] < float("inf")]
    if len(norms) < FEWEST:
        return NotExamined(f"{len(norms)} clipped steps after the warm-up; this needs {FEWEST}")
    share = sum(r.value > r.note["max_norm"] for r in norms) / len(norms)
    times = median([r.value / r.note["max_norm"] for r in norms])
    if share <= SATURATED or times <= CLEARLY:
        return None
    middle = sorted(norms, key=lambda r: r.value)[len(norms) // 2]
    return Diagnosis(
        summary=f"clipping acted on {share:.0%} of {len(norms)} steps looked at; the norm is {number(times)} times the limit of "
        f"{number(middle.note['max_norm'])} in the median.",
        evidence=(Evidence(middle, middle.note["max_norm"]),),
        severity="note",
        step=norms[0].step,
        source=middle.source,
    )


def inject(case: Any) -> Any:
    """The clip's limit is a thousandth of the usual."""
    return case.but(clip=1e-3, steps=max(case.steps, 60))


condition = Condition(
    id="clipping-saturated",
    symptom="gradient clipping acts on nearly every step",
    needs=("clip_norm",),
    diagnose=diagnose,
    prescribes=("raise-clip-limit",),
    inject=inject,
)
