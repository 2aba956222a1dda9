"""Each cycle of backward calls ends in a step of the optimizer.

Advice: optimizer.step() (scaler.step(optimizer) under a GradScaler) after the last backward of each cycle, then scheduler.step().
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="call-step",
    safety="advice",
    summary="Call optimizer.step() after backward, once per cycle of accumulation.",
)
