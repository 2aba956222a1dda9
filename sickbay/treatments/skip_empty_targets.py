"""A batch without a counted target gives no loss instead of NaN.

`if (targets != ignore_index).any(): ...`; or `cross_entropy(..., reduction='sum') / (targets != ignore_index).sum().clamp(min=1)`,
which is 0 for an empty batch and keeps all ranks of a distributed run in step. Better still, see that it cannot happen: mask at
least one token per row, truncate prompts from the left.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="skip-empty-targets",
    safety="advice",
    summary="Skip batches without a counted target, or divide the summed loss by count.clamp(min=1).",
)
