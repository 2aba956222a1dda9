"""The weights start badly: all alike, far too large, far too small, or growing the activations from block to block.

Looks like
    The first loss is far above that of a uniform guess, and thousands of steps go into undoing it; or the loss stays at the uniform
    guess for ever, because all units of a layer compute the same.

Why
    Before any training, scores should be small, so that the loss is ln(classes). Weights of standard deviation 1 over a fan-in of 64
    multiply activations by 8 in each layer; weights of 0.02 scaled down once more make them vanish. Units that start equal get equal
    gradients and stay equal: a layer of any width is then one unit wide.

Tell apart
    Outputs, gates, biases and LoRA's B that start at zero are healthy: their gradients differ from the first step on, or as soon as
    what lies behind them has moved. Weights that were trained before are not judged. missing-normalization: the blocks have no norm.
    unscaled-data: the weights are in order and the inputs are not.

Cure
    Normal(0, 0.02), or Xavier/He by fan-in; matrices that write to the residual stream 1/sqrt(2 x layers) of that; a tied embedding
    at the head's scale, not at standard deviation 1.

Sources
    Glorot & Bengio 2010; He et al. 2015; Radford et al. 2019 (residual matrices by 1/sqrt(N)). ln V: arithmetic of a uniform guess, from
    which independent scores of standard deviation s lie s^2/2 nats away.
"""

from __future__ import annotations

import math
from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Severity, Threshold, number

ABOVE = Threshold(
    3.0,
    "nats above ln(classes)",
    source="scores of standard deviation 2.4; torch's default head on normalised features gives 0.6, 0.2 nats",
)
FAR_ABOVE = Threshold(10.0, "nats above ln(classes)", source="scores of standard deviation 4.5: confidently wrong on nearly every example")
SMALL = Threshold(0.04, "ratio", source="0.02 over a fan-in of 16 is 0.08; scaled once more by sqrt(2 / width) it is 0.028 at any width")
LARGE = Threshold(4.0, "ratio", source="He's gain is 1.4, torch's default 0.6, orthogonal 1; 1.0 over a fan-in of 64 is 8")
GROWTH = Threshold(10.0, "x first block's RMS", source="residual streams of healthy models stay within 4 x at the first step")
SETTLED = Threshold(4, "steps", source="behind two zeros in a row the first gradient comes in the second step")
MOST_CONSTANT = Threshold(0.5, "share of matrices", source="no initialisation in use gives matrices one value other than zero")
MOST_ZERO = Threshold(0.9, "share of matrices", source="zero-initialised outputs, gates and heads together are little more than half")
FEWEST = 3


def diagnose(chart: Chart) -> Diagnosis | None:
    """Units that stay clones; a first loss far above chance; matrices of a wrong scale; growth over depth. The most certain comes first."""
    found = _clones(chart) or _loss(chart) or _scale(chart) or _growth(chart)
    if found is None:
        return None
    summary, worst, limit, severity = found
    return Diagnosis(
        summary=summary,
        evidence=(Evidence(worst, limit),),
        severity=severity,
        step=0,
        where=worst.where,
        source=worst.source,
        certainty="confirmed" if worst.signal in ("clone_units", "initial_loss") else "likely",
        # Behind matrices that are all zero every gradient is zero: to a step that looks as if backward had not run.
        explains=("missing-backward", "missing-gradient", "update-not-applied") if worst.note.get("zero") else (),
    )


Found = tuple[str, Reading, float, Severity]


def _clones(chart: Chart) -> Found | None:
    seen = chart["clone_units"]
    first, last = ([list(seen.at(where))[index] for where in seen.places()] for index in (0, -1))
    constant = [r for r in first if r.note.get("constant") and not r.note.get("zero")]
    zero = [r for r in first if r.note.get("zero")]
    stuck = [r for r in last if r.value > 0 and r.step >= SETTLED]
    if len(constant) >= max(2.0, MOST_CONSTANT * len(first)):
        group, certain = constant, "so they compute and learn the same"
    elif len(zero) >= max(FEWEST, MOST_ZERO * len(first)):
        group, certain = zero, "so nothing reaches the layers behind them and no gradient comes back"
    elif len(stuck) > 1 or (stuck and not stuck[0].note.get("no_gradient")):
        group, certain = stuck, "and get the same gradient: they stay alike whatever the optimizer does"
    else:
        return None
    value = number(float(group[0].note.get("entry") or 0))
    start = f"{len(group)} of {len(last)} weight matrices, {group[0].where} first, have units that are all alike ({value} each), {certain}."
    return start, group[0], 0.0, "critical"


def _loss(chart: Chart) -> Found | None:
    fresh = [r for r in chart["initial_loss"].finite() if not r.note.get("trained")]
    worst = max(fresh, key=lambda r: r.value - r.note.get("chance", math.inf), default=None)
    if worst is None or not worst.value > worst.note["chance"] + ABOVE:
        return None
    return (
        f"the first loss is {number(worst.value)} where a uniform guess over {worst.note['classes']} classes has "
        f"{number(worst.note['chance'])}: the scores start with a standard deviation of {number(worst.note['logit_std'])}.",
        worst,
        worst.note["chance"] + ABOVE,
        "critical" if worst.value > worst.note["chance"] + FAR_ABOVE else "warning",
    )


def _scale(chart: Chart) -> Found | None:
    gains = sorted((r for r in chart["initial_gain"].finite() if r.value > 0 and not r.note.get("trained")), key=lambda r: r.value)
    if len(gains) < FEWEST:
        return None
    upper, middle = gains[-1 - len(gains) // 4], gains[len(gains) // 2]
    if upper.value < SMALL:
        what, worst, limit = "small", upper, SMALL
    elif middle.value > LARGE:
        what, worst, limit = "large", middle, LARGE
    else:
        return None
    return (
        f"the weights start too {what}: {worst.where} has RMS {number(worst.note['rms'])} over a fan-in of {worst.note['fan_in']}, "
        f"a gain of {number(worst.value)} where about 1 keeps activations as they are.",
        worst,
        limit,
        "warning",
    )


def _growth(chart: Chart) -> Found | None:
    fresh = any(not r.note.get("trained") for r in chart["initial_gain"])
    rows = [r for r in chart["activation_rms"].finite() if r.step == 0 and r.value > 0]
    if len(rows) < FEWEST or not fresh or not any(r.value > 0 for r in chart["normalization_ops"]):
        return None
    shallow, deep = (pick(rows, key=lambda r: r.note.get("depth", 0)) for pick in (min, max))
    growth = deep.value / shallow.value
    # Sums of independent branches grow by the square root of their number, which is no fault.
    if not growth > max(GROWTH, 3 * math.sqrt(len(rows))):
        return None
    return f"activations grow {number(growth)} x over {len(rows)} blocks before any update.", deep, GROWTH * shallow.value, "warning"


def inject(case: Any) -> Any:
    """Every matrix is drawn with standard deviation 1, whatever its fan-in."""

    def build(sick: Any) -> Any:
        from torch import nn

        model = case.build(sick)
        for weight in model.parameters():
            if weight.dim() >= 2:
                nn.init.normal_(weight)
        return model

    return case.but(build=build)


condition = Condition(
    id="poor-initialization",
    symptom="weights that start alike, too large or too small: the first loss is far from a uniform guess, or units stay clones",
    needs=("initial_gain",),
    uses=("initial_loss", "clone_units", "activation_rms", "normalization_ops"),
    diagnose=diagnose,
    prescribes=("scale-initialization",),
    leads_to=(
        "clipping-saturated",
        *("loss-plateau", "learning-rate-too-low", "missing-warmup"),
        *(
            "vanishing-gradients",
            "exploding-gradients",
            "learning-rate-too-high",
            "softmax-overflow",
            "half-precision-overflow",
            "repetitive-generation",
            "incoherent-generation",
        ),
        *("attention-logit-growth", "loss-spike", "non-finite-weights", "scaler-collapse", "dead-relu"),
    ),
    inject=inject,
)
