"""All ranks begin with the same weights and apply the same gradient.

Advice: load or initialise the model, then wrap it in DistributedDataParallel, and call the wrapper, never `.module`, in training. By
hand: `for t in (*model.parameters(), *model.buffers()): dist.broadcast(t.data, 0)` once, and `dist.all_reduce(p.grad)` over every
parameter, divided by the world size, before each step.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="synchronise-ranks",
    safety="advice",
    summary="Broadcast the weights from rank 0 once and average every gradient, or call the DistributedDataParallel wrapper.",
)
