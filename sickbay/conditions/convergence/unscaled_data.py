"""Raw inputs or regression targets of large scale reach the first layer or the loss as they are.

Looks like
    The first loss and gradients are enormous, ReLU units die and sigmoids saturate in the first steps; only a tiny learning rate does
    not explode, and with it nothing is learned. In float16 it overflows. With raw targets the loss falls for ever and stays large.

Why
    Initialisations assume inputs of about unit size. A first layer that multiplies values around 300 gives activations around 300, and
    its weights' gradients are 300 times those of the others. Targets around 300 ask the last layer for outputs it reaches only after
    thousands of steps of ordinary size, in which the loss is dominated by their mean.

Tell apart
    Token ids that are looked up are no inputs in this sense. Inputs that the model itself divides, or whose first layer is followed by a
    normalisation, are scaled. poor-initialization: the inputs are of ordinary size and the weights are not.

Cure
    Subtract the training set's mean and divide by its standard deviation, inputs and targets alike, and undo it for what is reported.

Sources
    LeCun et al. 1998, "Efficient BackProp", section 4.3 (inputs of mean 0 and unit variance); Glorot & Bengio 2010 and He et al. 2015
    (initialisations derived for unit variance). The limit: 0-255 images and physical units lie above, features in use below.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number

LARGE = Threshold(
    50.0, "RMS", source="fifty times the unit size that initialisations assume; standardised, log-scaled and one-hot features stay below 5"
)
OUT_OF_REACH = Threshold(0.1, "x target RMS", source="a model that undoes a normalisation of its own starts within this of its targets")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """The largest input that no normalisation follows; otherwise targets far beyond what the model gives at first."""
    inputs = [r for r in chart["input_rms"] if r.value > LARGE and not r.note.get("normalised")]
    targets = [r for r in chart["target_rms"] if r.value > LARGE and r.note.get("output_rms", r.value) < OUT_OF_REACH * r.value]
    worst = max(inputs or targets, key=lambda r: r.value, default=None)
    if worst is None:
        seen = len(chart["input_rms"]) or len(chart["target_rms"])
        return None if seen else NotExamined(chart.unobserved.get("input_rms", "the model reads no raw numbers, only ids"))
    return Diagnosis(
        summary=_summary(worst, bool(inputs)),
        evidence=(Evidence(worst, LARGE),),
        severity="warning",
        step=worst.step,
        where=worst.where,
        source=worst.source,
    )


def _summary(worst: Reading, is_input: bool) -> str:
    shape = f"RMS {number(worst.value)} (mean {number(worst.note['mean'])}, standard deviation {number(worst.note['std'])})"
    if is_input:
        return f"{worst.where} multiplies raw data of {shape}: about 1 is what its initialisation assumes."
    return f"the regression's targets have {shape}, and the model starts from outputs of RMS {number(worst.note['output_rms'])}."


def inject(case: Any) -> Any:
    """The ids themselves, times ten, go through a linear layer as if they were measurements."""

    def build(sick: Any) -> Any:
        import torch
        from torch import nn

        class Measured(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.project = nn.Linear(1, width)

            def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
                x_BTD: torch.Tensor = self.project(10.0 * ids_BT.unsqueeze(-1).float())
                return x_BTD

        model = case.build(sick)
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        model.token_embedding = Measured(sick.config.dim)
        return model

    return case.but(build=build)


condition = Condition(
    id="unscaled-data",
    symptom="raw inputs or regression targets of large scale",
    needs=(),
    uses=("input_rms", "target_rms"),
    diagnose=diagnose,
    prescribes=("scale-data",),
    leads_to=(
        *("poor-initialization", "vanishing-gradients", "exploding-gradients", "learning-rate-too-high", "half-precision-overflow"),
        *("scaler-collapse", "dead-relu", "loss-spike", "softmax-overflow", "attention-logit-growth", "non-finite-weights"),
        *("loss-plateau", "learning-rate-too-low", "missing-warmup"),
    ),
    inject=inject,
)
