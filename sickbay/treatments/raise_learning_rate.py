"""Every optimizer step uses ten times the learning rate that the script asks for.

In the script: multiply the learning rate where the optimizer is made, and the schedule's floor with it; then look again. The factor acts
on whatever the schedule sets, so a warm-up or a cosine keeps its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sickbay.core.scaled_rate import step_at
from sickbay.core.treatment import Treatment


def apply(patient: Any, factor: float = 10.0) -> Callable[[], None]:
    """Every optimizer of `patient` steps with `factor` times its learning rate, which the script still sees unchanged; returns the undo."""
    return step_at(patient, factor)


treatment = Treatment(
    id="raise-learning-rate",
    safety="changes-training",
    summary="Multiply the learning rate by ten, and look again.",
    apply=apply,
)
