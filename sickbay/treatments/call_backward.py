"""Each step uses gradients of its own batch.

Advice: the order is optimizer.zero_grad(), loss = ..., loss.backward(), clipping, optimizer.step().
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="call-backward",
    safety="advice",
    summary="Call loss.backward() before every optimizer.step(), after zero_grad().",
)
