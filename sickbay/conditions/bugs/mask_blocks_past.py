"""A position's output does not depend on earlier tokens that it is allowed to see.

Looks like
    The loss stops near that of single-token statistics, however large the model; generated text is locally plausible and forgets what
    was said. A row whose every key is masked gives NaN in the softmax.

Why
    The mask has the wrong sign (True means "may look" for scaled_dot_product_attention and "must not" for nn.MultiheadAttention), the
    wrong diagonal, or is added twice with different meanings; or a padding mask is inverted.

Tell apart
    causal-leak is the other half of an upside-down mask; the larger of the two is reported first. A sliding window blocks the far past on
    purpose: only blocking near positions counts. A model that is too small blocks nothing: its outputs do move.

Cure
    Let position t look at 0..t: torch.ones(T, T).tril() as "may look", its complement as "must not". Then ask again: change the token
    before a position and see that its output moves.

Sources
    guide, "Implementation Bugs: Incorrect Attention Masking"; PyTorch documentation, `scaled_dot_product_attention` and
    `nn.MultiheadAttention` (the opposite meanings of a boolean mask); Child et al. 2019 and Jiang et al. 2023 (windows are legitimate).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

LIMIT = Threshold(0.05, "share of pairs", source="calibration: 0 in full attention; a lower share can be chance cancellation in one batch")
ALL = Threshold(0.999, "share of pairs", source="definition: 1 but for rounding, nothing earlier is seen at all")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Near pairs without influence, or a softmax over no key at all. Explains causal-leak where the blocking is the larger of the two."""
    empty = next((r for r in chart["first_nonfinite"] if _over_no_key(r.note)), None)
    seen = chart["past_blocked"].finite()
    over = Series(r for r in seen if r.value > LIMIT and (r.note.get("nearest_blocked") or r.value > ALL))
    # A mask does not change: what was seen once and is hidden later is attention that has saturated.
    over = over if over and over[0].step == seen[0].step else Series(())
    worst = empty or over.worst()
    if worst is None:
        return (
            None if seen else NotExamined(chart.why_unobserved("past_blocked") or "the outputs were not finite when the past was changed")
        )
    leak = max(chart["future_influence"].finite().values, default=0.0)
    blocked = "A softmax got a row in which every key is masked, and its result is NaN: some position may look at nothing."
    if empty is None:
        span = f"; it sees back {worst.note['span']} positions at most" if worst.note.get("span") is not None else ""
        blocked = f"{worst.value:.0%} of earlier tokens leave a later output unchanged when they are replaced, the nearest ones too{span}."
    return Diagnosis(
        summary=blocked,
        evidence=(Evidence(worst, None if empty else LIMIT),),
        severity="critical",
        step=worst.step if empty else over[0].step,
        where=worst.where,
        source=worst.source,
        seconds=worst.seconds,
        explains=("causal-leak",) if over and max(over.values) > leak else (),
    )


def _over_no_key(note: Any) -> bool:
    """True for an attention softmax of which some row held nothing but -inf: every key was masked there."""
    softmax = any(name in str(note.get("op", "")) for name in ("softmax", "scaled_dot_product"))
    return softmax and float(note.get("fully_masked_rows") or 0) > 0


def inject(case: Any) -> Any:
    """The mask's diagonal is off by half the length: each position sees itself and the distant past only."""
    build = case.build

    def build_blocked(case: Any) -> Any:
        import torch

        def attend_far(query: Any, key: Any, value: Any, visible: Any, dropout: float) -> Any:
            length = query.shape[-2]
            far = torch.ones(length, length, dtype=torch.bool).tril(-(length // 2)) | torch.eye(length, dtype=torch.bool)
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, far.to(query.device), dropout)

        model = build(case)
        for block in model.blocks:
            block.attention.attend = attend_far
        return model

    return case.but(build=build_blocked)


condition = Condition(
    id="mask-blocks-past",
    symptom="a position does not see earlier tokens that it may see",
    needs=(),
    uses=("past_blocked", "future_influence", "first_nonfinite"),
    diagnose=diagnose,
    prescribes=("causal-mask",),
    leads_to=("non-finite-weights", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
