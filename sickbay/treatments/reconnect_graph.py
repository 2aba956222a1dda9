"""Every trainable parameter is connected to the loss.

Advice: replace argmax by a softmax or a straight-through estimator, take .detach() and no_grad out of the path, pass use_reentrant=False to
activation checkpointing; set requires_grad_(False) on what should not learn.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="reconnect-graph",
    safety="advice",
    summary="Remove the operation that cuts the graph (detach, no_grad, argmax, item); freeze on purpose what should stay.",
)
