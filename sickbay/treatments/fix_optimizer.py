"""Every element that has a gradient moves.

Advice: replace the hand-written update by torch.optim, or write `with torch.no_grad(): p.add_(update, alpha=-lr)`; contiguous parameters
avoid kernels that write to a temporary.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="fix-optimizer",
    safety="advice",
    summary="Use torch.optim, or write the update in place under no_grad, and compare a tensor before and after a step.",
)
