"""Rows of a batch are computed independently.

Advice: use `.transpose(1, 2)` where dimensions change places and `.view` only where neighbours merge or split; set batch_first=True where
batches are (batch, sequence, hidden); take means and softmaxes over the last dimension.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="keep-batch-axis",
    safety="advice",
    summary="Mend the reshape, transpose or dim that confuses the batch with another dimension (batch_first?).",
)
