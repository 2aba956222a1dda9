"""Nothing is copied that is not changed afterwards, and nothing is checked every step that a look now and then would show.

Advice: delete the clone, contiguous and cast; keep .item(), isnan checks and snapshots of the weights for every hundredth step. Write in
place only where autograd has not saved the value: it raises an error otherwise.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="drop-copies",
    safety="advice",
    summary="Delete copies and casts that nothing needs; check values and keep snapshots only every hundredth step.",
)
