"""The weights are the last ones known to be finite.

Load the newest checkpoint for which `all(t.isfinite().all() for t in state.values() if t.is_floating_point())` holds, and make
that the condition for overwriting a checkpoint. If the weights are not finite at the start: initialise every tensor that
`torch.empty` made, and give the optimizer an eps that the weights' format can hold (1e-8 is 0 in float16).
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="restore-weights",
    safety="advice",
    summary="Go back to the last checkpoint whose weights are all finite, and check before every save.",
)
