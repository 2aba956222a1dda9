"""The next batch is ready when the step asks for it.

Advice: DataLoader(num_workers=2 or more, prefetch_factor, persistent_workers=True, pin_memory on a GPU); tokenise and decode once and keep
the result (a memory-mapped array, datasets.map); make batches with array operations instead of Python loops over rows.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="prepare-data-ahead",
    safety="advice",
    summary="Prepare data once and ahead: tokenise before training, DataLoader workers with prefetch, array operations per batch.",
)
