"""Something is divided by zero: a count, a norm, a variance or an empty mean gave 0 as the denominator.

Looks like
The loss is NaN or infinite at single steps, often rare ones: a batch with no example of some class, an empty mask, a
row of padding, a constant feature. The weights are NaN from the next step on.

Why
x/0 is infinite and 0/0 is NaN, and NaN passes through every later operation into the loss and every gradient. A
mean over no elements is 0/0, the standard deviation of one element is 0/0, and an epsilon below the smallest number of
the format is 0: 1e-8 is 0 in float16.

Tell apart
missing-targets: the empty mean is that of the loss over its targets, because every target is ignored.
softmax-overflow: the quotient is a softmax written by hand.
log-of-zero: no division in the forward pass; the division by zero is in the derivative of a logarithm or a root.

Cure
Add an epsilon that the format can hold, or clamp: `x / count.clamp(min=1)`, `x / (norm + 1e-6)`. Where the count is
legitimately zero, leave the term out for that batch.

Sources
IEEE 754-2019, section 7.3 (division by zero) and 7.2 (invalid operation). Smallest float16: 5.96e-8 (table 3.5).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold
from sickbay.core.nonfinite import Origin, origins

ALL_IGNORED = Threshold(1.0, "share of targets", source="definition: no target is left for the mean")
EXPONENTIALS = frozenset({"exp", "exp2", "expm1"})
NEAR = 3  # operations back: the quotient of a softmax has its exponentials that near
DIVISIONS = frozenset({"div", "true_divide", "truediv", "remainder", "fmod", "floor_divide", "reciprocal", "rsqrt", "addcdiv"})
MEANS = frozenset({"mean", "std", "var", "std_mean", "var_mean", "nanmean"})
LOSSES = frozenset({"mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div"})
DIVIDES_BY_NORM = frozenset({"normalize", "cosine_similarity"})


def diagnose(chart: Chart) -> Diagnosis | None:
    ignored = {reading.step for reading in chart["ignored_targets"] if reading.value >= ALL_IGNORED}
    for origin in origins(chart["first_nonfinite"]):
        story = _story(origin)
        if story and origin.reading.step not in ignored:
            return Diagnosis(
                summary=f"{story} at {origin.place}",
                evidence=(Evidence(origin.reading, 0.0),),
                severity="critical",
                step=origin.reading.step,
                where=origin.reading.where,
                source=origin.reading.source,
            )
    return None


def _story(origin: Origin) -> str:
    """What was divided by zero, in words; empty where nothing was."""
    divisor = origin.divisor
    if origin.op in DIVISIONS and divisor.zeros and not (origin.forward and EXPONENTIALS & set(origin.chain[:NEAR])):
        of = "the one" if divisor.shape in ((), (1,)) else f"{divisor.zeros} of the {_shape(divisor.shape)}"
        return f"{origin.op} had a zero in its denominator ({of} value{'s' if divisor.shape not in ((), (1,)) else ''})"
    if origin.op in DIVISIONS and divisor.empty:
        return f"{origin.op} had an empty denominator"
    if origin.forward and origin.op in MEANS | LOSSES and origin.first.empty:
        return f"{origin.op} of no elements (shape {_shape(origin.first.shape)}) is 0/0"
    if origin.forward and origin.op in MEANS - {"mean", "nanmean"} and origin.first.nonfinite == 0 and 1 in (*origin.first.shape, 1):
        return f"{origin.op} over a single element (shape {_shape(origin.first.shape)}) is 0/0"
    if origin.forward and origin.op == "pow" and origin.first.zeros and origin.first.low >= 0 and not origin.may_outgrow:
        return "pow raised 0 to a negative power"
    if origin.forward and origin.op in DIVIDES_BY_NORM and origin.first.zeros:
        return f"{origin.op} divided by a zero norm"
    return ""


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def inject(case: Any) -> Any:
    """The loss is averaged over one rare character's positions, and most batches have none."""

    def loss(sick: Any, model: Any, ids: Any, targets: Any) -> Any:
        from torch.nn import functional

        each_BT = functional.cross_entropy(model(ids).transpose(1, 2), targets, reduction="none")
        rare_BT = (targets == sick.corpus.bincount().clamp(min=1).argmin()).float()
        return (each_BT * rare_BT).sum() / rare_BT.sum()

    return case.but(loss=loss)


condition = Condition(
    id="division-by-zero",
    symptom="a division by zero makes the loss or a gradient infinite or NaN",
    needs=("first_nonfinite",),
    uses=("ignored_targets",),
    diagnose=diagnose,
    prescribes=("add-epsilon",),
    leads_to=("non-finite-input", "non-finite-weights", "scaler-collapse"),
    inject=inject,
)
