"""Every training batch has the loader's batch size.

Advice: `DataLoader(data, batch_size, shuffle=True, drop_last=True)`: with shuffling the samples left over differ from epoch to epoch,
so none is lost for good. Keep drop_last=False for evaluation, and weight its batches by their rows.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="drop-last",
    safety="advice",
    summary="drop_last=True for training, or a batch size that divides the data set.",
)
