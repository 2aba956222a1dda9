"""A backward pass written by hand does not return the derivative of its forward.

Looks like
    No error and finite gradients. Training is slower than it should be, stops at a higher loss, or does not move at all; with another
    implementation of the same layer it works.

Why
    A missing term (the mean in layer norm's backward), a lost factor or sign, the derivative of another activation, a transpose in the
    wrong place, a gradient summed over the wrong dimension, or forward changed and backward forgotten.

Tell apart
    A straight-through or surrogate gradient (rounding, spiking, quantisation), a reversed or scaled gradient behind an identity are not
    the derivative on purpose, and are left alone. missing-gradient is about no gradient at all.

Cure
    Compare with `torch.autograd.gradcheck(Function.apply, inputs)` in float64 term by term; or drop the hand-written backward and let
    autograd derive it.

Sources
    guide, "Incorrect Gradient Computation"; Griewank & Walther 2008, "Evaluating Derivatives", chapter 1 (difference quotients);
    PyTorch documentation, "Gradcheck mechanics" (fast mode: one random direction).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold, number

ERROR = Threshold(
    0.05,
    "relative error",
    source="float64 quotients are true to about 1e-7; activations kept in 8 bit for backward stay within a few percent "
    "(Chakrabarti & Moseley 2019, arXiv 1901.07988); a lost term, factor or sign is far above",
)


def diagnose(chart: Chart) -> Diagnosis | None:
    """The Function whose returned gradient is furthest from the difference quotient of its forward."""
    worst = chart["gradient_error"].worst()
    if worst is None or not worst.value > ERROR:
        return None
    note = worst.note
    numbers = f"{number(float(note.get('analytic', 0.0)))} against {number(float(note.get('numeric', 0.0)))}"
    text = f"{worst.where}.backward returns a gradient that is {worst.value:.0%} off the derivative of its forward"
    return Diagnosis(
        summary=f"{text} (input {note.get('input')}, {note.get('directions')} directions in float64; along the first {numbers}).",
        evidence=(Evidence(worst, ERROR),),
        severity="critical",
        step=worst.step,
        where=worst.where,
        source=worst.source,
        seconds=worst.seconds,
    )


def inject(case: Any) -> Any:
    """The feed-forward activation is a Function whose backward forgets a factor."""
    build = case.build

    def build_with_function(case: Any) -> Any:
        import torch

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Any) -> Any:
                ctx.save_for_backward(x)
                return x.clamp(min=0) ** 2

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                (x,) = ctx.saved_tensors
                return gradients[0] * x.clamp(min=0)

        class SquaredReLU(torch.nn.Module):
            def forward(self, x: Any) -> Any:
                return Square.apply(x)  # type: ignore[no-untyped-call]

        model = build(case)
        for block in model.blocks:
            block.feed_forward.activation = SquaredReLU()
        return model

    return case.but(build=build_with_function)


condition = Condition(
    id="wrong-gradient",
    symptom="a hand-written backward does not return the derivative of its forward",
    needs=("gradient_error",),
    diagnose=diagnose,
    prescribes=("check-backward",),
    leads_to=("loss-plateau",),
    inject=inject,
)
