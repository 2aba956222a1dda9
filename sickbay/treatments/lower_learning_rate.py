"""Every optimizer step uses a tenth of the learning rate that the script asks for.

In the script: divide the learning rate by ten where the optimizer is made, and the schedule's floor with it. The factor acts
on whatever the schedule sets, so a warm-up or a cosine keeps its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sickbay.core.treatment import Treatment


def apply(patient: Any, factor: float = 0.1) -> Callable[[], None]:
    """Every optimizer of `patient` steps with `factor` times its learning rate, which the script still sees unchanged; returns the undo."""
    asked: dict[int, list[Any]] = {}

    def lower(optimizer: Any, args: Any, kwargs: Any) -> None:
        asked[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def restore(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, asked.pop(id(optimizer), [])):
            group["lr"] = rate

    handles = [
        handle
        for optimizer in patient.optimizers
        for handle in (optimizer.register_step_pre_hook(lower), optimizer.register_step_post_hook(restore))
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


treatment = Treatment(
    id="lower-learning-rate",
    safety="changes-training",
    summary="Divide the learning rate by ten, and warm it up.",
    apply=apply,
)
