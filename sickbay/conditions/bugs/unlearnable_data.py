"""The inputs say nothing about the targets: what reaches the loss cannot be learned, only guessed or learned by heart.

Looks like
The loss stands at the entropy of the targets' frequencies from the first epoch on. Later it may fall, while validation stays where it is:
examples are memorised. Gradients flow and every shape fits.

Why
Inputs and targets shuffled separately, cut from different rows or files; features zeroed, every token replaced by the unknown one, a
column overwritten; labels joined by a wrong key.

Tell apart
loss-plateau: nobody knows why. Label noise leaves the rest learnable, and the true pairs then still beat others. A learning rate too low
leaves the model ignorant though the data speak: here neither the model nor a test that needs no model finds a connection. Trials on
random numbers are told by their inputs and not remarked on.

Cure
Print ten inputs beside their targets as they reach the model. Shuffle once, by index. Then overfit ten examples again: the loss must reach
the conditional entropy of those ten, zero if no input comes twice.

Sources
Zhang et al. 2017, arXiv 1611.03530 (networks fit random labels, so a falling training loss proves nothing); Gretton et al. 2005,
"Measuring statistical dependence with Hilbert-Schmidt norms"; Karpathy 2019, "A recipe for training neural networks".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number
from sickbay.core.pooled import pooled

SAME = Threshold(
    0.9, "share of chance", source="rows of equal input differ as often as any two rows: label noise at which a tenth is left to learn"
)
REPEATED = Threshold(0.5, "share of rows", source="inputs most of which came before are not told apart by anything")
VARIED = Threshold(0.05, "share of pairs", source="targets that hardly ever differ cannot show a connection")
TOLD = Threshold(3.0, "standard errors", source="a model that has learned anything lies at 5 and more after some dozens of steps")
DEPENDENT = Threshold(
    4.0, "standard deviations", source="400 examples of learnable tasks gave 15 and more, separately shuffled ones below 3"
)
STEPS = Threshold(60, "steps", source="by then small models have told true pairs from others on every learnable set tried")
EARLY = Threshold(0.25, "share of steps", source="what is measured before a quarter of the run speaks of the untrained model")
FEWEST, ROWS, COLUMNS = 50, 150, 8  # repeated rows; rows behind a gain; numbers of an input that vary: fewer make a formula, not data


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Equal inputs with unequal targets; or nothing gained by the true pairs, neither for the model nor for a test without one."""
    for found in chart["input_conflicts"]:
        note = found.note
        many = note["repeats"] >= max(FEWEST, REPEATED * note["rows"])
        if many and note["marginal"] > VARIED and note["rate"] >= SAME * note["marginal"] and not _told(chart["pairing_gain"]):
            text = f"{note['rows']} rows had {note['inputs']} inputs, and rows of one input had as unlike targets as any rows."
            return Diagnosis(text, (Evidence(found, 0.0),), "critical", found.step, source=found.source)
    if chart.last_step < STEPS:
        return NotExamined(f"the run has {chart.last_step} steps; this needs {STEPS:.0f}")
    late = [r for r in chart["pairing_gain"] if r.where != "repeated" and r.step >= max(STEPS / 3, EARLY * chart.last_step)]
    rows = sum(int(r.note["rows"]) for r in late)
    if rows < ROWS:
        return NotExamined(f"{rows} rows that the model had not been trained on were seen late enough; this needs {ROWS}")
    tested = next(iter(chart["input_dependence"]), None)
    if _told(late) or tested is None or tested.note["noise"] or tested.note["columns"] < COLUMNS or tested.value > DEPENDENT:
        return None
    return _nothing_told(late[-1], tested, rows, *pooled((r.value, r.note["error"]) for r in late))


def _told(gains: Iterable[Reading]) -> bool:
    """True if the model tells true pairs from others; where it does, equal inputs of unlike targets are asked different questions."""
    gain, error = pooled((reading.value, reading.note["error"]) for reading in gains)
    return gain > TOLD * error


def _nothing_told(last: Reading, tested: Reading, rows: int, gain: float, error: float) -> Diagnosis:
    text = (
        f"on {rows} new rows the true targets lie no nearer than those of other rows (gain {number(gain)} +- {number(error)} of the loss), "
        f"and {tested.note['rows']} examples show no connection of inputs and targets."
    )
    evidence = (Evidence(last, TOLD * error), Evidence(tested, DEPENDENT))
    return Diagnosis(text, evidence, "critical", last.step, source=last.source, certainty="likely")


def inject(case: Any) -> Any:
    """Each row is trained on the targets of another place in the text."""
    batches = case.batches

    def torn_apart(sick: Any, split: str) -> Iterator[tuple[Any, Any]]:
        others = batches(sick.but(seed=sick.seed + 1), split)
        for (ids, _), (_, targets) in zip(batches(sick, split), others):
            yield ids, targets

    return case.but(batches=torn_apart, steps=max(case.steps, 120), learning_rate=3 * case.learning_rate)


condition = Condition(
    id="unlearnable-data",
    symptom="inputs say nothing about the targets: shuffled apart, zeroed, or from different rows",
    needs=("pairing_gain",),
    uses=("input_conflicts", "input_dependence"),
    diagnose=diagnose,
    prescribes=("match-inputs-targets",),
    leads_to=("loss-plateau", "overfitting", "undertrained-model", "model-too-small"),
    inject=inject,
)
