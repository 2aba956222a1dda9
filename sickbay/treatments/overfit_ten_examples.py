"""Ten examples are learned by heart, or it is known why not.

Train on the same ten examples with dropout, augmentation and weight decay off until the loss is near their conditional entropy. If it does
not get there: data, mask, positions, graph, in this order. If it does: learning rate, then patience.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="overfit-ten-examples",
    safety="advice",
    summary="Overfit ten examples first; then look at data, mask, gradients and learning rate, in this order.",
)
