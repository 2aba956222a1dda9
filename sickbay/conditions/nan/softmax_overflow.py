"""A softmax written by hand overflows: exp() of a large logit is infinite, and infinity over infinity is NaN.

Looks like
The loss is fine for a while, then NaN from one step to the next, without a growing gradient before it; or it is NaN
from the first batch because the logits start large. In float16 it happens at logits of 12, in float32 at 89.

Why
exp(x) leaves the range of the number format at x = 11.1 in float16, 88.7 in float32 and bfloat16, 709.8 in float64.
Softmax does not change when the same number is subtracted from every logit, so the largest can always be made 0;
without that subtraction nothing keeps x below the limit. All logits below about -104 in float32 do the same harm from
the other side: every exp() is 0 and the quotient is 0/0.

Tell apart
log-of-zero: the softmax itself is safe, but its probabilities are rounded to 0 before a logarithm.
mask-blocks-past: torch's own softmax gives NaN for a row that is masked entirely.
attention-scale: logits that are large because nothing divided them by √d; a safe softmax hides that, it does not cure it.

Cure
Use torch.softmax, torch.logsumexp or cross_entropy on the raw logits: they subtract the maximum. By hand:
`x = x - x.amax(dim=-1, keepdim=True)` before `x.exp()`.

Sources
Limits: natural logarithm of the largest finite number of each format (IEEE 754-2019, table 3.5; bfloat16 has float32's range).
The subtraction: Blanchard, Higham & Higham 2021, "Accurately computing the log-sum-exp and softmax functions".
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold, number
from sickbay.core.nonfinite import Origin, origins

_SOURCE = "ln of the largest finite number: IEEE 754-2019, table 3.5"
EXP_LIMIT = {
    "float16": Threshold(11.08, "exponent", source=_SOURCE),
    "bfloat16": Threshold(88.72, "exponent", source=_SOURCE + " (bfloat16 has float32's exponent range)"),
    "float32": Threshold(88.72, "exponent", source=_SOURCE),
    "float64": Threshold(709.78, "exponent", source=_SOURCE),
}
EXPONENTIALS = frozenset({"exp", "exp2", "expm1"})
NEAR = 3  # operations back: exp, mask, sum, quotient
QUOTIENTS = frozenset({"div", "true_divide", "truediv", "sum", "reciprocal"})


def diagnose(chart: Chart) -> Diagnosis | None:
    for origin in origins(chart["first_nonfinite"]):
        story = _story(origin)
        if origin.forward and story:
            return Diagnosis(
                summary=f"{story} at {origin.place}: a softmax without subtracting the maximum",
                evidence=(Evidence(origin.reading, 0.0),),
                severity="critical",
                step=origin.reading.step,
                where=origin.reading.where,
                source=origin.reading.source,
            )
    return None


def _story(origin: Origin) -> str:
    """What overflowed, in words; empty where it was no softmax."""
    limit = EXP_LIMIT.get(origin.dtype, EXP_LIMIT["float32"])
    if origin.op in EXPONENTIALS and origin.first.high > limit:
        return f"{origin.op}() of {number(origin.first.high)} is infinite in {origin.dtype or 'float32'} (limit {number(limit)})"
    if origin.op in QUOTIENTS and EXPONENTIALS & set(origin.chain[:NEAR]):
        return f"{origin.op} over exponentials gave {'0/0' if origin.divisor.zeros else 'inf/inf'}"
    return ""


def inject(case: Any) -> Any:
    """A cross-entropy by hand over sharpened logits: exp(), sum, quotient, no maximum subtracted."""

    def loss(sick: Any, model: Any, ids: Any, targets: Any) -> Any:
        sharpness = 5000.0
        odds = (model(ids) * sharpness).exp()
        probabilities = odds / odds.sum(dim=-1, keepdim=True)
        return -probabilities.gather(-1, targets.unsqueeze(-1)).log().mean()

    return case.but(loss=loss)


condition = Condition(
    id="softmax-overflow",
    symptom="a hand-written softmax overflows: exp of a large logit is infinite",
    needs=("first_nonfinite",),
    diagnose=diagnose,
    prescribes=("stable-softmax",),
    leads_to=("non-finite-weights", "scaler-collapse"),
    inject=inject,
)
