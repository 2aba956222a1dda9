"""The schedule ends where its plan ends.

Clamp the progress before the cosine: `progress = min(1.0, (step - warmup) / (total - warmup))`, with this run's total and a floor
of a tenth of the peak. For restarts on purpose use `CosineAnnealingWarmRestarts`.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="clamp-schedule",
    safety="advice",
    summary="Clamp the schedule's progress to 1, and give it the run's own number of steps.",
)
