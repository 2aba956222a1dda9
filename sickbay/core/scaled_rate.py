"""Steps of every optimizer at a multiple of its learning rate: what raising and lowering the rate share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def step_at(patient: Any, factor: float) -> Callable[[], None]:
    """Every optimizer of `patient` steps with `factor` times its learning rate, which the script still sees unchanged; returns the undo."""
    asked: dict[int, list[Any]] = {}

    def scale(optimizer: Any, args: Any, kwargs: Any) -> None:
        asked[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def restore(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, asked.pop(id(optimizer), [])):
            group["lr"] = rate

    handles = [
        handle
        for optimizer in patient.optimizers
        for handle in (optimizer.register_step_pre_hook(scale), optimizer.register_step_post_hook(restore))
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
