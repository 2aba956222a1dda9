"""The global gradient norm is clipped right before every optimizer step.

In the script: `torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)` after the last backward of the step (and after
`scaler.unscale_(optimizer)` under a GradScaler), before `optimizer.step()`. The limit 1.0 is the usual one for
transformers (Pascanu et al. 2013 for the method).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sickbay.core.treatment import Treatment


def apply(patient: Any, max_norm: float = 1.0) -> Callable[[], None]:
    """Every optimizer of `patient` clips its gradients to `max_norm` (global L2 norm) before it steps; returns the undo."""
    from torch.nn.utils import clip_grad_norm_

    def clip(optimizer: Any, args: Any, kwargs: Any) -> None:
        clip_grad_norm_([parameter for group in optimizer.param_groups for parameter in group["params"]], max_norm)

    handles = [optimizer.register_step_pre_hook(clip) for optimizer in patient.optimizers]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


treatment = Treatment(
    id="clip-gradients",
    safety="changes-training",
    summary="Clip the global gradient norm to 1.0 before every optimizer step.",
    apply=apply,
)
