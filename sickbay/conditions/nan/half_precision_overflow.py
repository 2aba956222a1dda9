"""A float16 result passes 65,504, the largest number the format can hold, and becomes infinite.

Looks like
Under float16 the loss is NaN or infinite, sometimes from the first batch, sometimes after thousands of steps as the
activations grow; the same script in float32 or bfloat16 trains.

Why
float16 has 5 exponent bits: nothing above 65,504 exists. Sums over many features, squares (of anything above 256),
feed-forward outputs and unscaled attention scores get there first. A GradScaler protects small gradients from
vanishing; it can do nothing for an activation that overflows in the forward pass.

Tell apart
softmax-overflow: the overflowing operation is an exponential.
scaler-collapse: only gradients overflow, and only multiplied by a loss scale above 1, or this condition keeps every step from being taken.
exploding-gradients: float32 would overflow too, a few steps later.

Cure
Use bfloat16, which has float32's range; or run the operation that overflows in float32
(`with torch.autocast(device_type, enabled=False): ... x.float()`); or scale its input down.

Sources
65,504: IEEE 754-2019, table 3.5 (binary16). Micikevicius et al. 2018, "Mixed Precision Training", section 3.
T5's feed-forward: huggingface/transformers#4586.
"""

from __future__ import annotations

import math
from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold, number
from sickbay.core.nonfinite import Origin, origins

LARGEST = Threshold(65504.0, "float16", source="IEEE 754-2019, table 3.5: the largest finite binary16")
UNSCALED = Threshold(1.0, "factor", source="definition: at 1 the loss is as it is, and a scaler's only way out is to make it smaller")
NOT_BY_SIZE = frozenset(
    {"exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "logit", "xlogy", "sqrt", "rsqrt", "reciprocal"}
    | {"softmax", "safe_softmax", "log_softmax", "masked_fill", "where", "nll_loss", "cross_entropy"}
)
DIVISIONS = frozenset({"div", "true_divide", "truediv", "addcdiv"})


def diagnose(chart: Chart) -> Diagnosis | None:
    scaled = bool(len(chart["loss_scale"]))
    for origin in origins(chart["first_nonfinite"]):
        # Gradients that overflow under a loss scale are what the scaler is there to catch, as long as it makes them larger.
        unscaled = not scaled or float(origin.reading.note.get("loss_scale", math.inf)) <= UNSCALED
        if _outgrew(origin) and (origin.forward or unscaled):
            operand = f" from operands up to {number(origin.largest)}" if origin.largest == origin.largest else ""
            return Diagnosis(
                summary=f"{origin.op} at {origin.place} passed {number(LARGEST)}, the largest float16{operand}",
                evidence=(Evidence(origin.reading, 0.0),),
                severity="critical",
                step=origin.reading.step,
                where=origin.reading.where,
                source=origin.reading.source,
            )
    return None


def _outgrew(origin: Origin) -> bool:
    size_matters = origin.op not in NOT_BY_SIZE and not any(operand.nonfinite for operand in origin.operands)
    by_zero = origin.op in DIVISIONS and (origin.divisor.zeros or origin.divisor.empty)
    nothing = origin.op in ("mean", "std", "var") and origin.first.empty
    root = origin.op == "pow" and not origin.may_outgrow
    born = origin.forward or origin.phase == "backward"
    return born and origin.dtype in ("float16", "half") and size_matters and not by_zero and not nothing and not root


def inject(case: Any) -> Any:
    """The last normalisation gets unscaled activations beyond 65,504 as float16."""

    def build(sick: Any) -> Any:
        from torch import nn

        class HalfNorm(nn.Module):
            def forward(self, x_BTD: Any) -> Any:
                large_BTD = (x_BTD * 1e7).half()
                return (large_BTD / (large_BTD.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()).float()

        model = case.build(sick)
        model.final_norm = HalfNorm()
        return model

    return case.but(build=build)


condition = Condition(
    id="half-precision-overflow",
    symptom="a float16 activation or gradient passes 65,504 and becomes infinite",
    needs=("first_nonfinite",),
    uses=("loss_scale",),
    diagnose=diagnose,
    prescribes=("use-bfloat16",),
    leads_to=("scaler-collapse", "non-finite-weights"),
    inject=inject,
)
