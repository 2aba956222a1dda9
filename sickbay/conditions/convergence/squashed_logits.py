"""A softmax, sigmoid or tanh squashes the scores before a loss that does so itself: the loss cannot get low.

Looks like
    The loss falls at first and then lies on a floor that no learning rate and no larger model gets below, while the accuracy may
    still rise. Gradients are small: a second softmax hardly moves whatever the scores are.

Why
    Cross-entropy applies log-softmax to what it is given. If that lies between 0 and 1, the right class can lead by 1 at most, so the
    best loss over C classes is ln(1 + (C - 1) / e): 1.46 for ten. `nll_loss` is the other way round: it wants log-probabilities,
    and given probabilities or raw scores it has no meaning as a likelihood.

Tell apart
    A soft cap wide enough (30 tanh(x / 30)) binds nothing and is healthy; so is log_softmax before cross_entropy, which changes nothing.
    loss-plateau: nothing bounds the scores, and the loss is stuck all the same.

Cure
    Give the loss the raw output of the last linear layer; apply softmax or sigmoid only where probabilities are shown.

Sources
    PyTorch documentation, `CrossEntropyLoss` ("unnormalized logits"), `NLLLoss` ("log-probabilities"), `BCEWithLogitsLoss`. The floor is
    the cross-entropy at the bound, computed for the run's own classes, label smoothing and targets.
"""

from __future__ import annotations

import math
from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold, number

FLOOR = Threshold(
    0.1, "share of chance loss", source="soft caps in use (15 to 50 wide) leave less than a millionth; one squash leaves a fifth or more"
)
OFF = Threshold(1.5, "x 1", source="log-probabilities sum to 1 but for rounding; a softmax given in their place sums to at least 1 + C")


def diagnose(chart: Chart) -> Diagnosis | None:
    """The loss with the highest floor for its classes; otherwise an nll_loss whose input are no log-probabilities."""
    bounded = [r for r in chart["loss_floor"] if r.value > FLOOR * r.note.get("chance", math.inf)]
    if bounded:
        worst = max(bounded, key=lambda r: r.value / r.note["chance"])
        end = [last for last in chart["loss"].finite().values[-1:] if last > worst.value]  # other batches may have another floor
        return Diagnosis(
            summary=f"{worst.note['op']} keeps the logits between {number(worst.note['low'])} and {number(worst.note['high'])}: over "
            f"{worst.note['classes']} classes this batch's loss cannot get below {number(worst.value)}"
            + (f" (it ended at {number(end[0])})." if end else "."),
            evidence=(Evidence(worst, FLOOR * worst.note["chance"]),),
            severity="warning",
            step=worst.step,
            source=worst.source,
        )
    wrong = next((r for r in chart["probability_sum"] if r.value > OFF and (r.note["largest"] > 0)), None)
    if wrong is None:
        return None
    what = "probabilities" if abs(wrong.note["plain_sum"] - 1) < 0.01 and wrong.note["least"] >= 0 else "raw scores"
    return Diagnosis(
        summary=f"nll_loss is given {what}, not log-probabilities: their exponentials sum to {number(wrong.value)} where 1 is right.",
        evidence=(Evidence(wrong, OFF),),
        severity="warning" if what == "probabilities" else "critical",
        step=wrong.step,
        source=wrong.source,
    )


def inject(case: Any) -> Any:
    """The model ends in a softmax, and cross-entropy applies its own on top."""

    def build(sick: Any) -> Any:
        from torch import nn

        model = case.build(sick)
        model.head = nn.Sequential(model.head, nn.Softmax(dim=-1))
        return model

    return case.but(build=build)


condition = Condition(
    id="squashed-logits",
    symptom="softmax, sigmoid or tanh before the loss: the loss cannot get low",
    needs=("loss_floor",),
    uses=("probability_sum", "loss"),
    diagnose=diagnose,
    prescribes=("raw-logits",),
    leads_to=("loss-plateau", "learning-rate-too-low", "model-too-small", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
