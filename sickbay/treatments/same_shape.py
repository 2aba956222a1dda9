"""Predictions and targets have one shape before they meet.

Advice: `pred = model(x).squeeze(-1)` for a model with one output, or `target = target.unsqueeze(-1)`; then
`assert pred.shape == target.shape`. `squeeze()` without a dimension would take the batch's too where it is 1.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="same-shape",
    safety="advice",
    summary="Give prediction and target one shape before the named line: pred.squeeze(-1) or target.unsqueeze(-1).",
)
