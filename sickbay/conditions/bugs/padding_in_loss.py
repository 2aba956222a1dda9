"""Padding tokens are counted as targets of the loss.

Looks like
    The loss is surprisingly low and falls fast at first, more so with short texts in long batches; the model writes padding or stops
    early. Losses of differently padded batches cannot be compared.

Why
    The loss was called without `ignore_index`, or with one that is not the padding id (the default -100 against labels padded with 0
    or the tokenizer's pad id), so predicting padding, which is easy, dilutes the gradient of the real tokens.

Tell apart
    eos-masked is the opposite: too much is ignored. padding-attended is about what the model reads, this about what it is graded on.

Cure
    Set the targets at padded positions to -100, or pass ignore_index=pad_id to the loss.

Sources
    PyTorch documentation, `torch.nn.CrossEntropyLoss` (ignore_index, default -100); transformers documentation, data collators
    ("labels ... padded with -100").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

LIMIT = Threshold(0.01, "share of targets", source="below 1 % the padding's part of the gradient is under the noise between two batches")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Padding that makes up more than 1 % of all counted targets so far."""
    seen = chart["padding_counted"].finite()
    total = sum(float(r.note.get("counted", 1)) for r in seen)
    if not total:
        return NotExamined("no batch had counted targets")
    share = sum(r.value * float(r.note.get("counted", 1)) for r in seen) / total
    over = Series(r for r in seen if r.value > LIMIT)
    worst = over.worst()
    if share <= LIMIT or worst is None:
        return None
    return Diagnosis(
        summary=f"{share:.0%} of all counted targets are padding (id {worst.note.get('pad_id', '?')}; up to {worst.value:.0%} in one "
        "batch): the model is graded on predicting padding.",
        evidence=(Evidence(worst, LIMIT),),
        severity="warning",
        step=over[0].step,
        where=worst.where,
        source=worst.source,
        seconds=over[0].seconds,
    )


def inject(case: Any) -> Any:
    """Rows are padded to the right with a new id that the loss counts like any other."""
    batches, pad_id = case.batches, case.config.vocab_size

    def batches_padded(case: Any, split: str) -> Iterator[tuple[Any, Any]]:
        for ids, targets in batches(case, split):
            ids, targets = ids.clone(), targets.clone()
            for row in range(len(ids)):
                end = max(2, ids.shape[1] - 2 * row)
                ids[row, end:] = pad_id
                targets[row, end - 1 :] = pad_id
            yield ids, targets

    def loss_of_all(case: Any, model: Any, ids: Any, targets: Any) -> Any:
        from torch.nn import functional

        return functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())

    config = dataclasses.replace(case.config, pad_id=pad_id, vocab_size=pad_id + 1)
    return case.but(config=config, batches=batches_padded, loss=loss_of_all)


condition = Condition(
    id="padding-in-loss",
    symptom="padding is counted as a target",
    needs=("padding_counted",),
    diagnose=diagnose,
    prescribes=("ignore-padding",),
    leads_to=("repetitive-generation", "incoherent-generation"),
    inject=inject,
)
