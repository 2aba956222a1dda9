"""The loss jumps far out of its own band and comes back: a transient spike, led by the gradient norm or made by one batch.

Looks like
A needle in the loss curve. The gradient norm rises one to five steps before it; some tens of steps later both are
back where they were. Often harmless, sometimes the first of many, each a little higher.

Why
A batch unlike the others (repeated text, garbage, a wrong mask), or a direction in which Adam's second moment had become
small, so that an ordinary gradient made an enormous step.

Tell apart
exploding-gradients: it does not come back.
A rise together with a rise of the learning rate is a warm restart, and a jump without a leading gradient that decays slowly
is a change of the data: neither is this.

Cure
Clip gradients; skip an update whose norm is ten times the running median; look at the named batch. Large runs go back about
100 steps and leave out the batches around the spike.

Sources
Lead and size: BLOOM chronicles, 2022-04-12 (norm 0.24 to 960 in five steps, loss 2.2 to 5.1 three steps later, recovered in
thirty). Robust z over 10: the alarm limit of trainscope, and 4 times ZClip's clipping point (Kumar et al. 2025).
Roll back and skip: Chowdhery et al. 2022 (PaLM), section 5.1.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold, number
from sickbay.core.robust import median, robust_z, rolling_z, tail_z

OUTLIER = Threshold(10.0, "robust standard deviations", source="z > 10 of median and MAD; BLOOM's spike has z > 100")
RISE = Threshold(
    0.1, "share of the first loss", source="calibration: a jump that undoes less than a tenth of the way is noise of rare batches"
)
UNLED = Threshold(
    0.4,
    "share of the first loss",
    source="calibration: near the end of a fit single hard batches reach a third of the way back by themselves",
)
RECOVERED = Threshold(0.5, "share of the jump", source="half way back within RECOVERY steps; BLOOM was wholly back after 30")
RESTART = Threshold(1.3, "x learning rate", source="calibration: decaying schedules never rise; restarts and new phases do")
HISTORY, FEWEST, LEAD, RECOVERY, BRIEF = 50, 20, 5, 50, 3  # steps


def diagnose(chart: Chart) -> Diagnosis | None:
    """The first spike in any of the run's losses; those of two backward calls (a generator's, a critic's) are two series."""
    by_line: dict[str, list[Reading]] = {}
    for reading in chart["loss"].finite():
        by_line.setdefault(reading.source, []).append(reading)
    spikes = [spike for losses in by_line.values() if (spike := _spike(chart, Series(losses))) is not None]
    return min(spikes, key=lambda spike: spike.step, default=None)


def _spike(chart: Chart, losses: Series) -> Diagnosis | None:
    values = losses.values
    first, distances = median(values[:3]), rolling_z(values, HISTORY, FEWEST)
    for index in [i for i in range(FEWEST, len(values) - 1) if distances[i] > OUTLIER]:
        onset, past = losses[index], values[max(0, index - HISTORY) : index]
        middle, rise = median(past), RISE * max(first, median(past))
        if onset.value - middle <= rise or robust_z(past[-1], past[:-1]) > OUTLIER or _restarted(chart, onset.step):
            continue
        back = _back(values[index + 1 : index + 1 + RECOVERY], middle, onset.value)
        lead = _lead(chart, onset.step)
        peak: Reading = losses.between(onset.step, losses[index + (back or 0)].step).worst() or onset
        if tail_z(peak.value, past) <= OUTLIER:  # such a series often lies that far above its middle
            continue
        if back is None or (lead is None and (back > BRIEF or peak.value - middle < UNLED * first)):
            continue
        led = f"; the gradient norm was {number(lead.value)} at step {lead.step} before it" if lead is not None else ""
        size = f"{number(robust_z(peak.value, past))} robust standard deviations"
        return Diagnosis(
            summary=f"the loss jumped from {number(middle)} to {number(peak.value)} at step {peak.step} ({size}) "
            f"and was back after {back} step{'s' * (back > 1)}{led}",
            evidence=(Evidence(peak, middle + rise), *((Evidence(lead),) if lead is not None else ())),
            severity="warning",
            step=lead.step if lead is not None else onset.step,
            source=onset.source,
        )
    return None


def _back(after: list[float], middle: float, top: float) -> int | None:
    """Steps until the loss is half way back and stays there; None if it does not: another phase has begun, or other data."""
    level = middle + RECOVERED * (top - middle)
    count = next((count for count, value in enumerate(after, start=1) if value < level), None)
    return count if count is not None and median(after[count - 1 :]) < level else None


def _lead(chart: Chart, step: int) -> Reading | None:
    """The first gradient norm out of its own band in the LEAD steps before `step`."""
    norms = chart["grad_norm"].finite()
    calm = norms.between(step - HISTORY, step - LEAD - 1).values
    return next((r for r in norms.between(step - LEAD, step - 1) if len(calm) >= FEWEST // 2 and robust_z(r.value, calm) > OUTLIER), None)


def _restarted(chart: Chart, step: int) -> bool:
    """True if the rate has just risen, or the steps are now those of an optimizer made elsewhere: a phase begins."""
    rates = chart["learning_rate"].between(step - HISTORY // 2, step)
    before, now = rates.between(0, step - BRIEF - 1), rates.between(step - BRIEF, step)
    another = bool(before) and not {r.source for r in now} <= {r.source for r in before}
    return another or (len(rates) > 1 and rates[-1].value > RESTART * min(rates.values))


def inject(case: Any) -> Any:
    """Two broken batches late in the run: every target is the rarest character."""

    def batches(sick: Any, split: str) -> Any:
        rarest = sick.corpus.bincount(minlength=sick.config.vocab_size).argmin()
        first = 3 * sick.steps * sick.accumulation // 4
        for index, (ids, targets) in enumerate(case.batches(sick, split)):
            broken = split == "train" and first <= index < first + 2 * sick.accumulation
            yield (ids, rarest.expand_as(targets).contiguous()) if broken else (ids, targets)

    return case.but(batches=batches, steps=max(case.steps, 120))


condition = Condition(
    id="loss-spike",
    symptom="the loss jumps far out of its own band and comes back",
    needs=("loss",),
    uses=("grad_norm", "learning_rate"),
    diagnose=diagnose,
    prescribes=("clip-gradients", "skip-spike-batch"),
    inject=inject,
    after_step=FEWEST,
)
