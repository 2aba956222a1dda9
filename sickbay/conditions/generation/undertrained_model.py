"""The model predicts worse than a table of which token follows which would, counted on the very same data.

Looks like
Samples of letters or words in roughly the right frequencies that do not hang together; the loss still falls when the run ends, or has
hardly moved.

Why
Too few steps for the data and the learning rate, a schedule that ended early, or a fault that keeps the model from learning: then that
one is named first.

Tell apart
A loss has no good or bad value of its own: 2.0 nats are much for characters and little for words. So it is held against what counts of
single tokens, pairs and triples of all batches before lose on the same batch. loss-plateau: the loss no longer falls. A short trial run
is undertrained by design, so this is a note unless a long run has not even learned how often each token comes.

Cure
Train longer, with a schedule that fits the new length; try a higher learning rate if the loss falls slowly.

Sources
Interpolated n-gram baselines: Chen & Goodman 1998, "An empirical study of smoothing techniques for language modeling"; for orientation
only, characters of English text: 1.5 to 2.0 nats and subwords 2.0 to 3.0 nats for a small trained model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sickbay.core.chart import Chart, Reading, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number
from sickbay.core.robust import median

ABOVE = Threshold(1.05, "x loss of counting", source="a batch's loss and the counts' own error vary by 2 to 3 % in runs at the baseline")
SINGLE = Threshold(
    1.05, "x loss of single tokens", source="how often tokens come is learned within some dozens of steps at any usable rate"
)
STRUCTURE = Threshold(0.95, "x loss of single tokens", source="noise gives pairs and triples no advantage over single tokens")
SCALED = Threshold(2.0, "x", source="two losses of one step, both means over tokens, differ by a few percent; sums by the number of tokens")
LONG = Threshold(300, "steps", source="ten times what learning the tokens' frequencies takes in small healthy runs")
FEWEST, LAST = 4, 16  # readings: of the counts beside the model; of the end of the run


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """The end of the run's loss against the best and the simplest count of the last batches that held new rows."""
    counted = [r for r in chart["ngram_loss"] if r.note.get("counted")]
    losses = chart["train_loss"].finite()
    if len(counted) < FEWEST or not len(losses):
        return NotExamined(f"{len(counted)} batches were held against counts of those before; this needs {FEWEST}")
    best = median([r.value for r in counted[-LAST:]])
    single = median([r.note["unigram"] for r in counted[-LAST:]])
    factor = _per_token(counted, losses)
    level, last = median(losses.values[-LAST:]) * factor, dataclasses.replace(losses[-1], value=losses[-1].value * factor)
    if best > STRUCTURE * single:
        return NotExamined("counts of pairs and triples of tokens find no structure in the data either")
    if level <= ABOVE * best:
        return None
    lost = level > SINGLE * single and len(losses) >= LONG
    which = f"single tokens alone gives {number(single)}" if level > SINGLE * single else f"neighbouring tokens gives {number(best)}"
    text = f"at the end the loss is {number(level)} nats per token; counting {which} on the same text."
    evidence = (Evidence(last, best), Evidence(counted[-1], label="loss of counting"))
    step, source = counted[-1].step, counted[-1].source
    return Diagnosis(text, evidence, "warning" if lost else "note", step, source=source, certainty="suspected")


def _per_token(counted: list[Reading], losses: Series) -> float:
    """By what the training loss is multiplied to be a mean over tokens; 1 unless it is a sum or scaled."""
    given = {r.step: r.value for r in losses}
    pairs = [(r.note["model"], given[r.step]) for r in counted if r.note.get("model") and given.get(r.step)]
    factor = median([mean / value for mean, value in pairs]) if pairs else 1.0
    return 1.0 if 1 / SCALED < factor < SCALED else factor


def inject(case: Any) -> Any:
    """Twenty steps at a hundredth of the learning rate."""
    return case.but(steps=20, learning_rate=case.learning_rate / 100, eval_every=0)


condition = Condition(
    id="undertrained-model",
    symptom="the loss stays above what counts of neighbouring tokens give on the same text",
    needs=("train_loss", "ngram_loss"),
    diagnose=diagnose,
    prescribes=("train-longer",),
    presumes_health=True,
    inject=inject,
)
