"""The end token is in the texts but never a target, because it doubles as padding and padding is ignored.

Looks like
    Training looks normal. The fine-tuned model never stops: it answers, then goes on until the length limit.

Why
    tokenizer.pad_token = tokenizer.eos_token, and the collator sets every label equal to pad_token_id to -100. That removes the real end
    token of each text together with the padding.

Tell apart
    padding-in-loss is the opposite: padding counted. Texts cut off at the maximal length hold no end token at all, and then there is none
    to learn here either: this needs end tokens among the inputs, told by a mask, by the configuration, or by the longest row of every
    batch, which padding alone would leave whole.

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

BATCHES = Threshold(2, "batches", source="one batch may hold a single end token that a prompt's mask covers")
ENDS = Threshold(4, "end tokens", source="several texts of one batch whose end is covered by a prompt's mask are no longer chance")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """No end token among the counted targets of batches whose inputs hold several."""
    ended = Series(r for r in chart["eos_targets"].finite() if float(r.note.get("eos_in_inputs") or 0) > 0)
    if sum(ended.values) > 0:
        return None
    inputs = sum(float(r.note["eos_in_inputs"]) for r in ended)
    if len(ended) < BATCHES and inputs < ENDS:
        return NotExamined(
            f"{inputs:.0f} end tokens among the inputs of {len(ended)} batches; this needs {ENDS:.0f}, or {BATCHES:.0f} batches"
        )
    first = ended[0]
    batches = f"{len(ended)} batch{'es' if len(ended) > 1 else ''}"
    return Diagnosis(
        summary=f"The end token (id {first.note.get('eos_id', '?')}) is {inputs:.0f} times in the inputs of {batches} and never "
        "a counted target: it shares its id with padding, which the loss ignores, so the model cannot learn to stop.",
        evidence=(Evidence(first, 1.0),),
        severity="warning",
        step=first.step,
        where=first.where,
        source=first.source,
        seconds=first.seconds,
    )


def inject(case: Any) -> Any:
    """Rows hold texts that close with the declared end token, the same id fills them up, and the loss ignores that id."""
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

    known = {field.name: getattr(case.config, field.name) for field in dataclasses.fields(case.config)}
    kind = dataclasses.make_dataclass("EndingConfig", [("eos_token_id", int, end_id)], bases=(type(case.config),), frozen=True)
    config = kind(**{**known, "pad_id": end_id, "vocab_size": end_id + 1})
    return case.but(config=config, batches=batches_ended)


condition = Condition(
    id="eos-masked",
    symptom="the end token is never a target, so the model cannot learn to stop",
    needs=("eos_targets",),
    diagnose=diagnose,
    prescribes=("own-pad-token",),
    leads_to=("repetitive-generation", "incoherent-generation"),
    inject=inject,
)
