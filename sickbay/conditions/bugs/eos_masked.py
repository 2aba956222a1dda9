"""The end token is in the texts but never a target, because it doubles as padding and padding is ignored.

Looks like
    Training looks normal. The fine-tuned model never stops: it answers, then goes on until the length limit.

Why
    tokenizer.pad_token = tokenizer.eos_token, and the collator sets every label equal to pad_token_id to -100. That removes the real end
    token of each text together with the padding.

Tell apart
    padding-in-loss is the opposite: padding counted. Texts cut off at the maximal length hold no end token at all, and then there is none
    to learn here either: this needs end tokens among the inputs.

Cure
    Give padding a token of its own (and resize the embedding), or mask the labels by attention_mask instead of by id.

Sources
    trl issue 1623 and pull request 6357, torchtune issue 949, DeepSeek-Coder issue 163, Hugging Face course issue 33,
    Megatron-Bridge issue 4660.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

BATCHES = Threshold(2, "batches", source="one batch may hold only texts that were cut before their end")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """No end token among the counted targets of at least two batches whose inputs hold some."""
    ended = Series(r for r in chart["eos_targets"].finite() if float(r.note.get("eos_in_inputs") or 0) > 0)
    if sum(ended.values) > 0:
        return None
    if len(ended) < BATCHES:
        return NotExamined(f"{len(ended)} batches with an end token among their inputs; this needs {BATCHES:.0f}")
    first = ended[0]
    inputs = sum(float(r.note["eos_in_inputs"]) for r in ended)
    return Diagnosis(
        summary=f"The end token (id {first.note.get('eos_id', '?')}) is {inputs:.0f} times in the inputs of {len(ended)} batches and never "
        "a counted target: it shares its id with padding, which the loss ignores, so the model cannot learn to stop.",
        evidence=(Evidence(first, 1.0),),
        severity="warning",
        step=first.step,
        where=first.where,
        source=first.source,
        seconds=first.seconds,
    )


def inject(case: Any) -> Any:
    """Rows hold texts that close with an end token, the same id fills them up, and the loss ignores that id."""
    batches, end_id = case.batches, case.config.vocab_size

    def batches_ended(case: Any, split: str) -> Iterator[tuple[Any, Any]]:
        for ids, targets in batches(case, split):
            ids, targets = ids.clone(), targets.clone()
            for row in range(len(ids)):
                end = max(2, ids.shape[1] - 2 * row)
                ids[row, end // 2] = targets[row, end // 2 - 1] = end_id
                ids[row, end:] = end_id
                targets[row, end - 1 :] = end_id
            yield ids, targets

    config = dataclasses.replace(case.config, pad_id=end_id, vocab_size=end_id + 1)
    return case.but(config=config, batches=batches_ended)


condition = Condition(
    id="eos-masked",
    symptom="the end token is never a target, so the model cannot learn to stop",
    needs=("eos_targets",),
    diagnose=diagnose,
    prescribes=("own-pad-token",),
    inject=inject,
)
