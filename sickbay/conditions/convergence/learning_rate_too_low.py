"""The steps are so small that the loss hardly moves, although the very same direction would take it much further.

Looks like
The loss lies almost where it started, falling by a little less than nothing each step; gradients are ordinary; no error anywhere.

Why
A slip in the exponent, a learning rate taken over from another optimizer (SGD's needs are a hundred times Adam's), from fine-tuning, or
scaled down for a batch that is not that large. The steps go the right way and arrive nowhere.

Tell apart
schedule-misconfigured: the rate that was asked for was ordinary. vanishing-gradients, missing-gradient: a longer step gains nothing.
Fine-tuning from a good state wants small steps, and so does a warm-up: neither has much to gain from a hundredfold step.

Cure
Multiply the learning rate by the factor that gained most on its batch, divided by three to ten, and look again. What settles it: a
learning-rate range test (Smith 2017), or the same script and seed at ten and a hundred times the rate.

Sources
Updates near 1e-3 of the weight are healthy, below 1e-4 the rate is too low: Karpathy 2022, "Building makemore 3". Trying several
lengths along the step's own direction on its own batch is a line search: Nocedal & Wright 2006, chapter 3.
"""

from __future__ import annotations

import math
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number
from sickbay.core.robust import median

SMALL_UPDATE = Threshold(3e-4, "ratio", source="three times the guide's 1e-4, since the argument is the trial and not the size")
FURTHER = Threshold(100.0, "x step", source="a healthy rate is within ten times of the best single step; two decades are a slip")
GAIN = Threshold(0.03, "share of loss", source="calibration: an Adam step of ordinary size lowers a fresh model's loss by 3 to 10 %")
GAIN_UNKNOWN = Threshold(
    0.3, "share of loss", source="where no uniform guess says what the loss started from, only a large gain is told from a fit"
)
RATIO = Threshold(30.0, "x gain of the step", source="calibration: a slip of two decades gains 30 to 600 times as much when undone")
HARDLY = Threshold(0.1, "share of first loss", source="a run that came a tenth of the way is slow and not standing")
FROM_CHANCE = Threshold(0.5, "share of chance loss", source="below half the loss of a uniform guess something was learned before")
FULL_RATE = Threshold(0.5, "share of highest rate", source="below half of its peak a schedule is warming up or ending")
FEWEST, START, END = 30, 5, 10  # steps: of a run that can be judged; readings that make up its start and its end


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    losses, chance = chart["loss"].values, chart["chance_loss"].median()
    if chance != chance and len(chart["frequency_loss"]):
        chance = chart["frequency_loss"][-1].value  # answers of yes or no: guessing by how often each comes
    first, last = median(losses[:START]), median(losses[-END:])
    if len(losses) < FEWEST:
        return NotExamined(f"the run has {len(losses)} steps; this needs {FEWEST}")
    if first - last > HARDLY * abs(first) or last < FROM_CHANCE * chance:
        return None
    highest = max(reading.value for reading in chart["learning_rate"])
    tried = [r for r in chart["step_gain"] if "100" in r.note["losses"] and (r.note["rate"] or 0) >= FULL_RATE * highest]
    if not tried:
        late = [r.value for r in chart["update_ratio"] if r.step >= FEWEST]
        small = bool(late) and 0 < median(late) < SMALL_UPDATE
        return NotExamined("updates are small, and no step at the full rate could be tried on a copy") if small else None
    needed = GAIN if chance == chance else GAIN_UNKNOWN
    if not all(_further(reading, needed) for reading in tried):
        return None
    return _found(chart, tried, needed, f"the loss went from {number(first)} to {number(last)} in {len(losses)} steps")


def _found(chart: Chart, tried: list[Reading], needed: float, moved: str) -> Diagnosis:
    best = tried[-1]
    lowest, step = min(v for v in best.note["losses"].values() if v is not None), best.note["losses"]["1"]
    return Diagnosis(
        summary=f"{moved}; at step {best.step} a step {best.note['best']:g} times as long would have lowered it from "
        f"{number(best.note['loss'])} to {number(lowest)} at once, the step itself to {number(step)}.",
        evidence=(
            Evidence(best, needed),
            *(Evidence(r, SMALL_UPDATE) for r in chart["update_ratio"].between(best.step - 1, best.step)[:1]),
        ),
        severity="warning",
        step=tried[0].step,
        source=chart["learning_rate"][0].source or best.source,
        certainty="likely",
    )


def _further(reading: Reading, needed: float) -> bool:
    """True if the same direction, two decades further, gains a share `needed` of the loss and very much more than the step does.

    Near a uniform guess it is enough that the gain still grows with the step three decades on: no curvature is felt even there.
    """
    before, losses = reading.note["loss"], {float(k): v for k, v in reading.note["losses"].items() if v is not None}
    gains = {multiple: before - loss for multiple, loss in losses.items()}
    if reading.note["best"] < FURTHER or not gains[1.0] <= gains.get(10.0, -math.inf) <= gains.get(FURTHER, -math.inf):
        return False
    best = max(gains.values())
    if best >= needed * abs(before) and best >= RATIO * max(gains[1.0], 0.0):
        return True
    straight = gains.get(10 * FURTHER, 0.0) >= RATIO * gains[10.0] > 0
    return needed == GAIN and reading.note["best"] >= 10 * FURTHER and straight


def inject(case: Any) -> Any:
    """The learning rate is a thousandth of what it should be."""
    return case.but(learning_rate=case.learning_rate * 1e-3)


condition = Condition(
    id="learning-rate-too-low",
    symptom="updates are tiny and the loss hardly moves, though a longer step in the same direction lowers it",
    needs=("update_ratio", "learning_rate", "loss"),
    uses=("step_gain", "chance_loss", "frequency_loss"),
    diagnose=diagnose,
    prescribes=("raise-learning-rate",),
    leads_to=("loss-plateau", "clipping-saturated", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
