"""Training and validation loss stand still together, above what mere counting gives: the model has no room for more.

Looks like
Both curves flat and close to one another, long before the data are used up; a larger model on the same tokens ends lower.

Why
Too few parameters, heads or layers for the data, a bottleneck in width, or a context shorter than what has to be remembered.

Tell apart
undertrained-model: the loss still falls. learning-rate-too-low: it could fall faster. overfitting: validation parts from training.
loss-plateau: nothing at all was learned. Only a run of a larger model settles it, so this is a suspicion.

Cure
Twice the width or depth on the same tokens; keep it if validation loss falls.

Sources
Kaplan et al. 2020, arXiv 2001.08361 (loss against parameters at enough data); Hoffmann et al. 2022, arXiv 2203.15556 (twenty tokens
per parameter).
"""

from __future__ import annotations

import statistics
from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number
from sickbay.core.robust import median

ABOVE = Threshold(1.05, "x loss of counting", source="a model with room for pairs and triples of tokens gets below their counts")
LEARNED = Threshold(0.97, "x loss of single tokens", source="above it nothing but frequencies was learned, which no lack of room explains")
TOGETHER = Threshold(0.02, "share of loss", source="the two curves of a model that generalises differ by evaluation noise alone")
FALL = Threshold(0.01, "share of loss", source="a loss that falls by less than a hundredth in the last third has stopped")
STEPS = Threshold(200, "steps", source="below this, runs of any size are still falling")
FEWEST, LAST = 3, 16  # evaluations; readings of the end


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """A flat end, validation beside training, both above the counts that use pairs and triples."""
    losses, seen = chart["train_loss"].finite(), chart["validation_loss"].finite()
    counted = [r for r in chart["ngram_loss"] if r.note.get("counted")]
    if len(losses) < STEPS or len(seen) < FEWEST or len(counted) < FEWEST:
        return NotExamined(f"{len(losses)} steps with {len(seen)} evaluations were seen; this needs {STEPS:.0f} with {FEWEST}")
    third = losses.values[-len(losses) // 3 :]
    begin, end = statistics.fmean(third[: len(third) // 2]), statistics.fmean(third[len(third) // 2 :])
    best, single = median([r.value for r in counted[-LAST:]]), median([r.note["unigram"] for r in counted[-LAST:]])
    validation = median(seen.values[-2:])
    flat = begin - end < FALL * end
    if not flat or validation > (1 + TOGETHER) * end or not ABOVE * best < end < LEARNED * single:
        return None
    text = f"training ({number(end)}) and validation loss ({number(validation)}) stand still; counting tokens gives {number(best)}."
    step, source = losses[-1].step, counted[-1].source
    return Diagnosis(text, (Evidence(losses[-1], best), Evidence(seen[-1])), "note", step, source=source, certainty="suspected")


def inject(case: Any) -> Any:
    """One block of width 8: next to nothing passes from one position to the next. Batches are large enough to gain nothing by more."""
    import dataclasses

    tiny = dataclasses.replace(case.config, dim=8, num_layers=1, num_heads=1)
    return case.but(config=tiny, steps=max(case.steps, 400), batch_size=4 * case.batch_size, learning_rate=10 * case.learning_rate)


condition = Condition(
    id="model-too-small",
    symptom="training and validation loss stand still together, above what counting gives",
    needs=("train_loss", "validation_loss", "ngram_loss"),
    diagnose=diagnose,
    prescribes=("grow-model",),
    leads_to=("undertrained-model", "loss-plateau"),
    inject=inject,
)
