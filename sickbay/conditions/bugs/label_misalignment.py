"""The targets of next-token prediction are not the inputs shifted by exactly one position.

Looks like
    Not shifted: the loss falls to almost nothing within a few hundred steps, and the model generates the last token for ever.
    Shifted twice: the loss stays well above that of a comparable run, and generated text skips every second token.

Why
    The data set and the model each think that shifting is the other's work. Hugging Face models shift `labels` inside; nanoGPT-style
    code expects targets that are already shifted. Done by both it is two positions, done by neither it is none.

Tell apart
    causal-leak lets a model copy the answer too, but there the targets are right and the mask is not. A model that is meant to
    reproduce its input (an autoencoder, a copy task with a bidirectional encoder) has targets at offset 0 on purpose: noted, no alarm.
    An extra head that predicts two tokens ahead beside a head that predicts one is not a fault.

Cure
    Shift once: logits[:, :-1] against ids[:, 1:], or targets = tokens[1:] and inputs = tokens[:-1] in the data, never both.

Sources
    transformers issues 47394, 46784, 46898, 47200, 37830 (models that shifted twice) and 44642 (the documentation misread).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

MATCH = Threshold(0.95, "share of counted targets", source="exact by construction (1.0); 5 % left for masked-out or edited tokens")
COUNTED = Threshold(16, "targets", source="two unrelated sequences over 10 symbols agree in 16 places with probability 1e-16")
RIGHT = 1  # the offset of next-token prediction


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Targets that agree with the inputs at offset 0 or beyond 1 and do not at 1; NotExamined while too few targets were counted."""
    judged = Series(r for r in chart["target_offset"].finite() if r.note.get("counted", COUNTED) >= COUNTED)
    if not judged:
        return NotExamined("fewer than 16 targets were counted in any batch")
    shifted = {r.step for r in judged if r.value == RIGHT or _match(r.note, RIGHT) >= MATCH}
    wrong = [r for r in judged if r.value not in (RIGHT, -1) and _match(r.note, int(r.value)) >= MATCH and r.step not in shifted]
    if not wrong:
        return None
    first, offset = wrong[0], int(wrong[0].value)
    causal = first.note.get("causal")
    shown = f"{_match(first.note, offset):.0%} of the {first.note.get('counted', 'counted')} targets equal the input at offset {offset}"
    meaning = "the model is asked for the token it is reading" if offset == 0 else f"each position learns the token {offset} ahead"
    return Diagnosis(
        summary=f"{shown}, not 1: {meaning}.",
        evidence=(Evidence(first, float(RIGHT)),),
        severity="critical" if offset or causal else "note" if causal is False else "warning",
        certainty="confirmed" if offset or causal else "suspected",
        step=first.step,
        where=first.where,
        source=first.source,
        seconds=first.seconds,
    )


def _match(note: Any, offset: int) -> float:
    """The share of counted targets that agree at `offset`; the keys are strings after a trip through JSON. Unlisted: 1 if no shares are."""
    match = note.get("match")
    return 1.0 if match is None else float(match.get(offset, match.get(str(offset), 0.0)))


def inject(case: Any) -> Any:
    """The loss shifts targets that the data had already shifted."""
    loss = case.loss

    def loss_shifting_again(case: Any, model: Any, ids: Any, targets: Any) -> Any:
        return loss(case, model, ids[:, :-1], targets[:, 1:])

    return case.but(loss=loss_shifting_again)


condition = Condition(
    id="label-misalignment",
    symptom="targets are not the inputs shifted by one: not shifted, or shifted twice",
    needs=("target_offset",),
    diagnose=diagnose,
    prescribes=("shift-labels-once",),
    leads_to=("repetitive-generation", "incoherent-generation"),
    inject=inject,
)
