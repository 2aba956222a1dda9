"""Gradients are clipped at their true size.

`scaler.scale(loss).backward(); scaler.unscale_(optimizer); clip_grad_norm_(model.parameters(), 1.0); scaler.step(optimizer);
scaler.update()`. `scaler.step` knows that the gradients are unscaled already.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="unscale-before-clip",
    safety="advice",
    summary="Call scaler.unscale_(optimizer) before clip_grad_norm_.",
)
