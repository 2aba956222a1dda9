"""The model is called once for the whole batch.

Advice: `torch.stack(examples)` (pad_sequence where lengths differ, with a mask), one forward, one backward of the mean loss. The gradient
is that of the loop over examples, its losses divided by their number.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="stack-examples",
    safety="advice",
    summary="Stack the examples (pad_sequence where lengths differ) and call the model and backward once.",
)
