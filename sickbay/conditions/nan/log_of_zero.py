"""A logarithm, root or power meets zero: the value or its derivative is infinite there.

Looks like
Forward: the loss is infinite or NaN at once. Backward only: the loss is a perfectly ordinary number, and yet every
gradient is NaN, and the weights after it; a plain NaN check of the loss comes one step too late.

Why
log(0) is -inf. √x has derivative 1/(2√x), which is infinite at 0; times an incoming gradient of 0 that is NaN. The
same holds for norms, distances, standard deviations and powers below 1 at exactly 0, such as the distance of a point to
itself. `torch.where` does not help: the branch that is not taken is still differentiated, and 0 × inf is NaN. A CTC loss
is minus the logarithm of a probability that is 0 where a sequence has more labels than frames.

Tell apart
division-by-zero: the forward pass itself divides by zero.
softmax-overflow: the probability is not rounded to 0, its exponential overflowed.

Cure
log(softmax(x)) becomes `log_softmax(x)`. Otherwise keep the argument away from zero before the operation, not after:
`x.clamp(min=eps).log()`, `(x + eps).sqrt()`; with `where`, replace the argument inside first.

Sources
torch's backward formulas (tools/autograd/derivatives.yaml: sqrt, norm, log, pow) and its notes on autograd, "gradients for
non-differentiable functions"; the double-where rule: JAX FAQ, "gradients contain NaN where using where".
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold, number
from sickbay.core.nonfinite import Origin, origins

EDGE = Threshold(0.0, "operand", source="domain of log and derivative of the root: infinite at 0, undefined below")
LOG1P_EDGE = Threshold(-1.0, "operand", source="log1p(x) = log(1 + x)")
LOGARITHMS = frozenset({"log", "log2", "log10", "logit", "xlogy"})
ROOTS = frozenset({"sqrt", "pow"})
ALIGNMENTS = frozenset({"ctc_loss", "cudnn_ctc_loss"})
BACKWARD = frozenset(
    {"norm", "linalg_vector_norm", "vector_norm", "linalg_norm", "cdist", "cdist_forward", "pdist", "pdist_forward", "dist"}
    | {"std", "std_mean", "prod", "acos", "asin", "acosh", "atanh", "pairwise_distance"}
)


def diagnose(chart: Chart) -> Diagnosis | None:
    for origin in origins(chart["first_nonfinite"]):
        if _at_the_edge(origin):
            if origin.op in ALIGNMENTS:
                return _unalignable(origin)
            seen = "a value" if origin.first.low != origin.first.low else number(origin.first.low)
            how = "is not finite" if origin.forward else "has no finite derivative, though the loss is finite,"
            count = f"; {origin.first.zeros} of the operand's values are 0" if origin.first.zeros else ""
            return Diagnosis(
                summary=f"{origin.op}() of {seen} {how} at {origin.place}{count}",
                evidence=(Evidence(origin.reading, 0.0),),
                severity="critical",
                step=origin.reading.step,
                where=origin.reading.where,
                source=origin.reading.source,
            )
    return None


def _unalignable(origin: Origin) -> Diagnosis:
    return Diagnosis(
        summary=f"{origin.op} is infinite: a sequence with more labels than frames has no alignment, so this is the logarithm of a "
        "probability of 0; drop such pairs or pass zero_infinity=True",
        evidence=(Evidence(origin.reading, 0.0),),
        severity="critical",
        step=origin.reading.step,
        where=origin.reading.where,
        source=origin.reading.source,
    )


def _at_the_edge(origin: Origin) -> bool:
    low, zeros = origin.first.low, origin.first.zeros
    if origin.forward:
        if origin.op in ALIGNMENTS:
            return origin.first.nonfinite == 0
        if origin.op == "log1p":
            return low <= LOG1P_EDGE
        if origin.op == "pow" and origin.may_outgrow:
            return False
        below = low < EDGE if origin.op in ROOTS else low <= EDGE
        return origin.op in LOGARITHMS | ROOTS and (below or (origin.op == "logit" and origin.first.high >= 1))
    unknown = not origin.operands
    reaches = origin.op in BACKWARD and (unknown or zeros > 0 or low != low or low <= EDGE)
    return origin.phase == "backward" and (reaches or (origin.op in LOGARITHMS | ROOTS and (unknown or zeros > 0 or low <= EDGE)))


def inject(case: Any) -> Any:
    """A consistency term √(Σ(a-b)²) between two views that are equal: 0 forward, NaN backward."""

    def loss(sick: Any, model: Any, ids: Any, targets: Any) -> Any:
        from torch.nn import functional

        logits_BTV = model(ids)
        apart_BT = (logits_BTV - logits_BTV.detach()).pow(2).sum(dim=-1).sqrt()
        return functional.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten()) + 0.1 * apart_BT.mean()

    return case.but(loss=loss)


condition = Condition(
    id="log-of-zero",
    symptom="a logarithm, root or power at zero is infinite, forward or only backward",
    needs=("first_nonfinite",),
    diagnose=diagnose,
    prescribes=("clamp-log",),
    leads_to=("non-finite-input", "non-finite-weights", "scaler-collapse"),
    inject=inject,
)
