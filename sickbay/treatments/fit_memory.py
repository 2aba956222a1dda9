"""The step fits into memory with the same batch.

Advice: micro-batches with gradient accumulation, each loss weighted by its tokens; torch.utils.checkpoint every sqrt(L) blocks;
bfloat16 autocast; an optimizer with less state. `sickbay plan` works out what fits.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="fit-memory",
    safety="advice",
    summary="Smaller micro-batches with accumulation, checkpointing, 16-bit autocast, then an optimizer with less state.",
)
