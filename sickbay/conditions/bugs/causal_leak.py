"""A position's output depends on later tokens although the model is trained to predict the next one.

Looks like
    The training loss falls far below what the text allows, often towards zero, and validation, computed the same way, agrees.
    Generated text is nonsense, because at generation time there is no future to copy from.

Why
    The causal mask is missing, has the wrong sign or diagonal, is applied after the softmax, is lost on a fast path, or something other
    than attention looks ahead: a convolution with symmetric padding, a norm or a mean over the positions, a reversed recurrence.

Tell apart
    label-misalignment also makes the answer readable, from the position itself. A mask that is upside down is this fault and
    mask-blocks-past at once. Whether a model ought to be causal is read from its loss: encoders, prefixes and masked language models,
    whose loss does not ask for the next token, are not examined.

Cure
    Use scaled_dot_product_attention(..., is_causal=True), or add -inf above the diagonal before the softmax; pad convolutions on the
    left only. Then ask again: change a token and see that no earlier output moves.

Sources
    guide, "Implementation Bugs: Incorrect Attention Masking" (tested here by perturbing the model itself, not by reading two cells of a
    mask); Vaswani et al. 2017, "Attention Is All You Need", section 3.2.3.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

LIMIT = Threshold(1e-3, "ratio", source="calibration: exactly 0 in masked attention; float32 reordering noise is near 1e-6, a leak near 1")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Outputs before a perturbed position that move with it. Explains mask-blocks-past where the leak is the larger of the two."""
    seen = chart["future_influence"].finite()
    over = Series(r for r in seen if r.value > LIMIT)
    worst = over.worst()
    if worst is None:
        return None if seen else NotExamined("the outputs were not finite when a future token was changed")
    blocked = max(chart["past_blocked"].finite().values, default=0.0)
    position = worst.note.get("position")
    changed = f"token {position}" if position is not None else "a token"
    return Diagnosis(
        summary=f"Changing {changed} moves the outputs before it by {worst.value:.2g} times what it moves those from it on "
        "(0 if the past cannot see the future): the loss asks for the next token, and the model can read it.",
        evidence=(Evidence(worst, LIMIT),),
        severity="critical",
        step=over[0].step,
        where=worst.where,
        source=worst.source,
        seconds=over[0].seconds,
        explains=("mask-blocks-past",) if worst.value >= blocked else (),
    )


def inject(case: Any) -> Any:
    """Attention without its mask."""
    build = case.build

    def build_unmasked(case: Any) -> Any:
        from torch.nn import functional

        model = build(case)
        for block in model.blocks:
            block.attention.attend = lambda query, key, value, visible, dropout: functional.scaled_dot_product_attention(
                query, key, value, None, dropout
            )
        return model

    return case.but(build=build_unmasked)


condition = Condition(
    id="causal-leak",
    symptom="a position sees tokens that come after it, which it is trained to predict",
    needs=("future_influence",),
    uses=("past_blocked",),
    diagnose=diagnose,
    prescribes=("causal-mask",),
    leads_to=("padding-attended", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
