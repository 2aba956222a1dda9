"""An update whose gradient norm is ten times the running median is left out.

In the script: keep the last fifty norms that `clip_grad_norm_` returns and skip `optimizer.step()` where the new one is more than
ten times their median. Large runs go back about a hundred steps and leave the batches around the spike out.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

from sickbay.core.treatment import Treatment

HISTORY = 50  # steps
FEWEST = 10  # steps before anything is judged


def apply(patient: Any, limit: float = 10.0) -> Callable[[], None]:
    """Every optimizer of `patient` drops its gradients where their norm exceeds `limit` times its own running median; returns the undo."""
    from torch.nn.utils import get_total_norm

    pasts: dict[int, deque[float]] = {}

    def guard(optimizer: Any, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        past = pasts.setdefault(id(optimizer), deque(maxlen=HISTORY))
        if not gradients:
            return
        norm = float(get_total_norm(gradients))
        if len(past) >= FEWEST and not norm <= limit * statistics.median(past):
            optimizer.zero_grad(set_to_none=True)
        else:
            past.append(norm)

    handles = [optimizer.register_step_pre_hook(guard) for optimizer in patient.optimizers]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


treatment = Treatment(
    id="skip-spike-batch",
    safety="changes-training",
    summary="Skip the update of a batch whose gradient norm is ten times the running median.",
    apply=apply,
)
