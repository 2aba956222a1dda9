"""The loss averages over real targets only.

Advice: `labels[attention_mask == 0] = -100` before the model, or `cross_entropy(..., ignore_index=pad_id)`.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="ignore-padding",
    safety="advice",
    summary="Leave padding out of the loss: targets of -100 at padded positions, or ignore_index=pad_id.",
)
