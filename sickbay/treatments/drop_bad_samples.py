"""An update whose gradients are not finite is left out, and the weights stay as they were.

In the script: find the sample (its batch and index are in the finding), repair or drop it, and check in the data set:
`assert torch.isfinite(features).all(), path`. Leaving updates out keeps the run alive meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sickbay.core.treatment import Treatment


def apply(patient: Any) -> Callable[[], None]:
    """Every optimizer of `patient` drops its gradients, and so moves nothing, where their norm is not finite; returns the undo."""
    from torch.nn.utils import get_total_norm

    def guard(optimizer: Any, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients and not bool(get_total_norm(gradients).isfinite()):
            optimizer.zero_grad(set_to_none=True)

    handles = [optimizer.register_step_pre_hook(guard) for optimizer in patient.optimizers]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


treatment = Treatment(
    id="drop-bad-samples",
    safety="changes-training",
    summary="Repair or drop the named sample; until then skip updates whose gradients are not finite.",
    apply=apply,
)
