"""Each call of the model does more work for its fixed cost.

Advice: raise the batch to the knee of the measured curve. That changes training: keep tokens per update (fewer accumulation steps), or
scale the learning rate (linearly for SGD, by the square root for Adam) and the schedule's number of steps.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="larger-batch",
    safety="advice",
    summary="Raise the batch to the measured knee; keep tokens per update, or rescale learning rate and schedule.",
)
