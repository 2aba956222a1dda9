"""Weights in float32, arithmetic in bfloat16.

`with torch.autocast(device_type, dtype=torch.bfloat16): ...` around forward and loss, and no `.bfloat16()` on the model. Where memory
forbids it: an optimizer with float32 master weights, Kahan summation or stochastic rounding.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="master-weights",
    safety="advice",
    summary="Keep weights in float32 and compute in bfloat16 by torch.autocast.",
)
