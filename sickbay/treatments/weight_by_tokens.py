"""The accumulated gradient equals that of the joined batch.

Advice: count the targets of all k micro-batches first, then `(cross_entropy(..., reduction="sum") / targets_of_the_step).backward()` for
each; step on the last, shorter cycle too.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="weight-by-tokens",
    safety="advice",
    summary="Sum the micro-batches' losses and divide by the whole step's number of counted targets.",
)
