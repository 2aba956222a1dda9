"""The loss scale starts where gradients do not overflow.

`torch.amp.GradScaler(device, init_scale=2.0**10)`. This spares the skipped steps at the start only: a scale that goes on
falling has a cause elsewhere, an operation that overflows at any scale.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="lower-loss-scale",
    safety="advice",
    summary="Start the GradScaler at a lower init_scale once the operation that overflows is cured.",
)
