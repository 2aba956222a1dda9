"""Every optimizer step uses ten times the learning rate that the script asks for.

In the script: multiply the learning rate where the optimizer is made, and the schedule's floor with it; then look again. The factor acts
on whatever the schedule sets, so a warm-up or a cosine keeps its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sickbay.core.treatment import Treatment


def apply(patient: Any, factor: float = 10.0) -> Callable[[], None]:
    """Every optimizer of `patient` steps with `factor` times its learning rate, which the script still sees unchanged; returns the undo."""
    asked: dict[int, list[Any]] = {}

    def raise_(optimizer: Any, args: Any, kwargs: Any) -> None:
        asked[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def restore(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, asked.pop(id(optimizer), [])):
            group["lr"] = rate

    handles = [
        handle
        for optimizer in patient.optimizers
        for handle in (optimizer.register_step_pre_hook(raise_), optimizer.register_step_post_hook(restore))
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


treatment = Treatment(
    id="raise-learning-rate",
    safety="changes-training",
    summary="Multiply the learning rate by ten, and look again.",
    apply=apply,
)
