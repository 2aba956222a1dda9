"""The loss stands still at what guessing gives, and nothing that is looked for says why.

Looks like
A flat line at ln(number of classes), or at the entropy of the targets' frequencies: the model says how often each answer comes, and
nothing about which one comes now.

Why
The output does not depend on the input in any way that helps: a cut or faded signal, positions or a mask that hide what is needed,
targets that do not belong to the inputs, regularisation that wipes out what is learned, a rate too high or too low.

Tell apart
Every more exact finding explains this one and comes before it. A hard task may stand at guessing for long and then drop; a short
run is not judged. undertrained-model: the loss is still falling.

Cure
In this order: overfit ten examples with dropout and weight decay off; if that fails, look at the data (print inputs beside targets), at the
mask and positions, at gradients per layer; if it works, run a learning-rate range test, then more steps.

Sources
Karpathy 2019, "A recipe for training neural networks": overfit one batch, verify the loss at initialisation. The slope's test is that of
a least-squares line against its residuals.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number
from sickbay.core.robust import median, robust_z

AT_GUESS = Threshold(
    0.02, "share of guessing's loss", source="three times the noise of twenty batches' mean in runs stuck at a uniform guess"
)
SLOPE = Threshold(3.0, "standard errors", source="a slope within three standard errors of zero is none")
SPIKE = Threshold(8.0, "robust standard deviations", source="batches of text vary by 3; a jump back is no part of a trend")
FALL = Threshold(0.01, "share of loss", source="a significant fall by less than a hundredth in half a run is none worth waiting for")
ALIVE = Threshold(0.1, "share of highest rate", source="where a schedule has ended its run the loss is flat by design")
ABOVE = Threshold(
    1.15, "x loss of counting", source="counts of pairs and triples are no model; whoever stays a seventh above them has stopped too early"
)
FEWEST, SMOOTH, END = 100, 10, 20  # steps: of a run that can be judged; readings per median, and of its end


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    losses = chart["loss"].finite()
    rates = chart["learning_rate"]
    highest = max(rates.values, default=math.nan)
    # Where a schedule has come to its end the loss is flat by design; rates are not read at every step.
    last = max((reading.step for reading in rates if reading.value >= ALIVE * highest), default=-1)
    ended = any(reading.step > last for reading in rates)
    kept = losses.between(0, last) if ended else losses
    if len(kept) < FEWEST or len({r.source for r in losses}) > 1:
        return NotExamined(f"{len(kept)} steps have one finite loss and a learning rate; this needs {FEWEST}")
    level, lowest = median(kept.values[-END:]), _lowest(kept.values)
    guesses = _guesses(chart)
    if not guesses or not _flat(kept):
        return None if guesses else NotExamined("what guessing would give is not known for this loss")
    counted = median([r.value for r in chart["ngram_loss"]][-SMOOTH:])
    if counted >= (1 - AT_GUESS) * min(guesses.values()):
        return NotExamined("counting tokens predicts them no better than guessing: there may be nothing to learn in them")
    for how, guess in guesses.items():
        if abs(level / guess - 1) <= AT_GUESS and lowest > (1 - 2 * AT_GUESS) * guess:
            text = f"after {len(losses)} steps the loss is {number(level)}, that of {how} ({number(guess)}), and it is not falling."
            return Diagnosis(text, (Evidence(kept[-1], guess),), "warning", kept[0].step, source=kept[-1].source, certainty="suspected")
    if level > ABOVE * counted:
        text = f"the loss stands at {number(level)}, though counting pairs and triples of tokens gives {number(counted)}."
        return Diagnosis(text, (Evidence(kept[-1], counted),), "note", kept[-END].step, source=kept[-1].source, certainty="suspected")
    return None


def _guesses(chart: Chart) -> dict[str, float]:
    """The loss of guessing, by how it is done: uniformly, and by the frequency of tokens or answers where it was counted."""
    single = median([r.note["unigram"] for r in chart["ngram_loss"] if r.note.get("unigram")][-SMOOTH:])
    answers = next((r.value for r in reversed(chart["frequency_loss"])), 0.0)
    known = {"a uniform guess": chart["chance_loss"].median(), "guessing by frequency": single if single > 0 else answers}
    return {how: guess for how, guess in known.items() if guess > 0}


def _lowest(values: list[float]) -> float:
    """The lowest median of SMOOTH neighbours."""
    return min(median(values[i : i + SMOOTH]) for i in range(len(values) - SMOOTH + 1))


def _flat(losses: Series) -> bool:
    """True if the second half of `losses` does not fall by more than its noise explains, or by less than is worth waiting for."""
    half = losses[len(losses) // 2 :]
    usual = [r.value for r in half]
    half = [r for r in half if robust_z(r.value, usual) < SPIKE]
    steps, values = [float(r.step) for r in half], [r.value for r in half]
    slope, start = statistics.linear_regression(steps, values)
    rest = math.sqrt(sum((v - start - slope * s) ** 2 for s, v in zip(steps, values)) / (len(values) - 2))
    error = rest / (statistics.pstdev(steps) * math.sqrt(len(steps)))
    return slope > -SLOPE * error or -slope * (steps[-1] - steps[0]) < FALL * median(values)


def inject(case: Any) -> Any:
    """Weight decay of 100 % per unit of learning rate times a thousand: what is learned is wiped out with every step."""

    def optimizer(sick: Any, model: Any) -> Any:
        made = case.optimizer(sick, model)
        for group in made.param_groups:
            group["weight_decay"] = 500.0
        return made

    return case.but(optimizer=optimizer, steps=max(case.steps, 160))


condition = Condition(
    id="loss-plateau",
    symptom="the loss stands still at what guessing gives, and nothing better explains it",
    needs=("loss",),
    uses=("learning_rate", "chance_loss", "frequency_loss", "ngram_loss"),
    diagnose=diagnose,
    prescribes=("overfit-ten-examples",),
    leads_to=("repetitive-generation", "incoherent-generation"),
    inject=inject,
)
