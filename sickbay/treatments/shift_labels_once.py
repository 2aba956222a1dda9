"""Position t is trained on the token at t + 1.

Advice: with transformers pass labels=input_ids, which the model shifts; with your own loss use logits[:, :-1] and ids[:, 1:], or data that
are shifted already, but one of them only.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="shift-labels-once",
    safety="advice",
    summary="Shift the targets by exactly one position, in the data or in the loss, not in both and not in neither.",
)
