"""Every trainable parameter of the model is in an optimizer.

Acts on parameters that the model has registered; layers in a plain list need nn.ModuleList first. Undoing takes the added group out
again, with the optimizer's state for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sickbay.core.treatment import Treatment


def apply(patient: Any) -> Callable[[], None]:
    """Trainable parameters of `patient.root` that are in no optimizer form one more group of the largest optimizer, with its defaults.

    Raises ValueError when there is no model, no optimizer, or nothing to add.
    """
    optimizers = sorted(patient.optimizers, key=_size)
    if patient.root is None or not optimizers:
        raise ValueError("register-parameters: it needs a model and an optimizer, and has not seen both")
    known = {id(weight) for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]}
    added = [weight for weight in patient.root.parameters() if weight.requires_grad and id(weight) not in known]
    if not added:
        raise ValueError("register-parameters: every parameter that the model has registered is in an optimizer already; use nn.ModuleList")
    chosen = optimizers[-1]
    settings = {name: value for name, value in chosen.param_groups[0].items() if name != "params"}
    chosen.add_param_group({**settings, "params": added})
    group = chosen.param_groups[-1]

    def undo() -> None:
        chosen.param_groups[:] = [other for other in chosen.param_groups if other is not group]
        for weight in added:
            chosen.state.pop(weight, None)

    return undo


def _size(optimizer: Any) -> int:
    return sum(weight.numel() for group in optimizer.param_groups for weight in group["params"])


treatment = Treatment(
    id="register-parameters",
    safety="changes-training",
    summary="Register layers with nn.ModuleList and build the optimizer over model.parameters() after the model is complete.",
    apply=apply,
)
