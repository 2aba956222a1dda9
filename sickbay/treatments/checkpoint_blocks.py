"""Only every few blocks' inputs are kept for backward; the rest is computed again there.

Advice: torch.utils.checkpoint.checkpoint(segment, x, use_reentrant=False) over groups of about sqrt(L) blocks, or
model.gradient_checkpointing_enable() in transformers. About one more forward per step.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="checkpoint-blocks",
    safety="advice",
    summary="Checkpoint groups of about sqrt(L) blocks; the same mathematics for about one more forward per step.",
)
