"""The model is in training mode: its dropout is on and its batch-norm learns.

Undoing puts every module back into the mode it was in. A script that calls model.eval() again takes it back; the lasting cure is
model.train() after each evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sickbay.core.treatment import Treatment


def apply(patient: Any) -> Callable[[], None]:
    """Every module of `patient.root` is in training mode. Raises ValueError when no model was seen."""
    if patient.root is None:
        raise ValueError("train-mode: no model was seen yet, so there is none to put into training mode")
    before = [(module, module.training) for module in patient.root.modules()]
    patient.root.train()

    def undo() -> None:
        for module, training in before:
            module.training = training

    return undo


treatment = Treatment(
    id="train-mode",
    safety="changes-training",
    summary="Call model.train() at the start of each epoch and after each evaluation.",
    apply=apply,
)
