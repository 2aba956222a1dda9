"""Every optimizer step uses a tenth of the learning rate that the script asks for.

In the script: divide the learning rate by ten where the optimizer is made, and the schedule's floor with it. The factor acts
on whatever the schedule sets, so a warm-up or a cosine keeps its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sickbay.core.scaled_rate import step_at
from sickbay.core.treatment import Treatment


def apply(patient: Any, factor: float = 0.1) -> Callable[[], None]:
    """Every optimizer of `patient` steps with `factor` times its learning rate, which the script still sees unchanged; returns the undo."""
    return step_at(patient, factor)


treatment = Treatment(
    id="lower-learning-rate",
    safety="changes-training",
    summary="Divide the learning rate by ten, and warm it up.",
    apply=apply,
)
