"""The schedule counts what it was built for.

Steps = ceil(len(loader) / accumulation) * epochs, taken after the loader was shared out among processes. Give that number to the
scheduler and call `scheduler.step()` once after each `optimizer.step()`; a schedule in epochs once after each epoch. Lightning:
`{"scheduler": scheduler, "interval": "step"}`.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="count-schedule-steps",
    safety="advice",
    summary="Build the schedule for the run's optimizer steps, and step it once after each of them.",
)
