"""Embedding and head are most of the model, and the data never use most of their rows.

Looks like
    A small model that needs much memory and whose optimizer step takes as long as its forward; logits far wider than the data's alphabet.

Why
    Each row costs width x 4 bytes of weight, as much of gradient, and twice as much of Adam's state, whether its id ever comes or not;
    logits and their gradient have a column for each. A borrowed tokenizer (50,257 rows for GPT-2) on a small corpus.

Tell apart
    A pretrained model that is fine-tuned keeps its rows on purpose. A corpus of which only the beginning was seen may need them later:
    the summary says whether new ids were still coming.

Cure
    A tokenizer of the corpus's own size, or pruning with remapped ids, data and rows, special tokens kept; tie head and embedding.

Sources
    Press & Wolf 2017, arXiv 1608.05859 (tying); Abdaoui et al. 2020, arXiv 2010.05609 (pruning the vocabulary).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold
from sickbay.core.plan import gibibytes

SHARE = Threshold(0.5, "share of parameters", source="more than half of the model is a look-up table")
USED = Threshold(0.5, "share of rows", source="fewer than every second row is ever asked for")
NEW = Threshold(0.1, "share of rows seen", source="fewer than one in ten rows came in the newer half of the steps: the count has settled")
WORTH = Threshold(8 << 20, "bytes", source="less memory than one allocation of a small script")
STATE = 4  # copies of a trained row: weight, gradient, Adam's two moments


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Most parameters are rows, most rows were never used, and hardly any new ones were still coming."""
    counted = chart["vocabulary_used"].finite()
    if not counted:
        return NotExamined("no embedding of 512 rows or more was fed with ids")
    last = counted[-1]
    note, cost = last.note, float(last.note["weight_bytes"]) * (STATE if last.note.get("trained") else 1)
    unused = (1 - last.value) * cost
    if note["share"] < SHARE or last.value >= USED or unused < WORTH:
        return None
    if len(counted) < 2 or note["new_late"] > NEW:
        return NotExamined(f"new ids were still coming: {note['seen']} of {note['rows']} rows after {note['tokens']} tokens")
    head = " and its head" if note.get("head") else " (tied with the head)" if note.get("tied") else ""
    text = (
        f"{last.where}{head} holds {note['share']:.0%} of the parameters; {note['seen']:,} of its {note['rows']:,} rows came in "
        f"{note['tokens']:,} ids. The others cost {gibibytes(unused)} of weights, gradients and optimizer state."
    )
    return Diagnosis(text, (Evidence(last, USED),), "note", last.step, last.where, last.source, seconds=last.seconds)


def inject(case: Any) -> Any:
    """The corpus's 65 characters in a table of 40,000 rows."""
    from dataclasses import replace

    return case.but(config=replace(case.config, vocab_size=40_000), steps=16)


condition = Condition(
    id="large-vocabulary",
    symptom="embedding and head are most of the model, and the data never use most of their rows",
    needs=("vocabulary_used",),
    diagnose=diagnose,
    prescribes=("prune-vocabulary",),
    inject=inject,
)
