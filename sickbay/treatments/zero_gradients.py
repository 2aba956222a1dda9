"""Gradients are set to None after every optimizer step.

In the script: `optimizer.zero_grad(set_to_none=True)` once per step, right after `optimizer.step()`; with gradient accumulation
after the step that ends the cycle, never between its backward calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sickbay.core.treatment import Treatment


def apply(patient: Any) -> Callable[[], None]:
    """Every optimizer of `patient` drops its gradients right after it stepped; returns the undo."""

    def drop(optimizer: Any, args: Any, kwargs: Any) -> None:
        optimizer.zero_grad(set_to_none=True)

    handles = [optimizer.register_step_post_hook(drop) for optimizer in patient.optimizers]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


treatment = Treatment(
    id="zero-gradients",
    safety="changes-training",
    summary="Call optimizer.zero_grad(set_to_none=True) after every optimizer step.",
    apply=apply,
)
